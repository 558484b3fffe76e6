"""A scheduler step is one transaction: seen whole or not at all, by readers, by a successor, by the debugger."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ipc import LogReader, SharedMemoryFull
from ipc.ownership import remove_objects
from ipc.record import CALL_BEGIN, TXN_BEGIN, TXN_END
from kvledger import (
    CacheConfig,
    CacheManager,
    CallTooLarge,
    HostPolicy,
    InvalidCommand,
    InvariantViolation,
    ManagerClosed,
    OutOfBlocks,
    WrongThread,
)
from kvledger.debugger.source import open_source
from kvledger.debugger.source.replay import decisions
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.manager import transactions
from kvledger.run.pattern import PatternEngine
from statemachine.check import check
from statemachine.events import RequestReleased
from tests.manager.test_manager import replays, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture
def name() -> Iterator[str]:
    name = f"step-{os.getpid()}"
    yield name
    remove_objects(name)


def tokens(blocks: int, seed: int = 0) -> np.ndarray:
    return np.arange(4 * blocks, dtype=np.int32) + 10_000 * seed


def last_event(name: str) -> int:
    reader = LogReader(name)
    last = reader.poll()[-1].sequence
    reader.close()
    return last


CONFIG = CacheConfig(block_size=4, device_blocks=16)


def test_a_step_is_one_transaction_that_nobody_sees_before_its_end(name: str) -> None:
    published = []
    with CacheManager.create(name, CONFIG) as manager:
        reader = LogReader(name)
        reader.poll()
        manager.on_published(lambda: published.append(manager.next_sequence))
        with manager.step(7):
            manager.admit("a", tokens(2))
            manager.cache("a")
            manager.admit("b", tokens(3))
            with pytest.raises(OutOfBlocks):
                manager.admit("c", tokens(17, 1))
            manager.release("a")
            assert not reader.poll() and not published
        records = reader.poll()
        assert len(published) == 1 and records and {record.step for record in records} == {7}
        assert [record.flags & TXN_BEGIN for record in records] == [TXN_BEGIN] + [0] * (len(records) - 1)
        assert [record.flags & TXN_END for record in records] == [0] * (len(records) - 1) + [TXN_END]
        assert sum(bool(record.flags & CALL_BEGIN) for record in records) == 4
        assert replays(manager)
        manager.admit("d", tokens(1, 2))  # each call stands alone again
        assert len(published) == 2
        reader.close()


def test_the_debugger_sees_the_calls_of_a_step_one_by_one(name: str) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        for number in range(12):
            with manager.step(number):
                manager.admit(f"r{number}", tokens(3, number % 5))
                manager.cache(f"r{number}")
                manager.allocate({f"r{number}": 1})
                if number > 2:
                    manager.release(f"r{number - 3}", final=number % 2 == 0)
        with open_source(name) as source:
            found = list(decisions(source, 1, source.last))
            assert found and all(decision.same for decision in found)
            assert {type(decision.command).__name__ for decision in found} == {"Admit", "Cache", "Allocate", "Release"}
            starts = [entries[0].sequence for entries in source.transactions(1)]
            assert [entries[0].sequence for entries in source.transactions(starts[5])] == starts[5:]
            assert [entries[0].sequence for entries in source.transactions(1, starts[5] - 1)] == starts[:5]


DIES_INSIDE = """
import os, signal, sys
import numpy as np
from kvledger import CacheConfig, CacheManager
manager = CacheManager.create(sys.argv[1], CacheConfig(block_size=4, device_blocks=16))
with manager.step(1):
    manager.admit("a", np.arange(16, dtype=np.int32))
    manager.cache("a")
    manager.release("a")
print(manager.next_sequence, flush=True)
with manager.step(2):
    for number in range(5):  # evicts what the first step has cached
        manager.admit(f"r{number}", np.arange(12, dtype=np.int32) + 100 * number)
    assert manager.stats()["device_evicted_blocks"]
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_step_in_which_the_engine_dies_has_not_begun(name: str) -> None:
    died = subprocess.run([sys.executable, "-c", DIES_INSIDE, name], cwd=ROOT, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert last_event(name) == int(died.stdout) - 1
    with CacheManager.open(name) as manager:
        assert manager.peek(tokens(4), max_blocks=99) == (4, 0) and not manager.stats()["device_evicted_blocks"]
        assert manager.stats()["requests"] == 1 and replays(manager)


def test_an_exception_that_leaves_a_step_undoes_nothing(name: str) -> None:
    with CacheManager.create(name, CONFIG) as manager:

        def broken() -> None:
            with manager.step(1):
                manager.admit("a", tokens(2))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            broken()
        assert list(manager.state.numbers) == ["a"] and replays(manager)
        with pytest.raises(OutOfBlocks), manager.step(2):
            manager.admit("b", tokens(99))
        assert replays(manager)


def test_what_outgrows_a_transaction_is_published_in_parts(name: str) -> None:
    config = CacheConfig(block_size=4, device_blocks=8192, segment_bytes=64 << 10)
    with CacheManager.create(name, config) as manager:
        published = []
        manager.on_published(lambda: published.append(manager.next_sequence))
        with manager.step(1):
            for number in range(10):
                manager.admit(f"r{number}", np.arange(1000, dtype=np.int32) + 1000 * number)
            with pytest.raises(CallTooLarge):
                manager.admit("too large", np.arange(8000, dtype=np.int32))
            manager.release("r0")
        assert len(published) > 2 and len(manager.state.requests) == 9
        assert not check(manager.state) and replays(manager)


def test_what_needs_others_to_see_it_is_refused_inside_a_step(name: str) -> None:
    peer = f"{name}-peer"
    config = CacheConfig(block_size=4, device_blocks=16, ranks=1, block_bytes=16)
    with CacheManager.create(name, config) as manager, CacheManager.create(peer, config) as prefill:
        Sender(prefill)
        receiver = Receiver(manager)
        manager.admit("a", tokens(2))
        with manager.step(1):
            before = manager.digest()
            for call in (
                lambda: manager.step(2),
                lambda: manager.wait("a"),
                manager.pause,
                lambda: manager.clear(wait=1.0),
                lambda: receiver.reserve("a", 2, peer=peer),
            ):
                with pytest.raises(InvalidCommand, match="inside a step"):
                    call()
            assert manager.digest() == before and manager.allocate({"a": 1})
        assert manager.wait("a").request_id == "a" and replays(manager)


def test_room_that_ends_inside_a_step_refuses_the_call_that_needs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is released is logged all the same, and what was collected before is not lost."""
    config = CacheConfig(block_size=4, device_blocks=4096, segment_bytes=64 << 10)
    with CacheManager.create(name, config) as manager:

        def refused() -> None:
            raise SharedMemoryFull("no room, as planned")

        monkeypatch.setattr(manager._writer, "_next_segment", refused)
        before = b""

        def step(number: int) -> None:
            nonlocal before
            with manager.step(number):
                for part in range(3):
                    before = manager.digest()
                    manager.admit(f"r{number}.{part}", np.arange(400, dtype=np.int32) + 1000 * number)

        with pytest.raises(SharedMemoryFull):
            collections.deque(map(step, range(1000)), maxlen=0)
        assert manager.digest() == before and replays(manager)
        with manager.step(1000):
            for key in list(manager.state.numbers)[:4]:
                manager.release(key)
            with pytest.raises(SharedMemoryFull):
                manager.admit("again", tokens(2))
        assert replays(manager)
        monkeypatch.undo()
        manager.admit("again", tokens(2))


def test_copies_of_a_step_begin_when_it_has_ended(name: str) -> None:
    config = CacheConfig(
        block_size=4,
        device_blocks=8,
        host_blocks=16,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=2,
        block_bytes=64,
    )
    with CacheManager.create(name, config) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", tokens(8))
        with manager.step(1):
            admission = manager.admit("b", tokens(6, 1))  # swaps the first one out
            assert not admission.ready and manager.state.transfers
            assert manager.poll() == []
        manager.wait("b")
        manager.release("b")
        assert serve(manager, engine, "again", tokens(8)) == 7
        assert replays(manager)


def test_a_step_belongs_to_the_owner_and_ends_with_the_ledger(name: str) -> None:
    failed: list[BaseException] = []
    with CacheManager.create(name, CONFIG) as manager:

        def elsewhere() -> None:
            try:
                with manager.step(1):
                    pass
            except WrongThread as error:
                failed.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert failed
        manager.admit("a", tokens(2))
        with manager.step(2):
            manager.admit("b", tokens(2, 1))
            manager.close(keep=True)
            with pytest.raises(ManagerClosed):
                manager.admit("c", tokens(2))
    with CacheManager.open(name) as manager:
        assert manager.stats()["requests"] == 2


def test_a_step_with_an_event_that_cannot_be_applied_is_never_published(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contradicted(state: object, event: object) -> None:
        raise InvariantViolation("planted")

    manager = CacheManager.create(name, CONFIG)
    manager.admit("before", tokens(2))
    sequence = manager.next_sequence
    monkeypatch.setitem(transactions.HANDLERS, RequestReleased, contradicted)

    def step() -> None:
        with manager.step(1):
            manager.admit("a", tokens(2, 1))
            with pytest.raises(InvariantViolation):
                manager.release("a")
            manager.admit("b", tokens(2, 2))

    with pytest.raises(ManagerClosed, match="planted"):
        step()
    monkeypatch.undo()
    manager.close(keep=True)
    assert last_event(name) == sequence - 1
    CacheManager.open(name).close()
