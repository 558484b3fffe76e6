"""An error in the middle of a call, a signal handler that raises, a fork: nothing is forgotten or done by halves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipc import LogReader, SharedMemoryFull, TooManyFiles, segment
from ipc.names import SHM
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy, InvalidCommand, ManagerClosed, UnknownRequest
from kvledger.handoff.sender import Sender
from kvledger.manager import forks
from kvledger.manager.transactions import Transactions
from statemachine.check import check
from statemachine.events import RequestReleased, TransferFinished, WorkerJoined, WorkerLost
from statemachine.records.replay import Replay
from statemachine.records.snapshot import state_digest
from tests.adapters.fastdeploy_engine import manager as drop_in
from tests.adapters.fastdeploy_engine import serve
from tests.conftest import ours
from tests.waiting import PATIENCE_S, wait_until
from workers.processes import supervisor

ROOT = Path(__file__).parents[2]
BLOCK = 4
TOKENS = np.arange(4 * BLOCK, dtype=np.int32)


@pytest.fixture
def name() -> Iterator[str]:
    name = f"interrupted-{os.getpid()}"
    yield name
    remove_objects(name)


def config(ranks: int = 1, **more: Any) -> CacheConfig:
    sizes = {"block_size": BLOCK, "device_blocks": 8, "host_blocks": 16, "host_policy": HostPolicy.EXCLUSIVE}
    return CacheConfig(**{**sizes, "ranks": ranks, "block_bytes": 16, "checksums": True, **more})


def fails_once(
    patch: pytest.MonkeyPatch, owner: Any, attribute: str, error: BaseException, when: Any = None
) -> list[Any]:
    """The next call of ``owner.attribute`` (for which ``when`` holds) raises. Returns a list, empty after it."""
    real, left = getattr(owner, attribute), [error]

    def failing(*arguments: Any, **options: Any) -> Any:
        if left and (when is None or when(*arguments)):
            raise left.pop()
        return real(*arguments, **options)

    patch.setattr(owner, attribute, failing)
    return left


def unlogged(patch: pytest.MonkeyPatch, kind: type) -> list[Any]:
    """The next transaction with such an event finds no room."""
    full = SharedMemoryFull("planted")
    return fails_once(patch, Transactions, "commit", full, lambda _, events, *rest: type(events[-1]) is kind)


@pytest.mark.parametrize("where", ["stage", "publish"])
def test_a_signal_handler_that_raises_ends_the_manager_and_not_the_ledger(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = CacheManager.create(name, CacheConfig(device_blocks=100))
    manager.admit("a", [1] * 64)
    fails_once(monkeypatch, manager._writer, where, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        manager.cache("a")
    with pytest.raises(ManagerClosed, match=r"not finished.*reopen"):
        manager.release("a")
    manager.close(keep=True)
    with CacheManager.open(name) as again:
        assert not check(again.state) and not again.state.requests


def swapped(manager: CacheManager, keys: str) -> None:
    """One prompt per key, cached and pushed out to the host."""
    for number, key in enumerate(keys):
        manager.admit(key, TOKENS + 100 * number, max_blocks=4)
        manager.cache(key)
        manager.release(key)
    manager.make_room(8)
    wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)


def test_what_a_pause_has_seen_the_next_poll_reports(name: str) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        assert not manager.admit("b", TOKENS, max_blocks=3).ready
        manager.pause()
        assert manager.ready("b")
        manager.resume()
        assert [progress.request_id for progress in manager.poll()] == ["b"]
        assert not manager.poll()


def test_what_was_seen_before_an_error_is_reported_after_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "ab")
        for node in manager.state.nodes.values():
            assert node.host is not None
            manager.pools[0].host[node.host.ids[1]] ^= 1
        pid = manager.worker_pid(0)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        for number, key in enumerate("cd"):
            assert not manager.match(key, TOKENS + 100 * number, max_blocks=4).ready
        left = fails_once(
            monkeypatch,
            Transactions,
            "commit",
            SharedMemoryFull("planted"),
            lambda _, events, *rest: isinstance(events[-1], TransferFinished) and events[-1].transfer % 2 == 0,
        )
        os.kill(pid, signal.SIGCONT)
        reported: dict[str, bool] = {}

        def all_reported() -> bool:
            try:
                reported.update((progress.request_id, progress.shortened) for progress in manager.poll())
            except SharedMemoryFull:
                assert not left
            return len(reported) == 2

        wait_until("both requests are reported", all_reported)
        assert reported == {"c": True, "d": True} and not left
        assert manager.cached_blocks("c") == manager.cached_blocks("d") == 1


def test_who_waits_takes_only_its_own_news(name: str) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        for key in "bcd":
            assert not manager.match(key, TOKENS, max_blocks=4).ready
        assert manager.wait("b").request_id == "b"
        assert asyncio.run(manager.wait_async("c")).request_id == "c"
        assert [progress.request_id for progress in manager.poll()] == ["d"]


def test_who_waits_hears_of_a_release(name: str) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        worker = manager.worker_pid(0)
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)  # it must not be ready before it is released
        manager.match("b", TOKENS, max_blocks=4)

        async def released_meanwhile() -> None:
            waiting = asyncio.create_task(manager.wait_async("b"))
            await asyncio.sleep(0)
            manager.release("b")
            manager.match("b", TOKENS + 500)  # another request of that name
            with pytest.raises(UnknownRequest, match="released while somebody waited"):
                await waiting

        try:
            asyncio.run(released_meanwhile())
        finally:
            os.kill(worker, signal.SIGCONT)


def test_nobody_waits_for_a_request_that_was_released(name: str) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        manager.match("b", TOKENS, max_blocks=4)
        wait_until("the request is ready", lambda: manager.ready("b"), meanwhile=manager.fold)
        manager.release("b")
        assert manager.poll() == []


@pytest.mark.parametrize("kind", [WorkerJoined, WorkerLost])
def test_a_worker_that_cannot_be_logged_is_logged_later(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        left = unlogged(monkeypatch, kind)
        pid = manager.worker_pid(0)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SharedMemoryFull):
            wait_until("the planted lack of room is met", manager.poll)
        assert not left
        manager.match("b", TOKENS, max_blocks=4)
        manager.wait("b", timeout=PATIENCE_S)
        assert manager.cached_blocks("b") == 4 and manager.state.workers == {0: 2}


def test_a_worker_whose_leavings_cannot_be_removed_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        left = fails_once(monkeypatch, supervisor, "remove_objects", TooManyFiles("planted"))
        pid = manager.worker_pid(0)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        manager.match("b", TOKENS, max_blocks=4)
        manager.wait("b", timeout=PATIENCE_S)
        assert not left and manager.state.workers == {0: 2}
        assert manager.worker_pid(0) not in (None, pid)
    for left_behind in [each for each in os.listdir(SHM) if each.removeprefix("sem.").startswith(f"{name}.rank")]:
        os.unlink(SHM / left_behind)


def test_releases_from_other_threads_wait_for_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, CacheConfig(device_blocks=100)) as manager:
        for key in "abc":
            manager.admit(key, [1, 2, 3])
        thread = threading.Thread(target=lambda: [manager.release(key) for key in "abc"])
        thread.start()
        thread.join()
        unlogged(monkeypatch, RequestReleased)
        with pytest.raises(SharedMemoryFull):
            manager.poll()
        assert len(manager.state.requests) == 3
        manager.poll()
        assert not manager.state.requests


def test_an_error_of_the_writers_thread_is_no_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = CacheConfig(block_size=BLOCK, device_blocks=100, segment_bytes=64 << 10)
    with CacheManager.create(name, settings) as manager:
        left = fails_once(monkeypatch, segment, "create", OSError(5, "planted"))
        for number in range(600):
            manager.admit(str(number), TOKENS + number)
            manager.cache(str(number))
            manager.release(str(number))
        assert not left and manager._writer.rotations > 3


def test_what_fails_to_close_keeps_nothing_else_from_it(name: str) -> None:
    manager = CacheManager.create(name, config())
    pid = manager.worker_pid(0)

    class Stubborn:
        def close(self, *, keep: bool) -> None:
            raise OSError("planted")

    manager._handoffs.append(Stubborn())  # type: ignore[arg-type]
    with pytest.raises(OSError, match="planted"):
        manager.close()
    assert pid is not None and not os.path.exists(f"/proc/{pid}")
    assert not [each for each in os.listdir(SHM) if name in each]


def test_a_forked_child_neither_writes_nor_ends_what_is_its_parents(name: str) -> None:
    with CacheManager.create(name, config()) as manager:
        manager.admit("a", TOKENS)
        before, objects = manager.digest(), {each for each in os.listdir(SHM) if name in each}
        child = os.fork()
        if not child:
            refused = 0
            try:
                with manager:
                    for call in (lambda: manager.admit("b", TOKENS), manager.poll, lambda: manager.release("a")):
                        try:
                            call()
                        except ManagerClosed:
                            refused += 1
            finally:
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert manager.digest() == before and {each for each in os.listdir(SHM) if name in each} == objects
        manager.cache("a")
        manager.release("a")
        swapped(manager, "c")


_PARENT = """
import os, sys, time
from kvledger import CacheConfig, CacheManager
manager = CacheManager.create(sys.argv[1], CacheConfig(device_blocks=8))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_ledger_can_be_opened_while_a_fork_of_its_dead_engine_lives(name: str) -> None:
    engine = subprocess.Popen([sys.executable, "-c", _PARENT, name], stdout=subprocess.PIPE, cwd=ROOT)
    assert engine.stdout is not None
    child = int(engine.stdout.readline())
    try:
        engine.kill()
        engine.wait()
        with CacheManager.open(name) as manager:
            assert manager.state.epoch == 2
    finally:
        os.kill(child, signal.SIGKILL)
        engine.stdout.close()


def test_a_fork_ends_no_sender_and_no_drop_in(name: str) -> None:
    """Nor with what the drop-in does at the exit of its process."""
    with CacheManager.create(name, config()) as manager, drop_in(gpu=4, cpu=4) as it:
        sender = Sender(manager)
        objects = ours()
        child = os.fork()
        if not child:
            worked = 0
            try:
                sender.close()
                it.close()
                sender.poll()
                worked = 7
            finally:
                os._exit(worked)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert ours() == objects and any(it.ledger in each for each in objects)
        pusher = sender.pid(0)
        assert pusher is not None and os.path.exists(f"/proc/{pusher}")
        assert serve(it, "a", [1, 2, 3, 4])


def test_a_fork_closes_no_file_of_somebody_else(name: str) -> None:
    """The descriptor of a ledger that was given up belongs to another file by then."""
    manager = CacheManager.create(name, config())
    supervised = manager._ranks
    assert supervised is not None
    number = manager._writer._control._lock.fd
    manager._writer.close()
    other = os.open("/dev/null", os.O_RDONLY)
    try:
        os.dup2(other, number)
        manager.disown()
        os.fstat(number)
    finally:
        os.close(number)
        if other != number:
            os.close(other)
        supervised.stop()
        forks.unwatch(manager)


class Alarm(BaseException):
    """What a signal handler raises."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # rung in a callback of the collector
def test_calls_interrupted_at_any_moment(name: str) -> None:
    """By an alarm clock: either the manager says that it has to be opened anew, or log and state are the same."""
    armed = False

    def ring(*_: object) -> None:
        if armed:
            raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    rng = random.Random(0)
    closed = sound = 0
    settings = CacheConfig(block_size=BLOCK, device_blocks=100, segment_bytes=64 << 10, retain_bytes=None)
    try:
        for number in range(250):
            ledger = f"{name}-{number}"
            with CacheManager.create(ledger, settings) as manager:
                with contextlib.suppress(Alarm):
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-4, 1.2e-3))
                    for turn in range(1000):
                        manager.admit(str(turn), TOKENS + turn)
                        manager.cache(str(turn))
                        manager.release(str(turn))
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                try:
                    manager.poll()
                except ManagerClosed:
                    closed += 1
                    continue
                for key in list(manager.state.numbers):
                    manager.release(key)
                reader = LogReader(ledger)
                replay = Replay(check_every=1000)
                while records := reader.poll():
                    replay.feed(records)
                reader.close()
                assert state_digest(replay.state) == manager.digest() and not check(manager.state)
                sound += 1
            assert not [each for each in os.listdir(SHM) if ledger in each]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert closed and sound


def test_what_a_request_was_about_is_not_guessed_after_an_interruption(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next tokens would be published behind the wrong ones."""
    with CacheManager.create(name, CacheConfig(block_size=BLOCK, device_blocks=100)) as manager:
        manager.admit("a", [1, 2, 3], blocks=5)
        with pytest.raises(InvalidCommand):
            manager.cache("a", 9, generated=[4])  # refused: nothing has changed
        real = manager._execute

        def late(command: Any) -> Any:
            real(command)
            raise Alarm

        with monkeypatch.context() as patch:
            patch.setattr(manager, "_execute", late)
            with pytest.raises(Alarm):
                manager.cache("a", generated=[4, 5, 6])
        assert manager.cached_blocks("a") == 1 and manager.peek([1, 2, 3, 4], max_blocks=99) == (1, 0)
        with pytest.raises(InvalidCommand, match="the last tokens of request 'a' are not known"):
            manager.cache("a", generated=[7, 8])
        manager.release("a")


def test_a_transfer_whose_order_was_interrupted_ends_all_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, config()) as manager:
        swapped(manager, "a")
        assert manager._ranks is not None
        fails_once(monkeypatch, manager._ranks, "started", Alarm())
        with pytest.raises(Alarm):
            manager.match("b", TOKENS, max_blocks=4)
        (request,) = manager.state.requests.values()
        wait_until("the request waits for nothing", lambda: not request.waits_for, meanwhile=manager.fold)
        manager.release("b")
        assert not manager.state.transfers and not manager._ranks._orders
