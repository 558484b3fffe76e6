"""What is computed although it is cached costs its own blocks only, and only as long as somebody needs both copies."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from kvledger import CacheConfig, CacheManager, HostPolicy, ReleaseReason
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.commands import Admit, Backup, Cache, FinishTransfer, Release, StartEpoch
from statemachine.decide import decide
from statemachine.events import CopiesReplaced, Event, LedgerOpened, Outcome
from statemachine.records.snapshot import restore, snapshot, state_digest
from statemachine.state.state import State
from tests.manager.test_manager import replays
from tests.statemachine.test_machine import words

PROMPT = np.arange(12, dtype=np.int32)


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    """Four blocks of four tokens; the prompt of three blocks was cached before."""
    with CacheManager.create(f"duplicates-{os.getpid()}", CacheConfig(block_size=4, device_blocks=4)) as manager:
        manager.admit("before", PROMPT)
        manager.cache("before")
        manager.release("before")
        yield manager
        assert replays(manager)


def test_a_full_hit_whose_last_block_is_computed_again_can_grow(manager: CacheManager) -> None:
    for _ in range(3):
        admitted = manager.admit("again", PROMPT)
        assert admitted.cached_blocks == 2, "the last block is computed once more"
        table = [int(block) for block in admitted.block_table]
        manager.cache("again")
        assert manager.available_blocks() == 1
        (granted,) = manager.allocate({"again": 1})["again"].tolist()
        assert manager.block_table("again").tolist() == [*table, granted]
        manager.release("again", ReleaseReason.PREEMPTED)
        assert manager.available_blocks() == 4


def test_equal_prompts_that_were_computed_together_cost_one_of_them_once_the_other_has_ended() -> None:
    name = f"together-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=8)) as manager:
        tables = {}
        for key in ("a", "b"):
            tables[key] = manager.admit(key, PROMPT).block_table.tolist()
        for key in ("a", "b"):
            manager.cache(key)
        assert manager.available_blocks() == 2
        manager.release("a")
        assert manager.block_table("b").tolist() == tables["b"], "a block table never changes under its request"
        assert manager.available_blocks() == 5
        assert manager.admit("c", PROMPT).block_table.tolist()[:2] == tables["b"][:2]
        manager.release("b")
        manager.release("c")
        assert manager.available_blocks() == 8 and sum(manager.peek(PROMPT)) == 2
        assert replays(manager)


def machine(policy: HostPolicy = HostPolicy.OFF) -> State:
    host = 0 if policy == HostPolicy.OFF else 8
    return genesis(LedgerOpened(1, 8, host, 0, policy, 1, "", ""))


def do(state: State, command: object) -> list[Event]:
    events = decide(state, command)  # type: ignore[arg-type]
    for event in events:
        apply(state, event)
        assert not check(state), (command, event, check(state))
    return events


def test_what_a_back_up_still_reads_is_free_when_that_ends() -> None:
    state = machine(HostPolicy.WRITE_THROUGH)
    do(state, Admit("a", words([1, 2]), b"", 0, 2))
    do(state, Cache("a", 2, b""))
    do(state, Backup(1))
    do(state, Release("a", ReleaseReason.FINISHED, False))
    do(state, Admit("b", words([1, 2]), b"", 1, 2))
    *_, replaced = do(state, Cache("b", 2, b""))
    assert isinstance(replaced, CopiesReplaced) and list(replaced.freed) == [1]
    assert 1 not in state.device.pool.free and list(state.transfers[1].held_sources) == [1]


def test_a_new_engine_does_not_trust_what_took_the_place_of_a_trusted_copy() -> None:
    """The dead engine may not have written it; what was cached below it had read the copy before."""
    state = machine()
    do(state, Admit("a", words([1, 2, 3]), b"", 0, 3))
    do(state, Cache("a", 3, b""))
    do(state, Release("a", ReleaseReason.FINISHED, False))
    do(state, Admit("b", words([1, 2]), b"", 1, 2))
    assert any(isinstance(event, CopiesReplaced) for event in do(state, Cache("b", 2, b"")))
    other = restore(snapshot(state))
    assert state_digest(other) == state_digest(state)
    for each in (state, other):
        do(each, StartEpoch(2, 99))
        assert [node.words for node in each.nodes.values()] == [words([1]).tobytes()]
    assert state_digest(other) == state_digest(state)


def test_a_swap_in_that_nobody_waits_for_uses_nothing_above_it() -> None:
    state = machine(HostPolicy.EXCLUSIVE)
    do(state, Admit("a", words([1, 2, 3]), b"", 0, 3))
    do(state, Cache("a", 3, b""))
    do(state, Release("a", ReleaseReason.FINISHED, False))
    do(state, Admit("b", words([7] * 6), b"", 0, 6))  # the last block of "a" is copied out
    do(state, FinishTransfer(1, Outcome.DONE, 1))
    do(state, Release("b", ReleaseReason.FINISHED, False))
    do(state, Admit("c", words([1, 2, 3]), b"", 3, 3))
    do(state, Admit("d", words([1, 2]), b"", 0, 2))
    do(state, Cache("d", 2, b""))
    *_, replaced = do(state, Release("c", ReleaseReason.ABORTED, False))
    assert state.transfers[2].leaf is not None
    assert isinstance(replaced, CopiesReplaced) and not state.duplicating


def test_a_copy_that_is_replaced_before_its_step_is_cached_ahead_until_that_is_over() -> None:
    state = machine(HostPolicy.WRITE_THROUGH)
    do(state, Admit("a", words([1, 2]), b"", 0, 2))
    do(state, Cache("a", 2, b""))
    do(state, Release("a", ReleaseReason.FINISHED, False))
    do(state, Admit("b", words([1, 2]), b"", 1, 2))
    assert isinstance(do(state, Cache("b", 2, b"", 1))[-1], CopiesReplaced)
    leaf = state.requests[2].leaf
    assert leaf.uncomputed and [list(event.sources) for event in do(state, Backup(leaf.id))] == [[0]]  # type: ignore[union-attr]
    do(state, Cache("b", 2, b"", 2))
    assert not leaf.uncomputed


def test_who_ends_early_does_not_let_out_what_another_has_cached_ahead() -> None:
    """Both share the step that computes it; one is aborted before, and the other's block is not written yet."""
    state = machine(HostPolicy.WRITE_THROUGH)
    do(state, Admit("a", words([1, 2]), b"", 0, 2))
    do(state, Cache("a", 2, b"", 0))
    leaf = state.requests[1].leaf
    do(state, Admit("b", words([1, 2]), b"", 2, 0))
    do(state, Cache("b", 2, b"", 0))
    do(state, Release("b", ReleaseReason.ABORTED, False))
    assert not do(state, Backup(leaf.id))
    do(state, Cache("a", 2, b"", 2))
    assert do(state, Backup(leaf.id))
