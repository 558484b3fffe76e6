"""The real manager with real worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import LedgerExists, LogReader
from ipc.control import Control
from ipc.ownership import remove_objects
from ipc.processes import start_time
from kvledger import (
    Admission,
    Busy,
    CacheConfig,
    CacheManager,
    ConfigError,
    DuplicateRequest,
    HostPolicy,
    InvalidCommand,
    InvalidTokens,
    ManagerClosed,
    OutOfBlocks,
    RequestNotReady,
    Tier,
    UnknownRequest,
)
from kvledger.manager import ranks
from kvledger.run.pattern import PatternEngine, chain
from statemachine.apply import HANDLERS
from statemachine.check import check
from statemachine.content import words_of
from statemachine.errors import InvariantViolation
from statemachine.events import RequestMatched, WorkerLost
from statemachine.records.replay import event_of, replay
from statemachine.records.snapshot import state_digest
from tests.processes import alive
from tests.waiting import PATIENCE_S, wait_until
from workers import WorkerFailed
from workers.pools import backends as pools

CONFIG = CacheConfig(
    block_size=4, device_blocks=16, host_blocks=16, host_policy=HostPolicy.EXCLUSIVE, ranks=2, layers=2, block_bytes=64
)


def admit(manager: CacheManager, key: str, tokens: np.ndarray) -> Admission:
    """Once there is room: a refusal that names blocks in transfer ends with them."""

    def admitted() -> Admission | None:
        try:
            return manager.admit(key, tokens)
        except OutOfBlocks as refused:
            if not refused.in_transfer:
                raise
            return None

    found = wait_until(f"there is room for {key}", admitted, meanwhile=manager.poll)
    assert found is not None
    return found


def serve(manager: CacheManager, engine: PatternEngine, key: str, tokens: np.ndarray) -> int:
    """A whole request; returns its hits."""
    admission = admit(manager, key, tokens)
    manager.wait(key)
    seeds = chain(words_of(tokens), 16, b"")
    table, valid = manager.block_table(key), manager.cached_blocks(key)
    engine.write(table[valid : len(seeds)], seeds[valid:])
    engine.verify(key, table[: len(seeds)], seeds, manager.next_sequence)
    manager.cache(key)
    manager.release(key)
    return admission.device_blocks + admission.host_blocks


def replays(manager: CacheManager) -> bool:
    reader = LogReader(manager.name)
    try:
        return state_digest(replay(reader, check_every=1).state) == manager.digest()
    finally:
        reader.close()


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), max_size=60), st.sampled_from([1, 2]))
@settings(max_examples=8)
def test_bytes_follow_tokens(prompts: list[list[int]], policy: int) -> None:
    config = CacheConfig(**{**vars(CONFIG), "host_policy": HostPolicy(policy)})
    with CacheManager.create(f"m{os.getpid()}", config) as manager:
        engine = PatternEngine(manager.pools)
        for i, prompt in enumerate(prompts):
            serve(manager, engine, str(i), np.repeat(np.array(prompt, np.int32), 4))
        assert replays(manager)


def test_a_killed_worker_is_replaced_and_nothing_is_lost() -> None:
    with CacheManager.create(f"m{os.getpid()}", CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        assert manager._ranks is not None
        hits = 0
        for i in range(120):
            if i % 30 == 10:
                os.kill(manager._ranks.supervisor.pid(i // 30 % 2), signal.SIGKILL)
            hits += serve(manager, engine, str(i), np.arange(33, dtype=np.int32) + 1000 * (i % 3))
        assert hits > 500 and manager.state.workers[0] > 1 and manager.state.workers[1] > 1
        assert replays(manager)


def test_a_hung_worker_times_out_and_its_blocks_stay_quarantined() -> None:
    config = CacheConfig(**{**vars(CONFIG), "transfer_timeout_s": 0.3})
    with CacheManager.create(f"m{os.getpid()}", config) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", np.arange(64, dtype=np.int32))
        assert manager._ranks is not None
        pid = manager._ranks.supervisor.pid(1)
        os.kill(pid, signal.SIGSTOP)
        manager.admit("b", np.arange(64, dtype=np.int32) + 500)  # swaps "a" out
        progress = manager.wait("b", timeout=PATIENCE_S)
        assert progress.request_id == "b" and not progress.shortened
        (transfer,) = manager.state.transfers.values()
        assert transfer.quarantined
        for _ in range(50):
            manager.poll()
        assert [*manager.state.transfers.values()] == [transfer], "its worker might still write"
        os.kill(pid, signal.SIGCONT)
        wait_until("the quarantine ends", lambda: not manager.state.transfers, meanwhile=manager.poll)
        manager.release("b")
        assert manager.available_blocks() == 16 and replays(manager)


def test_what_times_out_while_a_rank_has_no_worker_is_not_quarantined_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The new incarnation never runs it and the old one is dead: nobody else can answer."""
    monkeypatch.setattr(ranks, "back_off", lambda failures: 3600.0)
    config = CacheConfig(**{**vars(CONFIG), "transfer_timeout_s": 0.01})
    with CacheManager.create(f"m{os.getpid()}", config) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", np.arange(64, dtype=np.int32))
        assert manager._ranks is not None
        os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
        workers, restarts = manager._ranks.supervisor._workers, manager._ranks._restarts
        wait_until("its death is noticed", lambda: workers.get(1) is None, meanwhile=manager.poll)
        assert restarts[1] > time.monotonic(), "no successor comes before this test says so"
        manager.admit("b", np.arange(64, dtype=np.int32) + 500)  # swaps "a" out
        wait_until(
            "the copy has timed out",
            lambda: any(transfer.quarantined for transfer in manager.state.transfers.values()),
            meanwhile=manager.poll,
        )
        assert manager.state.workers[1] == 1
        restarts[1] = 0.0
        wait_until("the quarantine ends", lambda: not manager.state.transfers, meanwhile=manager.poll)
        assert manager.state.workers[1] == 2
        manager.release("b")
        assert manager.available_blocks() == 16 and replays(manager)


@pytest.mark.parametrize("namespace", ["the same", "another"])
def test_a_worker_that_does_not_read_is_replaced_before_the_log_is_full(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the process ids that workers give are numbers of another namespace."""
    readers = Control.readers
    if namespace == "another":
        monkeypatch.setattr(
            Control, "readers", lambda self: [line._replace(pid=line.line + 1) for line in readers(self)]
        )
    config = CacheConfig(
        **{**vars(CONFIG), "segment_bytes": 64 << 10, "retain_bytes": None, "worker_backlog_bytes": 1 << 20}
    )
    with CacheManager.create(f"m{os.getpid()}", config) as manager:
        engine = PatternEngine(manager.pools)
        assert manager._ranks is not None
        pid = manager._ranks.supervisor.pid(1)
        os.kill(pid, signal.SIGSTOP)
        served = 0

        def serve_one() -> None:
            nonlocal served
            serve(manager, engine, str(served), np.arange(32, dtype=np.int32))  # nothing to copy: no time-out
            served += 1
            manager.poll()

        wait_until(
            "the worker that does not read is replaced",
            lambda: manager.state.workers[1] > 1,
            meanwhile=serve_one,
            pause_s=0,
        )
        assert manager.state.workers[1] == 2 and not start_time(pid)
        assert manager.stats()["log_bytes"] > 1 << 20
        reader = LogReader(manager.name)
        events = []
        while records := reader.poll():
            events += map(event_of, records)
        reasons = [event.reason for event in events if isinstance(event, WorkerLost)]
        reader.close()
        assert len(reasons) == 1 and "worker_backlog_bytes" in reasons[0]
        serve(manager, engine, "out", np.arange(64, dtype=np.int32) + 500)  # swaps out with both ranks
        assert replays(manager)


_ENGINE = """
import sys, time
from kvledger import CacheConfig, CacheManager, HostPolicy
config = CacheConfig(device_blocks=8, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE, ranks=2)
manager = CacheManager.create(sys.argv[1], config)
print(*(manager._ranks.supervisor.pid(rank) for rank in range(2)), flush=True)
time.sleep(600)
"""


def test_workers_of_a_killed_engine_leave_and_its_name_says_so() -> None:
    name = f"orphans-{os.getpid()}"
    engine = subprocess.Popen([sys.executable, "-c", _ENGINE, name], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    workers = [(pid, start_time(pid)) for pid in map(int, engine.stdout.readline().split())]
    try:
        assert len(workers) == 2 and all(alive(*worker) for worker in workers)
        with pytest.raises(LedgerExists, match=f"written by process {engine.pid}"):
            CacheManager.create(name, CONFIG)
        engine.kill()
        engine.wait()
        with pytest.raises(LedgerExists, match=f"process {engine.pid}, which is dead"):
            CacheManager.create(name, CONFIG)
        wait_until("the orphaned workers leave", lambda: not any(alive(*worker) for worker in workers))
    finally:
        engine.kill()
        engine.stdout.close()
        remove_objects(name)


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pools.create_pools

    def other_layout(ledger: str, layout: object) -> list[pools.Pools]:
        return real(ledger, CONFIG.layout._replace(block_bytes=128))

    monkeypatch.setattr("kvledger.manager.lifecycle.create_pools", other_layout)
    with pytest.raises(WorkerFailed, match=r"rank \d did not start: PoolMismatch"):
        CacheManager.create(f"m{os.getpid()}", CONFIG)


def test_every_wrong_call_is_refused_and_changes_nothing() -> None:
    with CacheManager.create(f"m{os.getpid()}", CacheConfig(block_size=4, device_blocks=8)) as manager:
        tokens = np.arange(16, dtype=np.int32)
        manager.admit("a", tokens)
        digest = manager.digest()
        calls = [
            (DuplicateRequest, lambda: manager.admit("a", tokens)),
            (InvalidTokens, lambda: manager.admit("b", [-1])),
            (InvalidTokens, lambda: manager.admit("b", [2**31])),
            (InvalidTokens, lambda: manager.admit("b", [1.5])),
            (InvalidTokens, lambda: manager.admit("b", np.zeros((2, 2), np.int32))),
            (InvalidCommand, lambda: manager.admit("b", tokens, max_blocks=-1)),
            (OutOfBlocks, lambda: manager.admit("b", np.arange(100, dtype=np.int32))),
            (UnknownRequest, lambda: manager.release("b")),
            (UnknownRequest, lambda: manager.cache("b")),
            (UnknownRequest, lambda: manager.allocate({"a": 1, "b": 1})),
            (OutOfBlocks, lambda: manager.allocate({"a": 5})),
            (InvalidCommand, lambda: manager.allocate({"a": -1})),
            (InvalidCommand, lambda: manager.cache("a", 9)),
            (InvalidCommand, lambda: manager.trim("a", 9)),
            (InvalidCommand, lambda: manager.reassign("a", "a", [0])),
            (Busy, lambda: manager.clear()),
        ]
        for error, call in calls:
            with pytest.raises(error):
                call()
            assert manager.digest() == digest
        assert replays(manager)
    with pytest.raises(ManagerClosed):
        manager.admit("c", tokens)


def test_generated_tokens_are_cached_where_they_belong() -> None:
    with CacheManager.create(f"m{os.getpid()}", CacheConfig(block_size=4, device_blocks=32)) as manager:
        prompt, answer = np.arange(10, dtype=np.int32), np.arange(10, 23, dtype=np.int32)
        manager.admit("a", prompt)
        manager.cache("a")
        manager.allocate({"a": 3})
        manager.cache("a", generated=answer[:3])
        manager.cache("a", generated=answer[3:])
        manager.release("a")
        assert manager.peek(np.concatenate([prompt, answer]), max_blocks=99) == (5, 0)


def test_a_turn_of_a_long_conversation_is_not_paid_with_a_copy_of_all_that_was_said() -> None:
    name, size = f"long-{os.getpid()}", 1024
    words = np.arange(76 * size, dtype=np.int32)
    with CacheManager.create(name, CacheConfig(block_size=size, device_blocks=128)) as manager:
        runs = []
        for blocks in (64, 66, 68, 70, 72, 74, 76):
            assert manager.admit("turn", words[: blocks * size]).device_blocks == (blocks - 2 if runs else 0)
            manager.cache("turn")
            manager.release("turn")
            runs.append([node.size for node in sorted(manager.state.nodes.values(), key=lambda node: node.start)])
        assert runs == [[64], [64, 2], [64, 4], [64, 6], [72], [72, 2], [72, 4]]
        assert not check(manager.state)


def test_not_ready_is_not_cached() -> None:
    with CacheManager.create(f"m{os.getpid()}", CONFIG) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", np.arange(64, dtype=np.int32))
        assert not manager.admit("b", np.arange(64, dtype=np.int32) + 500).ready
        with pytest.raises(RequestNotReady):
            manager.cache("b")
        manager.wait("b")
        manager.cache("b")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device_blocks": 0}, "device_blocks"),
        ({"block_size": True}, "block_size"),
        ({"block_bytes": 12}, "multiple of 8"),
        ({"host_blocks": 0}, "host_policy"),
        ({"transfer_timeout_s": 0}, "transfer_timeout_s"),
        ({"host_staging_blocks": -1}, "host_staging_blocks"),
    ],
)
def test_impossible_settings_name_the_setting(change: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CacheConfig(**{**vars(CONFIG), **change})  # type: ignore[arg-type]


def test_clearing_and_shrinking_a_large_cache_are_split_into_steps() -> None:
    """One-block runs, on both tiers: everything in one transaction would be several times what the log takes."""
    config = CacheConfig(
        block_size=1,
        device_blocks=9000,
        host_blocks=9000,
        host_policy=HostPolicy.WRITE_THROUGH,
        segment_bytes=64 << 10,
        retain_bytes=None,
    )
    with CacheManager.create(f"m{os.getpid()}", config) as manager:
        for i in range(8000):
            manager.admit(str(i), np.array([i], np.int32), max_blocks=1)
            manager.cache(str(i))
            manager.release(str(i))
        manager.admit("pinned", np.array([7999], np.int32), max_blocks=1)
        digest = manager.digest()
        with pytest.raises(Busy):
            manager.resize(Tier.DEVICE, 1)
        assert manager.digest() == digest, "refused as a whole, not after the first steps"
        manager.release("pinned")
        manager.resize(Tier.DEVICE, 10)
        assert manager.stats()["device_total_blocks"] == 10 and manager.stats()["runs"] <= 10
        for i in range(10):
            manager.admit(str(i), np.array([i], np.int32), max_blocks=1)
        for i in range(10):
            manager.release(str(i))
        manager.clear()
        assert manager.stats()["runs"] == 0
        reader = LogReader(manager.name)
        assert state_digest(replay(reader).state) == manager.digest()
        reader.close()


def test_an_event_that_cannot_be_applied_is_never_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of ours: nobody sees the event, the manager stops there, and the ledger can be opened again."""
    name = f"halfway-{os.getpid()}"
    manager = CacheManager.create(name, CacheConfig(device_blocks=64))
    manager.admit("a", [1] * 100)
    before, digest = manager.next_sequence, manager.digest()

    def broken(state: object, event: object) -> None:
        raise InvariantViolation("planted")

    with monkeypatch.context() as patch:
        patch.setitem(HANDLERS, RequestMatched, broken)
        with pytest.raises(InvariantViolation, match="planted"):
            manager.admit("b", [2] * 100)
    reader = LogReader(name)
    assert [record.sequence for record in reader.poll()] == list(range(1, before))
    reader.close()
    assert manager.digest() == digest
    with pytest.raises(ManagerClosed, match="not finished"):
        manager.release("a")
    manager.close(keep=True)
    with CacheManager.open(name) as again:
        assert not again.state.requests
