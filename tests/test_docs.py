"""The documents agree with the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_generated_is_up_to_date() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for path, text in generator["pages"]():
        assert path.read_text() == text, f"{path.name}: run python docs/generate.py"


def test_readme_example_runs(capsys: object) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], {})


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_steps_of_integrating_run_in_order() -> None:
    text = (ROOT / "docs" / "integrating.md").read_text()
    steps = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(steps) > 8
    space: dict[str, object] = {}
    for number, step in enumerate(steps, 1):
        exec(compile(step, f"integrating.md, snippet {number}", "exec"), space)
