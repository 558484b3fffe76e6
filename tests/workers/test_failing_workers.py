"""Workers that die, hang or fail at every moment of a copy: nothing is lost, and somebody is told."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from ipc import LogReader
from ipc.names import remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.run.pattern import PatternEngine
from statemachine.events import Outcome, QuarantineEnded, TierLost, TransferFinished, WorkerLost
from tests.manager.test_recovery import CONFIG, prompt, serve, settled, story
from workers import WorkerFailed
from workers.pools.layout import PoolLayout
from workers.processes import supervisor
from workers.processes.acknowledgements import log_name


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
    ],
)
def test_killed_at_a_moment_of_its_copy(name: str, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """With checksums: what a successor does again has the right one, so nothing is taken for damaged."""
    fail(monkeypatch, moment)
    with CacheManager.create(name, replace(CONFIG, checksums=True)) as manager:
        engine = PatternEngine(manager.pools)
        hits = sum(serve(manager, engine, str(i), prompt(i % 4)) for i in range(24))
        assert hits == 20 * 6
        assert manager._ranks is not None
        while manager._ranks._restarts:
            manager.poll()
        lost = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert [(event.rank, event.reason) for event in lost] == [(1, "killed by signal 9")]
        assert manager.state.workers == {0: 1, 1: 2}
        assert not manager.stats()["failed_transfers"]


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
    assert [*back.after] == [out.id]
    engine_too = case == "engine dies, too"
    if case == "a GPU, which had not answered":  # its stream goes on without waiting for anybody to be told
        monkeypatch.setattr(PoolLayout, "on_gpu", property(lambda self: True))
        monkeypatch.setattr(manager._ranks.supervisor, "_last_answers", lambda worker: frozenset[int]())
    if case in ("engine lives, and has not heard", "a GPU, which had not answered"):  # between two looks of a poll
        answers = LogReader(log_name(name, 0, 1))
        while not {out.id, back.id} <= {record.subject for record in answers.poll()}:
            answers.close()
            answers = LogReader(log_name(name, 0, 1))
        answers.close()
        monkeypatch.setattr(manager._ranks.supervisor, "acknowledgements", list)
    else:
        while not all(0 in manager._ranks._answers.get(id, {}) for id in (out.id, back.id)):
            manager.poll()
    os.kill(first, signal.SIGKILL)
    if not engine_too:
        while manager.worker_pid(0) == first:
            manager.poll()
        monkeypatch.undo()
    else:
        manager._writer.close()
        manager = CacheManager.open(name)
        engine = PatternEngine(manager.pools)
    try:
        while manager.state.workers.get(0) != 2:
            manager.poll()
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
        time.sleep(0.02)  # long enough to park
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while manager.state.workers.get(0) != 2 and time.monotonic() < deadline:
            manager.poll()
        (lost,) = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert lost.reason.startswith("exit status 0")


def test_killed_while_parked_and_as_often_as_you_like(name: str) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        assert manager._ranks is not None
        for i in range(12):
            if i % 3 == 0:
                time.sleep(0.02)  # long enough to park
                os.kill(manager._ranks.supervisor.pid(i % 2), signal.SIGKILL)
            serve(manager, engine, str(i), prompt(i % 4))
            settled(manager)
            while manager._ranks._restarts:
                manager.poll()
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
        deadline = time.monotonic() + 60
        number = 0
        while manager.state.policy != HostPolicy.OFF:
            serve(manager, engine, f"request {number}", prompt(number % 5))
            number += 1
            assert time.monotonic() < deadline
        settled(manager)
        state = manager.state
        assert not state.host_resident and len(state.host.free) == state.host.capacity and not state.transfers
        before = manager.next_sequence
        for i in range(6):  # the service goes on, with what the device holds
            serve(manager, engine, f"after {i}", prompt(i % 2))
        assert manager.peek(prompt(1)) == (6, 0)
        assert manager._ranks.supervisor.idle() and manager.next_sequence > before
        events = story(name)
        (lost,) = [event for event in events if isinstance(event, TierLost)]
        assert "rank 1 failed 8 times in a row" in lost.reason
        failed = [event for event in events if isinstance(event, TransferFinished) and event.outcome == Outcome.FAILED]
        assert failed or moment != "every copy raises"
        manager.close(keep=True)
    with CacheManager.open(name) as manager:  # and after a restart
        assert manager.state.policy == HostPolicy.OFF and not manager.state.host_resident
        assert serve(manager, PatternEngine(manager.pools), "a", prompt(1)) == 6


def test_who_waits_for_a_failed_copy_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(name, CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        for i in range(3):
            serve(manager, engine, str(i), prompt(i))
        settled(manager)
        assert manager.peek(prompt(0))[1]
        fail(monkeypatch, "every copy raises")
        assert manager._ranks is not None
        os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
        while manager.state.workers[1] == 1:
            manager.poll()
        admission = manager.admit("waits", prompt(0))
        assert not admission.ready and admission.host_blocks
        copies = [*manager.state.transfers]
        assert not manager.match("shares it", prompt(0)).ready and [*manager.state.transfers] == copies
        told = {entry.key: entry for entry in manager.wait("waits")}
        assert told["shares it"].shortened and told["shares it"].cached_blocks == admission.device_blocks
        assert manager.ready("shares it")
        manager.release("shares it")
        progress = [told["waits"]]
        assert progress[-1].shortened and progress[-1].cached_blocks == admission.device_blocks
        assert len(manager.block_table("waits")) == progress[-1].cached_blocks + 1
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
    os.kill(manager._ranks.supervisor.pid(1), signal.SIGSTOP)
    manager._writer.close()  # the engine is gone, its workers are not
    with CacheManager.open(name, CacheConfig(**{**vars(CONFIG), "ready_timeout_s": 2})) as manager:
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
    while not stray.signals.words[0]:
        time.sleep(0.01)
    manager._writer.close()
    with CacheManager.open(name) as manager:
        stray.process.wait(30)
        assert manager.state.workers == {0: 1, 1: 1}
        serve(manager, PatternEngine(manager.pools), "a", prompt(1))


def test_a_quarantine_outlives_its_engine_and_ends(name: str) -> None:
    """One rank's worker was replaced before the engine died: only by its word for the new epoch can this one end."""
    config = CacheConfig(**{**vars(CONFIG), "transfer_timeout_s": 0.3})
    manager = CacheManager.create(name, config)
    for i in range(3):
        serve(manager, PatternEngine(manager.pools), str(i), prompt(i))
    settled(manager)
    assert manager._ranks is not None
    pids = [manager._ranks.supervisor.pid(rank) for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    manager.admit("waits", prompt(8))
    assert manager.state.transfers
    while not all(transfer.quarantined for transfer in manager.state.transfers.values()):
        manager.poll()
    os.kill(pids[1], signal.SIGKILL)
    while manager.state.workers[1] == 1:
        manager.poll()
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
