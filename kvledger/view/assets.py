"""The page: one HTML file, one style sheet, plain scripts; nothing is built, nothing is loaded from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

SCRIPTS = ("log.js", "model.js", "timeline.js", "blocks.js", "lists.js", "explain.js", "page.js")
STYLES = ("page.css",)
_NOTHING_ELSE = "base-uri 'none'; form-action 'none'"
SERVED_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; "
    f"{_NOTHING_ELSE}"
)
"""Content-Security-Policy of the served page: its own scripts and its own server."""


def asset(name: str) -> str:
    """The text of one of the page's files."""
    return (files("kvledger.view") / "page" / name).read_text()


def served_page() -> str:
    """The page that loads its styles, its scripts and its data from the server."""
    styles = "".join(f'<link rel="stylesheet" href="{name}">\n' for name in STYLES)
    scripts = "".join(f'<script src="{name}"></script>\n' for name in SCRIPTS)
    return _page(styles, scripts)


def single_file(content: str) -> str:
    """The page with everything in it. Its policy names its scripts by their hashes and lets it load nothing.

    Args:
        content: the data, as JSON.
    """
    style, script = "\n".join(map(asset, STYLES)), "\n".join(map(asset, SCRIPTS))
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; {_NOTHING_ELSE}"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
    # JSON that cannot end its element: no "<" is left in it
    data = content.replace("<", "\\u003c")
    body = f'<script type="application/json" id="content">{data}</script>\n<script>{script}</script>\n'
    return _page(head, body)


def _page(styles: str, scripts: str) -> str:
    page = asset("page.html")
    return page.replace("<!-- styles -->\n", styles).replace("<!-- scripts -->\n", scripts)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
