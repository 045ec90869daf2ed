"""Pages of the site that stand elsewhere in the repository.

The README is its first page, and the root's other texts are pages too, their links as they are from there. Nothing is
copied, so nothing can go out of date.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[2]
# What is shown, by its name in the repository's root.
_PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "SECURITY.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "LICENSE": "LICENSE.md",
}
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's texts to the site's files."""
    for name, page in _PAGES.items():
        text = (_ROOT / name).read_text(encoding="utf-8")
        content = f"# License\n\n```\n{text}```\n" if name == "LICENSE" else _LINK.sub(_from_root, text)
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links out of `docs/`, to the root's texts, as the site has them."""
    up = page.file.src_uri.count("/")
    for name, target in _PAGES.items():
        markdown = markdown.replace(f"]({'../' * (up + 1)}{name}", f"]({'../' * up}{target}")
    return markdown


def _from_root(found: re.Match[str]) -> str:
    """A link of a text in the root: into `docs/`, or to another such text."""
    target = found[2]
    target = _PAGES.get(target, target.removeprefix("docs/"))
    if target == "results":
        target = "results/README.md"
    return f"{found[1]}{target}{found[3] or ''}{found[4]}"
