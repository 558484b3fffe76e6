"""What a campaign says of what it finds, and of what does not work."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from tests.campaigns import __main__ as campaigns
from tests.waiting import PATIENCE_S

Status = dict[str, int]


def run(status: Status, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, list[list[str]]]:
    """Exit status, and the commands that were run. ``status``: of the command that has this word in it."""
    commands: list[list[str]] = []

    def instead(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, next((status[word] for word in status if word in command), 0))

    monkeypatch.setattr(campaigns.subprocess, "run", instead)
    monkeypatch.setattr("sys.argv", ["campaigns", *arguments])
    return campaigns.main(), commands


def test_one_seed_for_all_searches_and_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, commands = run({}, monkeypatch, "--seconds", "0")
    out = capsys.readouterr().out
    seed = out.split()[1].rstrip(";")
    assert status == 0 and f"again: make soak SEED={seed} SOAK_SECONDS=0" in out
    assert ["--split" in command for command in commands] == [False, True, False, False]
    assert all(seed in command or f"--hypothesis-seed={seed}" in command for command in commands)


@pytest.mark.parametrize(
    ("broken", "status", "expected"),
    [
        ("simulate", 1, 3),
        ("simulate", 2, 1),
        ("--split", 1, 3),
        ("tests.campaigns.starved", 1, 3),
        ("pytest", 1, 3),
        ("pytest", 2, 1),
        ("pytest", 5, 1),
    ],
)
def test_a_finding_is_told_from_a_broken_build(
    broken: str, status: int, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = run({broken: status}, monkeypatch, "--seconds", "0", "--seed", "7")
    assert found == expected
    if broken == "pytest":
        assert "HYPOTHESIS_PROFILE=campaign" in (out := capsys.readouterr().out) and "--hypothesis-seed=7" in out


def test_everybody_is_killed_where_there_is_no_room() -> None:
    """``make soak`` has the long form. That it finds wrong bytes was seen with a pusher that leaves bytes out."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.starved", "--seconds", "20", "--seed", "5"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 double-owned, 0 wrong bytes" in done.stdout
    assert re.search(r"killed: \d+ \w+", done.stdout) and re.search(r"[1-9][\d,]* events followed", done.stdout)
