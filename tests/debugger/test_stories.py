"""Every command in the documents gives the output that stands below it. ``KVLEDGER_REWRITE=1`` writes them anew."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvledger.cli import app

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def output(command: str, folder: Path) -> str:
    words = shlex.split(command)
    if words[0] == "cat":
        return (folder / words[1]).read_text()
    if words[0] == "kvledger":
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code in (0, 1) and not isinstance(done.exception, Exception), (command, done.output)
        return done.output
    assert words[0] == "python", command
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return made.stdout + made.stderr


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", ["docs/debugging.md", "examples/garbled/README.md"])
def test_the_output_is_what_the_page_shows(page: str, tmp_path: Path) -> None:
    path = ROOT / page
    text = path.read_text()

    def run(block: re.Match[str]) -> str:
        parts = []
        for command in re.findall(r"^\$ (.*)$", block[1], re.MULTILINE):
            lines = [line.rstrip() for line in output(command, tmp_path).splitlines()]
            parts.append("\n".join([f"$ {command}", *lines]) + "\n")
        return "```console\n" + "".join(parts) + "```"

    told = BLOCK.sub(run, text)
    if os.environ.get("KVLEDGER_REWRITE"):
        path.write_text(told)
    assert told == path.read_text()


@pytest.mark.parametrize("incident", ["twice", "head", "permuted", "early", "leaked"])
def test_the_documented_commands_lead_to_the_guilty_event(incident: str, tmp_path: Path) -> None:
    """From the file alone, the number of the event that the planted bug made."""
    guilty = output(f"python -m examples.garbled {incident} log.kvlog", tmp_path).split()[-1]
    assert int(guilty) > 0
    if incident == "leaked":
        assert "all invariants hold" in output("kvledger check log.kvlog", tmp_path)
        assert f"since event {guilty}," in output("kvledger leaks log.kvlog", tmp_path)
        assert f"the one at event {guilty} is not" in output("kvledger replay log.kvlog --decide", tmp_path)
    else:
        told = output("kvledger check log.kvlog", tmp_path)
        assert f"event {guilty} is the first that is wrong" in told
        assert re.search(rf"^→ +{guilty} ", told, re.MULTILINE)
