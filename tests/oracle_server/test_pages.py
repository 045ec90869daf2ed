"""Pages for people: what a browser may do with them, and that nothing in them comes from outside."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from oracle_support import Running

from oracle_server.docs_page import docs_page
from oracle_server.pages import html_page


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words += data


def policy_of(header: str) -> dict[str, list[str]]:
    return {name: values for name, *values in (part.split() for part in header.split(";"))}


def test_the_documentation_fetches_nothing_from_outside(server: Running) -> None:
    answer = server.http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(answer.text)
    assert page.links == ["/openapi.json"]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "meta http-equiv"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", answer.text)
    policy = policy_of(answer.headers["content-security-policy"])
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert "script-src" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_the_documentation_says_what_the_document_says(server: Running) -> None:
    words = Page(server.http.get("/docs").text).words
    document = server.http.get("/openapi.json").json()
    for path, item in document["paths"].items():
        assert path in words
        for operation in item.values():
            assert operation["summary"].replace("`", "") in words
            assert all(parameter["name"] in words for parameter in operation.get("parameters", ()))
    assert all(name in words for name in document["components"]["schemas"])
    assert {"/redoc", "/docs/oauth2-redirect"}.isdisjoint(document["paths"])
    assert server.http.get("/redoc").status_code == 404


def test_what_the_document_says_is_never_html() -> None:
    hostile = "<script>alert(1)</script>\"'`<b>`&"
    document = {
        "info": {"title": hostile, "version": hostile, "description": hostile},
        "paths": {
            hostile: {
                "get": {
                    "summary": hostile,
                    "parameters": [{"name": hostile, "in": "query", "description": hostile}],
                    "requestBody": {"content": {hostile: {"schema": {"title": hostile}}}},
                    "responses": {hostile: {"description": hostile, "headers": {hostile: {"description": hostile}}}},
                }
            }
        },
        "components": {"schemas": {hostile: {"description": hostile, "enum": [hostile]}}},
    }
    page = Page(bytes(docs_page(document).body).decode())
    assert not {"script", "b"} & set(page.tags)
    assert page.words.count("alert(1)") >= 13


def test_a_page_s_own_style_is_the_only_one() -> None:
    answer = html_page("a <title>", "<p>b", style="p{}")
    text, policy = bytes(answer.body).decode(), policy_of(answer.headers["content-security-policy"])
    assert "<title>a &lt;title&gt;</title>" in text
    (source,) = re.findall("<style>(.*?)</style>", text)
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    assert policy["style-src"] == [f"'sha256-{digest}'"]


@pytest.mark.parametrize("directive", ["style-src", "script-src", "connect-src"])
def test_what_a_page_does_not_need_it_may_not(directive: str) -> None:
    assert directive not in policy_of(html_page("a", "b").headers["content-security-policy"])
