"""What a user of any command line expects: ``-h``, ``--version``, examples, completion, errors as JSON, exit codes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvledger
from ipc import LogWriter
from kvledger.cli import app
from kvledger.cli.examples import EXAMPLES
from kvledger.cli.exits import BUG
from kvledger.doctor.ledgers import Ledger
from tests.cli.logs import every_event, living_ledger
from tests.cli.test_names import commands
from tests.waiting import PATIENCE_S


def run(*arguments: str, columns: int = 100) -> tuple[int, str, str]:
    done = CliRunner(env={"COLUMNS": f"{columns}", "NO_COLOR": "1"}).invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def test_the_version_is_the_one_of_the_package() -> None:
    code, out, _ = run("--version")
    assert code == 0 and out.split(",")[0] == f"kvledger {kvledger.__version__}"


@pytest.mark.parametrize("command", sorted(EXAMPLES))
def test_help_is_short_to_type_and_ends_with_examples(command: str) -> None:
    code, out, _ = run(command, "-h", columns=160)
    assert code == 0 and run(command, "--help", columns=160)[1] == out
    for example in EXAMPLES[command]:
        assert f"• {example}\n" in "\n".join(line.rstrip() for line in out.splitlines()) + "\n", example


def test_every_command_has_examples_that_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they come to without such a file: nobody says that there is no such option."""
    assert set(EXAMPLES) == set(commands())
    monkeypatch.chdir(tmp_path)
    for command in ("doctor", "run", "segments", "simulate"):  # these would work
        for example in EXAMPLES[command]:
            assert shlex.split(example)[:2] == ["kvledger", command]
            assert run(*shlex.split(example)[1:], "--no-such-option")[2].startswith("error No such option: --no-such")
    for command in set(EXAMPLES) - {"doctor", "run", "segments", "simulate"}:
        for example in EXAMPLES[command]:
            words = shlex.split(example)
            assert words[:2] == ["kvledger", command]
            code, _, err = run(*words[1:])
            assert code == 2 and err.startswith("error ") and "No such option" not in err, (example, err)
            assert "--help" not in err, (example, err)


def test_an_error_is_one_line_and_an_object_for_machines() -> None:
    for words in (("show", "absent.kvlog"), ("show", "absent.kvlog", "--at"), ("no-such-command",)):
        code, out, err = run(*words)
        assert code == 2 and not out and err.startswith("error ") and err.count("\n") == 1, err
        code, out, err = run(*words, "--json")
        told = json.loads(out)
        assert told["exit_code"] == code == 2 and err == f"error {told['error']}\n"


def test_a_fault_of_ours_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 means "the answer is no"; an exception that nobody expected must not look like it."""

    def fail(*arguments: object) -> None:
        raise RuntimeError("\x1b[2Joops")

    monkeypatch.setattr("kvledger.cli.sources.open_source", fail)
    code, out, err = run("check", "x", "--json")
    assert code == BUG and json.loads(out)["exit_code"] == BUG and "Traceback" in err and "\\x1b[2Joops" in err
    assert "\x1b" not in err


def test_a_shell_completes_commands_and_ledgers(tmp_path: Path) -> None:
    name = f"completed-{os.getpid()}"
    (tmp_path / "night.kvlog").touch()
    (tmp_path / "bad\x1b[2J.kvlog").touch()
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=1 << 16)

    def completed(words: str, position: int) -> list[str]:
        environment = {**os.environ, "_KVLEDGER_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment |= {"COMP_CWORD": f"{position}", "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-c", "from kvledger.cli import app; app(prog_name='kvledger')"]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done
        return done.stdout.split("\n")[:-1] if done.stdout.endswith("\n") else done.stdout.split("\n")

    try:
        assert completed("kvledger sh", 1) == ["show", "shrink"]
        assert completed(f"kvledger show {name[:-1]}", 2) == [name]
        assert completed("kvledger show n", 2)[-1] == "night.kvlog" and completed("kvledger show bad", 2) in ([], [""])
    finally:
        writer.close(unlink=True)


OPTIONAL = [
    "audit",
    "check",
    "events",
    "leaks",
    "log",
    "metrics",
    "misses",
    "pushes",
    "replay",
    "show",
    "spans",
    "top",
    "view",
]


@pytest.mark.parametrize("command", [*OPTIONAL, "what-if", "bisect"])
def test_a_name_can_be_left_out_where_there_is_one_ledger(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ledgers of this machine are left out of the list here."""
    more = {"bisect": ["--predicate", "False"]}.get(command, [])
    monkeypatch.setattr("kvledger.doctor.ledgers.ledgers", list)
    code, _, err = run(command, *more)
    assert code == 2 and "there is no ledger on this machine" in err
    name = f"only-{os.getpid()}"
    ledger = Ledger(name, "dead", 1, 0, 0.0, 0, 0, [], [])
    monkeypatch.setattr("kvledger.doctor.ledgers.ledgers", lambda: [ledger, ledger._replace(name="b")])
    code, _, err = run(command, *more)
    assert code == 2 and f"there are 2 ledgers here: {name}, b" in err
    monkeypatch.setattr("kvledger.doctor.ledgers.ledgers", lambda: [ledger, ledger._replace(state="other user")])
    code, _, err = run(command, *more)  # and there is no such ledger really: that it asked for this one is seen
    assert (
        code == 2 and err.startswith(f"note: {name} is the only ledger here\nerror ") and name in err.split("error")[1]
    )


def test_the_one_ledger_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"only-{os.getpid()}"
    with living_ledger(name, every_event(str)[:20]):
        ledger = Ledger(name, "alive", 1, 0, 0.0, 0, 0, [], [])
        monkeypatch.setattr("kvledger.doctor.ledgers.ledgers", lambda: [ledger])
        for command in ("log", "show", "leaks", "top"):
            once = ["--json"] if command != "log" else []
            (code, out, err), (wanted, told, _) = run(command, *once), run(command, name, *once)
            assert code == wanted in (0, 1) and out[:40] == told[:40] and "is the only ledger here" in err
