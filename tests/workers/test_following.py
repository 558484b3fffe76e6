"""Commands that follow a ledger: how they end, and what they say about what they cannot follow."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from kvledger import CacheConfig, CacheManager
from kvledger.cli import app
from kvledger.cli.interrupts import until_asked
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from tests.waiting import PATIENCE_S

STOPS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def ledger() -> Iterator[str]:
    with CacheManager.create(f"followed-{os.getpid()}", CacheConfig(device_blocks=64)) as manager:
        manager.admit("a", np.arange(40, dtype=np.int32))
        yield manager.name


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "x.kvlog"
    Run(sample.generate(5), RunOptions(data=False, record=path)).execute(f"recorded-{os.getpid()}")
    return path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvledger.cli", *arguments]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # as users have it: what goes into a pipe waits to be flushed
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)


def refused(*arguments: object, **environment: str) -> str:
    """The one line that a command says about bad input."""
    done = subprocess.run(
        [sys.executable, "-m", "kvledger.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **environment},
    )
    assert done.returncode == 2 and not done.stdout, done
    assert done.stderr.startswith("error ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("command", "begins"),
    [
        (("log", "LEDGER", "--follow"), "       1 "),
        (("view", "LEDGER"), "http://127.0.0.1"),
        (("metrics", "LEDGER", "--port", "0"), "serving http"),
        (("spans", "LEDGER", "--endpoint", "http://127.0.0.1:9/v1/traces"), "following "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_to_be_asked_to_end_is_no_failure(
    command: tuple[str, ...], begins: str, stop: signal.Signals, ledger: str
) -> None:
    with start(*(word.replace("LEDGER", ledger) for word in command)) as process:
        assert process.stdout is not None and process.stderr is not None
        output = process.stderr if begins[0] in "sf" else process.stdout
        assert output.readline().startswith(begins)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 and "Traceback" not in errors, errors


@pytest.mark.parametrize("stop", STOPS)
def test_at_any_moment(stop: signal.Signals) -> None:
    """Also while a follower only reads what there is."""

    def ask(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)
        signal.pause()

    before = [signal.getsignal(number) for number in STOPS]
    with pytest.raises(typer.Exit) as ended, until_asked():
        ask(stop)
    assert ended.value.exit_code == 0 and [signal.getsignal(number) for number in STOPS] == before
    with pytest.raises(typer.Exit) as ended, until_asked():
        raise typer.Exit(2)
    assert ended.value.exit_code == 2, "what failed, failed"
    with pytest.raises(KeyboardInterrupt), until_asked(follows=False):
        ask(signal.SIGINT)


def test_what_ends_by_itself_is_interrupted(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["kvledger.cli.log"], "select", interrupted)
    assert CliRunner().invoke(app, ["log", str(recording)]).exit_code == 130


@pytest.mark.parametrize(
    "command", [("audit",), ("metrics",), ("spans",), ("record", "OUT")], ids=lambda words: words[0]
)
def test_a_name_that_is_no_ledger(command: tuple[str, ...], recording: Path, tmp_path: Path) -> None:
    name, *more = (word.replace("OUT", str(tmp_path / "out.kvlog")) for word in command)
    for wrong in ("nosuch", "no/such", "[/bold]"):
        assert "kvledger segments lists what is there" in refused(name, wrong, *more)
    assert f"{recording} is a recording, not a ledger: kvledger check" in refused(name, recording, *more)
    assert not (tmp_path / "out.kvlog").exists()


def test_a_ledger_is_recorded_before_it_is_redacted(ledger: str, recording: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    told = refused("redact", ledger, tmp_path / "out.kvlog", "--key-file", key)
    assert f"{ledger} is a ledger, not a recording: record it first (kvledger record {ledger} FILE.kvlog)" in told
    assert not key.exists()
    assert "cannot read absent: No such file" in refused("redact", "absent", tmp_path / "out.kvlog")
    told = refused("redact", recording, recording)
    assert told == f"error {recording} exists: remove it, or choose another name\n"


def test_what_is_wrong_with_where_to_listen(ledger: str) -> None:
    for address in ("192.0.2.1", "nonsense.invalid", "a" * 70):
        told = refused("metrics", ledger, "--address", address)
        assert f"cannot listen on --address {address}: " in told and "--port" not in told
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused("metrics", ledger, "--port", port)
        assert f"port {port} is in use; choose another --port" in told


def test_spans_are_sent_somewhere_or_not_at_all(ledger: str) -> None:
    for wrong in ("foo", "foo:4318", "grpc://here:4317", "http://", "http://:4318", "http://a:b", "http://a:99999", ""):
        assert f"--endpoint {wrong!r} is no URL of a collector" in refused("spans", ledger, "--endpoint", wrong)
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        assert f"{name} 'foo' is no URL of a collector" in refused("spans", ledger, **{name: "foo"})
