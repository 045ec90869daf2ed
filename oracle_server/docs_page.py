"""`GET /docs`: the OpenAPI document as one static page. Nothing is fetched, nothing is run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from starlette.responses import HTMLResponse

from oracle_server.pages import html_page

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre, .verb { font-family: ui-monospace, monospace; font-size: .9em; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8884; border-radius: .3rem; }
section { border-top: 1px solid #8886; margin-top: 2rem; }
.verb { border: 1px solid currentColor; border-radius: .3rem; padding: 0 .4rem; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; }
"""
_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")


def docs_page(document: Mapping[str, Any]) -> HTMLResponse:
    """An OpenAPI document (3.x, as `FastAPI.openapi()` gives it) for people to read."""
    info = document["info"]
    return html_page(f"{info['title']}: HTTP interface", "\n".join(_document(document)), style=_STYLE)


def _document(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
    yield _paragraph(info.get("description", ""))
    yield '<p>The same for programs: <a href="/openapi.json">/openapi.json</a></p>'
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                yield from _operation(path, method, item[method])
    schemas = document.get("components", {}).get("schemas", {})
    if schemas:
        yield "<section><h2>Messages</h2>"
        for name, schema in schemas.items():
            yield f"<h3>{escape(name)}</h3>"
            yield _paragraph(schema.get("description", ""))
            yield f"<pre>{escape(json.dumps(schema, indent=1))}</pre>"
        yield "</section>"


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section><h2><span class="verb">{method.upper()}</span> <code>{escape(path)}</code></h2>'
    yield _paragraph(operation.get("summary", ""))
    yield _paragraph(operation.get("description", ""))
    if operation.get("security"):
        yield "<p>Needs an API key.</p>"
    yield from _table(
        "Parameters",
        [(f"{p['name']} ({p['in']})", p.get("description", "")) for p in operation.get("parameters", ())],
    )
    body = operation.get("requestBody", {})
    yield from _table("Body", [(kind, _message(content)) for kind, content in body.get("content", {}).items()])
    yield from _table("Answers", [(status, _answer(answer)) for status, answer in operation["responses"].items()])
    yield "</section>"


def _answer(answer: Mapping[str, Any]) -> str:
    parts = [answer.get("description", "")]
    parts += [f"`{kind}` {_message(content)}".strip() for kind, content in answer.get("content", {}).items()]
    parts += [f"`{name}`: {header.get('description', '')}" for name, header in answer.get("headers", {}).items()]
    return " · ".join(part for part in parts if part)


def _message(content: Mapping[str, Any]) -> str:
    """The name of the message that a body is."""
    schema = content.get("schema", {})
    return str(schema.get("$ref", "").rpartition("/")[2] or schema.get("title", "") or schema.get("format", ""))


def _table(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    if rows:
        cells = "".join(f"<tr><th><code>{escape(name)}</code></th><td>{_text(text)}</td></tr>" for name, text in rows)
        yield f"<h3>{title}</h3><table>{cells}</table>"


def _paragraph(text: str) -> str:
    return f"<p>{_text(text)}</p>" if text else ""


def _text(text: str) -> str:
    """Plain text as HTML; what stands in backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
