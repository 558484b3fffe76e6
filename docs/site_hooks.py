"""What MkDocs has to be told about these pages (``make site``).

The pages link to files of the repository that lie outside ``docs/``. Such a file becomes a page too, so that
the site is whole without a network: Markdown as it is, everything else as its text, a folder as a list.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)#:\s]*)(#[^)\s]*)?(?=\))")
TOP = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
"""Pages of the site that lie above ``docs/``."""
LIBRARIES = Path(os.environ.get("KVLEDGER_SITE_LIBRARIES", "/nonexistent"))
"""Folder of scripts that the pages otherwise fetch from the network: mermaid draws diagrams, iframe-worker searches."""
LANGUAGES = {".py": "python", ".yml": "yaml", ".json": "json", ".toml": "toml", ".js": "javascript"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if (LIBRARIES / "mermaid.min.js").exists():
        config.extra_javascript.append("mermaid.min.js")
    if (LIBRARIES / "iframe-worker.js").exists():
        config.extra["polyfills"] = ["iframe-worker.js"]  # where Material's plugin for offline sites looks for it
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside ``docs/`` that some page links to."""
    for script in LIBRARIES.glob("*.js"):
        files.append(File.generated(config, script.name, abs_src_path=str(script)))
    waiting = [(name, (ROOT / name).read_text()) for name in TOP]
    for name, text in waiting:
        files.append(File.generated(config, name, content=_with_links(text, name, name)))
    waiting += [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    done = set()
    while waiting:
        for path in _outside(*waiting.pop()):
            if path not in done:
                done.add(path)
                text = _text_of(ROOT / path)
                waiting.append((path if (ROOT / path).is_file() else f"{path}/README.md", text))
                home = f"{path}/README.md" if (ROOT / path).is_dir() else path
                files.append(File.generated(config, uri(path), content=_with_links(text, home, uri(path))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by is not None:
        return markdown  # its links were written by on_files
    return _with_links(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def uri(path: str) -> str:
    """Where the site has a file of the repository: pages of ``docs/`` at the top, others under ``source/``."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in TOP:
        return path
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _outside(home: str, text: str) -> Iterator[str]:
    """Files and folders outside ``docs/`` that a text links to, which lies at ``home`` in the repository."""
    for target, _ in LINK.findall(text):
        path = normpath(f"{Path(home).parent.as_posix()}/{target}")
        if target and not path.startswith("docs/") and path not in TOP and (ROOT / path).exists():
            yield path


def _with_links(text: str, home: str, place: str) -> str:
    """A text of the repository with the links that it needs at ``place`` of the site."""

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        anchor = re.sub(r"-(\d)$", r"_\1", anchor) if place == "api.md" else anchor  # the second heading of one name
        if not target:
            return anchor
        path = normpath(f"{Path(home).parent.as_posix()}/{target}")
        if not (ROOT / path).exists():
            return match[0]
        return relpath(uri(path), os.path.dirname(place) or ".") + anchor

    return LINK.sub(link, text)


def _text_of(path: Path) -> str:
    if path.is_dir():
        readme = path / "README.md"
        if readme.exists():
            return readme.read_text()
        names = sorted(each.name for each in path.iterdir() if not each.name.startswith(("_", ".")))
        return f"# {path.name}\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    text = path.read_text()
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return f"# {path.relative_to(ROOT)}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}\n````\n"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"
