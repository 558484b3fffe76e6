"""Workers that die, hang or fail at every moment of a copy: nothing is lost, and somebody is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ipc import Control, LogReader
from ipc.control import PARKED
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.run.pattern import PatternEngine
from statemachine.events import (
    BlocksEvicted,
    Event,
    Outcome,
    QuarantineEnded,
    TierLost,
    TransferFinished,
    WorkerLost,
)
from statemachine.records.replay import Replay
from statemachine.state.state import State
from tests.manager.test_recovery import CONFIG, answered, prompt, serve, settled, story
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.dying_worker import BEHIND
from workers import WorkerFailed
from workers.pools.layout import PoolLayout
from workers.processes import supervisor


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"failing-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


def fail(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    monkeypatch.setattr(supervisor, "_PROGRAM", ("-m", "tests.workers.dying_worker", moment))


@pytest.mark.parametrize(
    "moment",
    [
        "before the copy",
        "during the copy",
        "before its acknowledgement",
        "in its acknowledgement",
        "between acknowledgement and hint",
        "after its acknowledgement",
        BEHIND,
    ],
)
def test_killed_at_a_moment_of_its_copy(name: str, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """With checksums: what a successor does again has the right one, so nothing is taken for damaged.

    Every byte is compared as it is served, and every block that is lost was given up on purpose.
    """
    fail(monkeypatch, moment)
    with CacheManager.create(name, replace(CONFIG, checksums=True)) as manager:
        engine = PatternEngine(manager.pools)
        hits = sum(serve(manager, engine, str(i), prompt(i % 4)) for i in range(24))
        ranks = manager._ranks
        assert ranks is not None
        wait_until("the killed worker has a successor", lambda: not ranks._restarts, meanwhile=manager.poll)
        settled(manager)
        given_up, cached = what_became_of_blocks(name)
        assert hits + given_up - (4 * 6 - cached) == 20 * 6, "nothing else is lost"
        assert given_up or moment != BEHIND, "what the dead worker had copied, and the other one had not"
        lost = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert [(event.rank, event.reason) for event in lost] == [(1, "killed by signal 9")]
        assert manager.state.workers == {0: 1, 1: 2}


def what_became_of_blocks(name: str) -> tuple[int, int]:
    """How many cached blocks were given up on purpose, and how many are cached at the end.

    On purpose: a worker had died that had done its part of a copy, a later copy may have overwritten what the others
    had still to read for it, and so the copy was ended. What quarantined blocks leave no room for may go, too. Fails
    if a copy has failed, or a block has gone, in any other way.
    """
    cached = given_up = 0
    overtaken: set[int] = set()
    quarantined = False

    def watch(event: Event, state: State) -> None:
        nonlocal cached, given_up, overtaken, quarantined
        now = sum(node.size for node in state.nodes.values())
        if isinstance(event, TransferFinished) and event.outcome != Outcome.DONE:
            assert event.outcome == Outcome.TIMED_OUT and event.transfer in overtaken, event
        elif now < cached:
            assert isinstance(event, BlocksEvicted) and quarantined, event
        given_up += max(cached - now, 0)
        cached = now
        overtaken = {id for transfer in state.transfers.values() for id in transfer.waits_for}
        quarantined = any(transfer.quarantined for transfer in state.transfers.values())

    reader = LogReader(name)
    run = Replay(watch=watch)
    while records := reader.poll():
        run.feed(records)
    reader.close()
    return given_up, cached


def parked(manager: CacheManager, rank: int) -> bool:
    """Whether a rank's worker sleeps until the log wakes it."""
    control = manager._writer._control
    return any(
        line.name == f"transfer {rank}" and line.alive and control.words[Control.line(line.line) + PARKED]
        for line in control.readers()
    )


@pytest.mark.parametrize(
    "case", ["engine lives", "engine lives, and has not heard", "engine dies, too", "a GPU, which had not answered"]
)
def test_what_a_later_copy_has_overwritten_is_not_copied_again(
    name: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a campaign: rank 0 had copied out, and in to the same blocks, when it died; rank 1 had done neither."""
    manager = CacheManager.create(name, replace(CONFIG, device_blocks=8, host_blocks=24))
    engine = PatternEngine(manager.pools)
    for number in (0, 1):  # the first one goes to the host, the other one is on the device
        assert serve(manager, engine, str(number), prompt(number)) == 0
    settled(manager)
    assert manager._ranks is not None
    first, other = (manager.worker_pid(rank) for rank in range(2))
    assert first is not None and other is not None
    os.kill(other, signal.SIGSTOP)
    assert manager.admit("back", prompt(0)).host_blocks > 4
    out, back = manager.state.transfers.values()
    assert [*back.waits_for] == [out.id]
    engine_too = case == "engine dies, too"
    if case == "a GPU, which had not answered":  # its stream goes on without waiting for anybody to be told
        monkeypatch.setattr(PoolLayout, "on_gpu", property(lambda self: True))
        monkeypatch.setattr(manager._ranks.supervisor, "_last_answers", lambda worker: frozenset[int]())
    if case in ("engine lives, and has not heard", "a GPU, which had not answered"):  # between two looks of a poll
        wait_until("rank 0 has answered both", lambda: {out.id, back.id} <= answered(name, 0))
        monkeypatch.setattr(manager._ranks.supervisor, "acknowledgements", list)
    else:
        answers = manager._ranks._answers
        wait_until(
            "rank 0 is heard on both",
            lambda: all(0 in answers.get(id, {}) for id in (out.id, back.id)),
            meanwhile=manager.poll,
        )
    os.kill(first, signal.SIGKILL)
    if not engine_too:
        wait_until("its death is noticed", lambda: manager.worker_pid(0) != first, meanwhile=manager.poll)
        monkeypatch.undo()
    else:
        manager._writer.close()
        manager = CacheManager.open(name)
        engine = PatternEngine(manager.pools)
    try:
        wait_until("rank 0 is replaced", lambda: manager.state.workers.get(0) == 2, meanwhile=manager.poll)
        os.kill(other, signal.SIGCONT)
        settled(manager)
        if not engine_too:
            manager.release("back")
        for number in (1, 0, 1):
            serve(manager, engine, f"again {number}", prompt(number))  # compares every byte
    finally:
        manager.close()


def test_a_parked_worker_that_is_asked_to_end_just_ends(name: str) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        pid = manager.worker_pid(0)
        assert pid is not None
        wait_until("the worker is parked", lambda: parked(manager, 0))
        os.kill(pid, signal.SIGTERM)
        wait_until("it is replaced", lambda: manager.state.workers.get(0) == 2, meanwhile=manager.poll)
        (lost,) = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert lost.reason.startswith("exit status 0")


def test_killed_while_parked_and_as_often_as_you_like(name: str) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        ranks = manager._ranks
        assert ranks is not None
        for i in range(12):
            if i % 3 == 0:
                wait_until("the worker is parked", lambda rank=i % 2: parked(manager, rank))
                os.kill(ranks.supervisor.pid(i % 2), signal.SIGKILL)
            serve(manager, engine, str(i), prompt(i % 4))
            settled(manager)
            wait_until("nobody is missing", lambda: not ranks._restarts, meanwhile=manager.poll)
        assert sum(manager.state.workers.values()) == 2 + 4
        story(name)


@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
@pytest.mark.parametrize("moment", ["every copy raises", "successors cannot start"])
def test_a_rank_that_keeps_failing_costs_the_host_tier(
    name: str, monkeypatch: pytest.MonkeyPatch, moment: str, policy: HostPolicy
) -> None:
    monkeypatch.setattr("kvledger.manager.ranks._LONGEST_BACK_OFF_S", 0.1)
    fail(monkeypatch, moment)
    with CacheManager.create(name, CacheConfig(**{**vars(CONFIG), "host_policy": policy})) as manager:
        engine = PatternEngine(manager.pools)
        assert manager._ranks is not None
        if moment == "successors cannot start":
            os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
        number = 0

        def serve_one() -> None:
            nonlocal number
            serve(manager, engine, f"request {number}", prompt(number % 5))
            number += 1

        wait_until(
            "the host tier is given up", lambda: manager.state.policy == HostPolicy.OFF, meanwhile=serve_one, pause_s=0
        )
        settled(manager)
        state = manager.state
        assert not state.host.resident and len(state.host.pool.free) == state.host.pool.capacity and not state.transfers
        before = manager.next_sequence
        for i in range(6):  # the service goes on, with what the device holds
            serve(manager, engine, f"after {i}", prompt(i % 2))
        assert manager.peek(prompt(1), max_blocks=99) == (6, 0)
        assert manager._ranks.supervisor.idle() and manager.next_sequence > before
        events = story(name)
        (lost,) = [event for event in events if isinstance(event, TierLost)]
        assert "rank 1 failed 8 times in a row" in lost.reason
        failed = [event for event in events if isinstance(event, TransferFinished) and event.outcome == Outcome.FAILED]
        assert failed or moment != "every copy raises"
        manager.close(keep=True)
    with CacheManager.open(name) as manager:  # and after a restart
        assert manager.state.policy == HostPolicy.OFF and not manager.state.host.resident
        assert serve(manager, PatternEngine(manager.pools), "a", prompt(1)) == 6


def test_who_waits_for_a_failed_copy_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        for i in range(3):
            serve(manager, engine, str(i), prompt(i))
        settled(manager)
        assert manager.peek(prompt(0), max_blocks=99)[1]
        fail(monkeypatch, "every copy raises")
        assert manager._ranks is not None
        os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
        wait_until("rank 1 is replaced", lambda: manager.state.workers[1] > 1, meanwhile=manager.poll)
        admission = manager.admit("waits", prompt(0))
        assert not admission.ready and admission.host_blocks
        copies = [*manager.state.transfers]
        assert not manager.match("shares it", prompt(0)).ready and [*manager.state.transfers] == copies
        while not manager.ready("waits"):  # somebody else folds the answers in before it waits
            manager.fold()
        progress = manager.wait("waits")
        (other,) = manager.poll()
        assert other.request_id == "shares it" and other.shortened and other.cached_blocks == admission.device_blocks
        assert manager.ready("shares it")
        manager.release("shares it")
        assert progress.shortened and progress.cached_blocks == admission.device_blocks
        assert len(manager.block_table("waits")) == progress.cached_blocks + 1
        manager.allocate({"waits": admission.host_blocks})
        manager.wait("waits")
        manager.cache("waits")
        manager.release("waits")
        story(name)


def test_without_memory_a_worker_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "no memory")
    with pytest.raises(WorkerFailed, match=r"rank \d did not start: .*(Cannot allocate memory|MemoryError)"):
        CacheManager.create(name, CacheConfig(**{**vars(CONFIG), "block_bytes": 1 << 16}))


def test_a_worker_that_does_not_get_ready_is_not_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_PROGRAM", ("-c", "import time; time.sleep(600)"))
    with pytest.raises(WorkerFailed, match=r"rank 0 did not start: not ready within 0.3 s"):
        CacheManager.create(name, CacheConfig(**{**vars(CONFIG), "ready_timeout_s": 0.3}))


def test_an_adopted_worker_that_hangs_is_replaced(name: str) -> None:
    manager = CacheManager.create(name, CONFIG)
    for i in range(3):
        serve(manager, PatternEngine(manager.pools), str(i), prompt(i))
    settled(manager)
    assert manager._ranks is not None
    stopped = manager._ranks.supervisor.pid(1)
    os.kill(stopped, signal.SIGSTOP)
    manager._writer.close()  # the engine is gone, its workers are not
    with CacheManager.open(name, CONFIG) as manager:
        ranks = manager._ranks
        assert ranks is not None
        wait_until("rank 0 follows the new engine", lambda: ranks._unheard.keys() == {1}, meanwhile=manager.poll)
        assert ranks._unheard[1] > time.monotonic() - 1 and manager.worker_pid(1) == stopped
        ranks._unheard[1] = 0.0  # its time is over
        attention = PatternEngine(manager.pools)
        assert serve(manager, attention, "again", np.array(prompt(0))) == 6
        settled(manager)
        assert manager.state.workers == {0: 1, 1: 2}
        (lost,) = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert lost.reason == "it does not follow the new engine"


def test_a_worker_that_had_not_joined_leaves_when_another_engine_comes(name: str) -> None:
    manager = CacheManager.create(name, CONFIG)
    assert manager._ranks is not None
    stray = supervisor._Worker.start(name, 1, 2, 1, CONFIG.layout, 1)
    wait_until("the stray worker has started", lambda: stray.signals.words[0])
    manager._writer.close()
    with CacheManager.open(name) as manager:
        stray.process.wait(PATIENCE_S)
        assert manager.state.workers == {0: 1, 1: 1}
        serve(manager, PatternEngine(manager.pools), "a", prompt(1))


def test_a_quarantine_outlives_its_engine_and_ends(name: str) -> None:
    """One rank's worker was replaced before the engine died: only by its word for the new epoch can this one end."""
    config = CacheConfig(**{**vars(CONFIG), "transfer_timeout_s": 0.3})
    manager = CacheManager.create(name, CONFIG)
    for i in range(3):
        serve(manager, PatternEngine(manager.pools), str(i), prompt(i))
    settled(manager)
    object.__setattr__(manager.config, "transfer_timeout_s", 0.3)  # from here on only what nobody does is in flight
    assert manager._ranks is not None
    pids = [manager._ranks.supervisor.pid(rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    manager.admit("waits", prompt(8))
    assert manager.state.transfers
    wait_until(
        "the copies have timed out",
        lambda: all(transfer.quarantined for transfer in manager.state.transfers.values()),
        meanwhile=manager.poll,
    )
    os.kill(pids[1], signal.SIGKILL)
    wait_until("rank 1 is replaced", lambda: manager.state.workers[1] > 1, meanwhile=manager.poll)
    assert manager.state.transfers, "rank 0 has not answered"
    manager._writer.close()
    with CacheManager.open(name, config) as manager:
        for _ in range(50):
            manager.poll()
            time.sleep(0.005)
        assert manager.state.transfers, "rank 0 might still write"
        os.kill(pids[0], signal.SIGCONT)
        settled(manager)
        assert manager.state.workers == {0: 1, 1: 2}
        events = story(name)
        assert isinstance(events[-1], QuarantineEnded)
        assert sum(isinstance(event, WorkerLost) for event in events) == 1, "nobody had to be killed for it"
