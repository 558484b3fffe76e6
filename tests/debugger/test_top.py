"""``kvledger top`` beside a real manager: what it shows, that nobody notices it, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from typer.testing import CliRunner

from ipc import Control
from kvledger import CacheConfig, CacheManager, HostPolicy, OutOfBlocks
from kvledger.cli import app
from kvledger.debugger import SourceError, top
from kvledger.debugger.top import Top
from statemachine.events import Tier
from statemachine.state.ownership import owners
from statemachine.state.state import State
from tests.waiting import PATIENCE_S, wait_until

CONFIG = CacheConfig(
    block_size=4, device_blocks=32, host_blocks=64, host_policy=HostPolicy.EXCLUSIVE, ranks=2, layers=1, block_bytes=64
)


def name() -> str:
    return f"top-{os.getpid()}"


def tokens(start: int, count: int) -> np.ndarray:
    return np.arange(start, start + count, dtype=np.int32)


def serve(manager: CacheManager, key: str, prompt: np.ndarray) -> None:
    manager.admit(key, prompt)
    manager.wait(key)
    manager.cache(key)
    manager.release(key)


@contextmanager
def watched(manager: CacheManager) -> Iterator[Top]:
    observer = Top(manager.name)
    try:
        yield observer
    finally:
        observer.close()


def by_owner(state: State, tier: Tier) -> dict[str, int]:
    sums = dict.fromkeys(("free", "cached", "private", "in_flight"), 0)
    kinds = {"free": "free", "run": "cached", "request": "private"}
    for owner, ids in owners(state, state.place(tier)):
        sums[kinds.get(owner.split()[0], "in_flight")] += len(ids)
    return sums


@pytest.fixture
def within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this process logs and looks at happens at one moment, however long it takes."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)


@pytest.mark.usefixtures("within_a_minute")
def test_a_frame_says_what_the_manager_knows() -> None:
    with CacheManager.create(name(), CONFIG) as manager:
        for number in range(6):
            serve(manager, f"r{number}", tokens(1000 * number, 40))
        with watched(manager) as observer:
            serve(manager, "again", tokens(0, 40))  # swapped out by now
            manager.admit("old", tokens(7000, 16), blocks=6)
            manager.wait("old")
            manager.cache("old", 4)
            manager.admit("young", tokens(8000, 16))
            with pytest.raises(OutOfBlocks):
                manager.allocate({"old": 1000})
            wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
            control = Control.open(manager.name)
            readers = len(control.readers())
            control.close()
            assert observer.poll() > 0
            frame = observer.frame()
            stats = manager.stats()
            assert frame.sequence == manager.next_sequence - 1 and frame.writer == os.getpid() and frame.writer_alive
            for tier, pool in ((Tier.DEVICE, frame.device), (Tier.HOST, frame.host)):
                assert (
                    pool._asdict() == by_owner(manager.state, tier) and pool.total == manager.state.pool(tier).capacity
                )
            assert frame.device.private > 0 and frame.host.cached > 0
            hits = (stats["queried_blocks"], stats["device_hit_blocks"], stats["host_hit_blocks"])
            assert frame.total == hits == frame.minute and frame.total.host > 0
            assert (frame.requests, frame.refusals, frame.refusals_minute) == (2, 1, 1)
            assert frame.oldest is not None and frame.oldest.key == "old" and frame.oldest.blocks == 6
            assert frame.oldest.age_s is not None and frame.oldest.age_s >= 0
            assert sum(frame.evicted_minute) == stats["device_evicted_blocks"] + stats["host_evicted_blocks"] > 0
            assert {reader.name for reader in frame.readers} == {"transfer 0", "transfer 1"}
            assert all(reader.alive and reader.heartbeat_s is not None for reader in frame.readers)
            assert readers == 2  # the observer has no line of its own
            manager.release("old")
            observer.poll()
            frame = observer.frame()
            assert frame.oldest is not None and frame.oldest.key == "young"
            assert not observer.ended


def test_transfers_in_flight_and_readers_that_lag() -> None:
    with CacheManager.create(name(), CONFIG) as manager:
        for number in range(4):
            serve(manager, f"r{number}", tokens(1000 * number, 40))
        wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
        assert manager._ranks is not None
        pids = [manager._ranks.supervisor.pid(rank) for rank in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            admission = manager.admit("late", tokens(0, 41))
            assert not admission.ready
            with watched(manager) as observer:
                frame = observer.frame()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        assert frame.waiting == 1 and frame.oldest is not None and frame.oldest.waits
        assert {one.direction for one in frame.transfers} >= {"swap_in"}
        assert all(one.age_s is not None and one.blocks for one in frame.transfers)
        assert [reader.lag > 0 for reader in frame.readers] == [True, True]
        manager.wait("late")


@pytest.mark.usefixtures("within_a_minute")
def test_overrun_goes_on_from_the_newest_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipc import Overrun

    with (
        CacheManager.create(name(), CacheConfig(block_size=4, device_blocks=32)) as manager,
        watched(manager) as observer,
    ):
        serve(manager, "a", tokens(0, 40))

        def overrun(timeout: float = 0.0) -> list[object]:
            raise Overrun(manager.name, 1, 5)

        monkeypatch.setattr(observer._tail, "poll", overrun)
        assert observer.poll() == 0
        assert observer.frame().sequence == manager.next_sequence - 1
        assert observer.frame().total == observer.frame().minute == (10, 0, 0)


def test_one_frame_as_text_and_as_json() -> None:
    with CacheManager.create(name(), CONFIG) as manager:
        serve(manager, "a", tokens(0, 40))
        manager.admit("b", tokens(0, 41))
        before = manager.next_sequence
        shown = CliRunner().invoke(app, ["top", manager.name, "--once"])
        assert shown.exit_code == 0, shown.output
        assert "request 'b'" in shown.stdout and "transfer 1" in shown.stdout and "50.0%" in shown.stdout
        assert all(len(line) <= 80 for line in shown.stdout.splitlines())
        found = json.loads(CliRunner().invoke(app, ["top", manager.name, "--json"]).stdout)
        assert found["device"]["cached"] == 10 and found["total"] == {"asked": 20, "device": 10, "host": 0}
        assert manager.next_sequence == before


@pytest.mark.parametrize("way", ["q", "ctrl-c", "sigterm", "the ledger ends"])
def test_it_ends_cleanly(way: str) -> None:
    """In a terminal of its own."""
    manager = CacheManager.create(name(), CacheConfig(block_size=4, device_blocks=32))
    ours, theirs = pty.openpty()
    try:
        serve(manager, "a", tokens(0, 40))
        command = [sys.executable, "-m", "kvledger.cli", "top", manager.name]
        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(theirs)
        shown = _read(ours, b"in all")
        if way == "q":
            os.write(ours, b"q")
        elif way == "the ledger ends":
            manager.close()
        else:
            process.send_signal(signal.SIGINT if way == "ctrl-c" else signal.SIGTERM)
        shown += _read(ours, b"never shown")
        assert process.wait(PATIENCE_S) == 0, shown
        assert b"Traceback" not in shown and shown.count(b"\x1b[?1049h") == shown.count(b"\x1b[?1049l") == 1
        assert (b"has ended" in shown) == (way == "the ledger ends")
    finally:
        manager.close()
        os.close(ours)


def _read(terminal: int, until: bytes) -> bytes:
    """What a terminal shows until then, or until its program ends."""
    shown = b""
    deadline = time.monotonic() + PATIENCE_S
    while until not in shown:
        assert time.monotonic() < deadline, (until, shown)
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                break
    return shown


def test_wrong_input() -> None:
    with pytest.raises(SourceError, match="neither"):
        Top("no-such-ledger")
    for argument, message in (("no-such-ledger", "neither a .kvlog file nor a ledger"), ("x/y.kvlog", "recording")):
        done = CliRunner().invoke(app, ["top", argument])
        assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_sums_of_the_last_minute() -> None:
    minute = top._Minute(1)
    for second in (0, 30, 59, 61, 100):
        minute.add(second * 10**9, 1)
    assert [minute.sums(now * 10**9)[0] for now in (100, 119, 120, 161)] == [3, 3, 2, 0]
    assert minute.sums(100 * 10**9, 10) == [1]
