"""The site: its navigation names every page once, and every link in it leads somewhere. Nothing is built here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ABOVE = {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
PAGES = [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in sorted({*ABOVE, "README.md"}))]


class Loader(yaml.SafeLoader):
    """Reads a configuration whose Python objects (``!!python/...``) are MkDocs' business."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def configuration() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    return found


def pages_of(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    for each in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from pages_of(each)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title.strip().lower())
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def test_the_navigation_names_every_page_once() -> None:
    named = Counter(pages_of(configuration()["nav"]))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(named) == there | ABOVE, "mkdocs.yml has a line for each page of docs/"
    assert {*named.values()} == {1}


def test_learning_doing_looking_up_and_understanding_are_kept_apart() -> None:
    parts = [next(iter(part)) for part in configuration()["nav"]]
    assert parts == ["Home", "Learn", "Do", "Look up", "Understand"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name}: {target}#{anchor}"


def test_diagrams_of_messages_have_no_semicolon() -> None:
    """It would end the statement: what follows is no diagram any more, and neither is the rest."""
    for page in PAGES:
        for diagram in re.findall(r"```mermaid\nsequenceDiagram\n(.*?)```", page.read_text(), re.DOTALL):
            assert ";" not in diagram, page.name
