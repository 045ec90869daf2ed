"""HTML for people, which fetches nothing from anywhere and may be put into no frame."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from starlette.responses import HTMLResponse

from oracle_server import page_headers


def html_page(title: str, body: str, *, style: str = "") -> HTMLResponse:
    """A page of its own: its style stands in it, and the browser is told to run and fetch nothing.

    Args:
        title: plain text.
        body: HTML; whoever wrote it has escaped what came from elsewhere.
        style: CSS. Attributes (`style="..."`) are refused by the browser.
    """
    content = f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
    content += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    content += f"<style>{style}</style>\n" if style else ""
    content += f"</head>\n<body>\n{body}\n"
    content += "</body>\n</html>\n"
    return HTMLResponse(content, headers=_security_headers(style))


def _security_headers(style: str) -> dict[str, str]:
    policy = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    policy += [f"style-src '{_digest(style)}'"] if style else []
    return {**page_headers.PAGE, "Content-Security-Policy": "; ".join(policy)}


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
