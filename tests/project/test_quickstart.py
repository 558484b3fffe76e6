"""The quickstart does what it says: as a page, as a script and as a notebook."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.quickstart import __main__ as quickstart
from ipc.names import SHM
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart.md"
NOTEBOOK = ROOT / "examples" / "quickstart" / "quickstart.ipynb"


def alike(line: str) -> str:
    """A line without the numbers that are others in each run: processes and events, not what is cached."""
    return re.sub(r"\b\d+(?=-\d+\b| starts)|(?<=event )\d+", "N", line)


def left_behind(process: int) -> list[str]:
    return [name for name in os.listdir(SHM) if f"quickstart-{process}" in name]


def test_the_page_can_be_typed(capfd: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "pip install .\n" in blocks[0]
    name = f"quickstart-{os.getpid()}"
    engines: list[quickstart.Engine] = []
    for command in "".join(blocks[1:]).splitlines():
        words = ["quickstart" if word == "demo" else word for word in command.split()]
        if words[:3] == ["python", "-m", quickstart.start_engine.__module__.replace("__main__", "engine")]:
            engines.append(quickstart.start_engine(name))
        elif words[:2] == ["kill", "-9"]:
            quickstart.kill(engines[-1])
        elif words[:2] == ["kvledger", "top"]:
            assert "written by process" in quickstart.kvledger("top", name, "--once")
        else:
            assert words[:4] == ["kvledger", "explain", "quickstart", "request"], f"nobody tries {command!r}"
            request = words[4].replace("4711", str(engines[0].process.pid))
            assert f"request '{request}' has ended" in quickstart.kvledger("explain", name, "request", request)
    quickstart.stop(engines[-1])
    said = {alike(line) for line in capfd.readouterr().out.splitlines()}
    for shown in "".join(re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL)).splitlines():
        assert alike(shown) in said, shown
    assert len(engines) == 2 and not left_behind(os.getpid())


def run(*arguments: str, folder: Path = ROOT) -> tuple[int, str]:
    """A program of the quickstart in a process of its own; returns its number and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    printed, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, printed
    assert not left_behind(process.pid)
    return process.pid, printed


def test_the_script_does_it_by_itself() -> None:
    _, printed = run("-m", "examples.quickstart")
    assert "starts cold" in printed and "starts warm" in printed
    assert printed.endswith("The answers after the crash are those from before.\n")


def test_the_cells_of_the_notebook_run_in_order(tmp_path: Path) -> None:
    """As plain Python, in the folder in which Jupyter would run them; what it shows for each is left to Jupyter."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], len({cell["id"] for cell in notebook["cells"]})) == (4, len(notebook["cells"]))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    program = tmp_path / "cells.py"
    program.write_text("\n\n".join(cells))
    process, printed = run(str(program), folder=NOTEBOOK.parent)
    assert f"kvledger explain quickstart-{process} request" in printed and "starts warm" in printed


def test_links_of_the_notebook_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", NOTEBOOK.read_text())
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)
