"""Nothing that a client chose is obeyed by a terminal or taken for markup, whatever command prints it.

A command that is not in the tables below fails, and so does one that prints past :mod:`kvledger.cli.terminal`.
"""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvledger.cli import app
from kvledger.debugger import open_source, pushes
from kvledger.manager import notices
from kvledger.text import printable
from kvledger.view.log import Log
from tests.cli.logs import HOSTILE, LOUD, broken, every_event, living_ledger, write_recording
from tests.waiting import PATIENCE_S

NAME = f"hostile-{os.getpid()}"
OWN = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[(?:1A|2K)|\r(?=\x1b|\n|$)")
"""What the command line itself sends to a terminal: colours, and a line that says how far it is."""

SHOWS: dict[str, list[str]] = {
    "audit": ["{ledger} --once", "{ledger} --once --json"],
    "bisect": ["{log} --predicate len(requests)>3", "{log} --predicate False", "{log} --predicate x --json"],
    "check": ["{log}", "{log} --json", "{ledger}", "{broken}", "{broken} --json"],
    "diff": ["{log} {other}", "{log}@100 {log}@200", "{log}@100 {log}@200 --json", "{log} {other} --json"],
    "doctor": ["--json"],
    "events": ["{log}", "{request}"],
    "explain": [
        "{log} request {request}",
        "{log} request {request} --json",
        "{log} block 3",
        "{log} block 3 --tier host --json",
        "{log} transfer 3",
        "{ledger} request {request}",
    ],
    "export": ["{log} {new} --to csv", "{log} {new} --to jsonl", "{log} {new} --to perfetto", "{log} {new} --to x"],
    "leaks": ["{log} --at 200", "{log} --at 200 --json", "{ledger}"],
    "misses": ["{log} --most 100 --words", "{log} --json", "{ledger}"],
    "log": ["{log}", "{log} --json", "{log} --request {request}", "{ledger}", "{log} --kind Worker", "{log} --hash ab"],
    "metrics": ["{log}", "{request}"],
    "pushes": ["{ledger}", "{log}"],
    "record": ["{ledger} {new} --once", "{log} {new}", "{ledger} {log} --once"],
    "redact": ["{log} {new}", "{ledger} {new}", "{request} {new}"],
    "replay": ["{log}", "{log} --decide", "{broken} --decide", "{broken} --decide --json", "{ledger} --json"],
    "run": ["{log}", "--per-request {log}", "--record {log}", "--no-data --requests 3 --name {request}"],
    "segments": ["{ledger}", "{log}", "{ledger} --json"],
    "show": [
        "{log} --at 200",
        "{log} --at 200 --all",
        "{log} --at 200 --json",
        "{log} --at 200 --request {live}",
        "{log} --at 200 --node {node}",
        "{log} --at 200 --block 3",
        "{ledger}",
    ],
    "shrink": ["{log} -o {new} --predicate len(requests)>3", "{log} -o {log}", "{log} -o {new}"],
    "size": ["--model {log} --memory 64GiB", "--model {log} --memory {request}", "--model {new} --memory 1 --json"],
    "simulate": ["--runs 1", "--runs {log}"],
    "spans": ["{log}", "{request}", "{ledger} --endpoint {log}"],
    "top": ["{ledger} --once", "{ledger} --json", "{log} --once"],
    "view": ["{log} --export {new}", "{log} --port 1 --export {log}", "{other}x"],
    "what-if": ["{log}", "{log} --curve", "{log} --device-blocks 9,10 --json", "{log} --hints {request}"],
}
"""Per command how it is asked for the log whose every text is hostile; with ``{...}`` from :func:`asked`."""

QUIET = {"audit", "doctor", "metrics", "pushes", "record", "redact", "run", "segments", "simulate", "size", "spans"}
QUIET |= {"events", "shrink", "what-if"}
"""They print no text out of a log: that what is hostile stands in their errors is enough."""


def kvledger(*arguments: str, colours: bool = False) -> tuple[int, str, str]:
    """Exit code and what a command printed to either stream, decoded as a terminal does."""
    runner = CliRunner(env={"FORCE_COLOR": "1", "COLUMNS": "999"} if colours else {"NO_COLOR": "1"})
    done = runner.invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def commands() -> list[str]:
    found = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    return [name.replace("_", "-") for name in found]


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the placeholders of :data:`SHOWS` stand for."""
    folder = tmp_path_factory.mktemp("logs")
    name = HOSTILE.replace("/", "|")
    transactions = every_event(lambda text: text + HOSTILE)
    write_recording(folder / f"{name}.kvlog", transactions)
    write_recording(folder / f"{name}.other.kvlog", transactions[:100] + transactions[101:])
    write_recording(folder / f"{name}.broken.kvlog", broken(transactions))
    with living_ledger(NAME, transactions[:150]), living_ledger(f"{NAME}-broken", broken(transactions)):
        for ledger in (NAME, f"{NAME}-broken"):  # what an auditor leaves is there before each test
            kvledger("audit", ledger, "--once")
        with open_source(str(folder / f"{name}.broken.kvlog")) as source:
            guilty = source.last_state + 1
        yield {
            "guilty": f"event {guilty}",
            "log": str(folder / f"{name}.kvlog"),
            "other": str(folder / f"{name}.other.kvlog"),
            "broken": str(folder / f"{name}.broken.kvlog"),
            "ledger": NAME,
            "broken_ledger": f"{NAME}-broken",
            "request": f"first{HOSTILE}",
        }


def asked(text: str, logs: dict[str, str], new: Path) -> list[str]:
    """The words of a command line; the places in it filled in afterwards, so that nothing in them is split."""
    known = {**logs, "new": str(new), "live": "#1", "node": "1"}
    return [word.format_map(known) for word in text.split()]


def expect_harmless(text: str, what: object) -> None:
    for line in OWN.sub("", text).split("\n"):
        assert line.isprintable(), (what, line)
        assert not line.lstrip().startswith("forged"), (what, line)


def test_every_command_is_in_the_table() -> None:
    assert set(SHOWS) == set(commands())


@pytest.mark.parametrize("colours", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("command", sorted(SHOWS))
def test_no_command_prints_what_a_terminal_obeys(
    command: str, colours: bool, logs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a simulation that fails leaves a program
    everything = ""
    for number, text in enumerate(SHOWS[command]):
        words = asked(text, logs, tmp_path / f"{number}{HOSTILE}")
        code, out, err = kvledger(command, *words, colours=colours)
        assert code in (0, 1, 2), (text, code, out, err)
        expect_harmless(out, text)
        expect_harmless(err, text)
        if "--json" in words:
            for line in out.splitlines():
                json.loads(line)
            assert out.isascii() and "\x7f" not in out
        everything += out + err
    if command not in QUIET:
        assert LOUD in OWN.sub("", everything).replace("\\\\", "\\"), "it is shown as it is, not as markup"


@pytest.mark.parametrize("command", sorted(SHOWS))
def test_no_command_repeats_its_arguments_raw(command: str) -> None:
    for words in ([HOSTILE], [f"./{HOSTILE}"], [f"--{HOSTILE}"], ["x", HOSTILE, HOSTILE, HOSTILE, HOSTILE]):
        code, out, err = kvledger(command, *words)
        assert code == 2, (command, words, out, err)
        expect_harmless(out, command)
        expect_harmless(err, command)
        assert err.count("\n") == 1 and err.startswith("error "), err
    code, out, err = kvledger(command, "--json", HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    assert code == 2 and json.loads(out)["exit_code"] == 2 and out.isascii()


def test_files_for_other_tools_do_not_reach_a_terminal_raw(logs: dict[str, str], tmp_path: Path) -> None:
    for format in ("csv", "jsonl"):
        path = tmp_path / format
        assert kvledger("export", logs["log"], str(path), "--to", format)[0] == 0
        text = path.read_text()
        expect_harmless(text.replace("\r\n", "\n"), format)
        assert LOUD in text.replace("\\\\", "\\")


def test_pushes_are_listed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    push = pushes.Push(1, HOSTILE, HOSTILE, 3, 4, 1_767_265_200 * 10**9, None, "failed", HOSTILE)
    monkeypatch.setattr(pushes, "pushes", lambda name: [push])
    for colours in (False, True):
        code, out, err = kvledger("pushes", "prefill", colours=colours)
        assert (code, err) == (0, "") and OWN.sub("", out).count("loud[/bold red][/]:smile:") == 3
        expect_harmless(out, "pushes")
    code, out, _ = kvledger("pushes", "prefill", "--json")
    assert json.loads(out)["request"] == HOSTILE and out.isascii() and "\x7f" not in out


def test_the_page_gets_nothing_that_is_not_shown(logs: dict[str, str]) -> None:
    """Its script makes text of everything; what reverses text or begins lines there has to be escaped before."""

    def texts(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for part in (*value, *value.values()):
                yield from texts(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from texts(part)

    with open_source(logs["broken"]) as source:
        log = Log(source)
        answers = [log.summary(), log.events(1, log.last), log.explain("request", 1, 100)]
        answers += [log.explain(tier, 3, 100) for tier in ("device", "host")]
        found = [text for answer in answers for text in texts(answer)]
    assert not [text for text in found if not text.isprintable()]
    assert [text for text in found if LOUD in text.replace("\\\\", "\\")]


def test_a_name_never_becomes_code(logs: dict[str, str], tmp_path: Path) -> None:
    """``shrink`` writes a program; names, of requests and of the file, stay text in it."""
    evil = '""" + open("made", "w").name + """'
    log = tmp_path / f"{evil}.kvlog"
    write_recording(log, broken(every_event(lambda text: text + evil)))
    code, _, err = kvledger("shrink", str(log), "-o", str(tmp_path / "test_it.py"), "--predicate", "len(requests) > 3")
    assert code == 1 and "contradicts itself" in err  # and what was asked for is made
    tree = ast.parse((tmp_path / "test_it.py").read_text())
    assert evil in (ast.get_docstring(tree) or "")
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "open" not in called and "predicate" in called


def test_nothing_prints_past_the_one_module_that_may() -> None:
    """No ``print``, no console, no markup and no JSON but those of ``kvledger.cli.terminal``."""
    import kvledger.cli

    for path in sorted(Path(kvledger.cli.__file__).parent.glob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("print", "Console", "json.dumps", "Text.from_markup", "typer.echo"), (
                    f"{path.name}:{node.lineno}: {called}"
                )


CONTRADICTED = {
    "audit": ["{broken_ledger} --once", "{broken_ledger} --once --json"],
    "bisect": ["{broken} --predicate len(requests)>0 --json", "{broken} --predicate False"],
    "check": ["{broken}", "{broken} --json", "{broken_ledger}"],
    "diff": ["{broken} {broken} --json", "{broken}@100 {log}@100", "{log}@100 {broken}@100"],
    "events": ["{broken_ledger} --endpoint ipc://{new} --replay-endpoint="],
    "explain": ["{broken} block 3", "{broken} request #1 --json", "{broken_ledger} transfer 1"],
    "export": ["{broken} {new} --to csv", "{broken_ledger} {new} --to jsonl"],
    "leaks": ["{broken}", "{broken} --at 100 --json"],
    "misses": ["{broken}", "{broken} --from 50 --json", "{broken_ledger}"],
    "log": ["{broken}", "{broken} --from 1 --to 9", "{broken_ledger} --kind Worker", "{broken_ledger} --json"],
    "record": ["{broken_ledger} {new} --once"],
    "redact": ["{broken} {new}"],
    "replay": ["{broken}", "{broken} --decide", "{broken} --to 50 --json"],
    "show": ["{broken}", "{broken} --at 50 --json", "{broken} --at 200", "{broken} --at 200 --json", "{broken_ledger}"],
    "shrink": ["{broken} -o {new} --predicate len(requests)>3"],
    "spans": ["{broken_ledger}"],
    "top": ["{broken_ledger} --once", "{broken_ledger} --json"],
    "view": ["{broken} --export {new}"],
    "what-if": ["{broken}", "{broken} --curve --json"],
}
ABOUT_NO_LOG = {"doctor", "pushes", "run", "segments", "simulate", "size"}


def test_every_command_that_reads_a_log_is_in_the_table() -> None:
    assert {*CONTRADICTED, "metrics"} | ABOUT_NO_LOG == set(commands())


@pytest.mark.parametrize("command", sorted(CONTRADICTED))
def test_every_command_says_that_a_log_contradicts_itself(command: str, logs: dict[str, str], tmp_path: Path) -> None:
    if command == "events":
        pytest.importorskip("zmq")
    for number, text in enumerate(CONTRADICTED[command]):
        words = asked(text, logs, tmp_path / f"new{number}")
        code, out, err = kvledger(command, *words)
        assert code == 1, (text, code, out, err)
        assert re.search(rf"^FAILED .*{logs['guilty']}: ", err, re.MULTILINE), (text, out, err)
        if "--json" in words and command not in ("audit", "diff", "log", "top"):
            found = json.loads(out.splitlines()[-1])
            assert logs["guilty"] in str(found.get("contradiction") or found.get("error") or found["violation"]), found


NAMES_OF_OURS = {
    *("self.name", "self.ledger", "self.ledger.name", "self._ledger.name", "self._ledger", "self._name"),
    *("self._manager.name", "ledger.name", "ledger", "name"),
}
"""Of ledgers and signals, looked at when they are given."""


def test_log_messages_are_one_line() -> None:
    """What stands in ``%s`` is a name of ours, or goes through :mod:`kvledger.text`; ``%r`` escapes by itself."""
    import kvledger

    looked_at = 0
    for path in sorted(Path(kvledger.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        safe = {
            ast.unparse(target)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("printable(", "logged("))
            for target in node.targets
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_log.")):
                continue
            constants = [place for place, arg in enumerate(node.args) if isinstance(arg, ast.Constant)]
            if not constants:
                continue
            text, *values = node.args[constants[0] :]
            for kind, value in zip(re.findall(r"%(\w)", ast.literal_eval(text)), values):
                looked_at += 1
                said = ast.unparse(value)
                fine = said in NAMES_OF_OURS | safe or said.startswith(("printable(", "logged(", "outcome.name"))
                fine |= path.name in ("notices.py", "raw_blocks.py")
                assert kind != "s" or fine, f"{path}:{node.lineno}: {said}"
    assert looked_at > 15


def test_a_notice_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "kvledger.manager.notices"):
        notices.log_notice(30, "worker_lost", ledger="a", reason=HOSTILE)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.isprintable() and message.startswith('worker_lost ledger=a reason="job\\u001b]0;')


def test_metrics_are_served_on_and_the_contradiction_is_told(logs: dict[str, str]) -> None:
    command = [sys.executable, "-m", "kvledger.cli", "metrics", logs["broken_ledger"], "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 1
    assert any(text.startswith("FAILED ") and f"at {logs['guilty']}," in text for text in lines), lines


def test_printable() -> None:
    assert printable("Grüße, 東京 [bold]") == "Grüße, 東京 [bold]"
    assert printable("a\x1b[2J\n\u202eb\ud800\x85") == "a\\x1b[2J\\n\\u202eb\\ud800\\x85"
    for number in range(sys.maxunicode + 1):
        shown = printable(chr(number))
        assert shown.isprintable() and printable(shown) == shown
    shown.encode()
