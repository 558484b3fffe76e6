"""``evict(n)`` gives up exactly n blocks wherever so many can go."""

from __future__ import annotations

from typing import Any

import pytest

from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.commands import Admit, Backup, Cache, Evict, FinishTransfer, Release
from statemachine.decide import decide
from statemachine.decide.derive import redecide
from statemachine.events import BlocksEvicted, HostPolicy, LedgerOpened, Outcome, ReleaseReason, Tier
from statemachine.state.state import State
from tests.statemachine.test_machine import words


@pytest.fixture
def state() -> State:
    """Write-through: paths of which six blocks are on both tiers, and one that is on the device alone."""
    state = genesis(LedgerOpened(1, 16, 16, 0, HostPolicy.WRITE_THROUGH, 1, "", ""))
    for prompt, backed_up in (([1, 2, 3], True), ([1, 2, 3, 4, 5], True), ([1, 2, 3, 6], True), ([9], False)):
        key = str(prompt)
        do(state, Admit(key, words(prompt), b"", 99, len(prompt)))
        do(state, Cache(key, len(prompt), b""))
        if backed_up:
            do(state, Backup(state.requests[state.numbers[key]].leaf.id))
            (transfer,) = state.transfers.values()
            do(state, FinishTransfer(transfer.id, Outcome.DONE, len(transfer.targets)))
        do(state, Release(key, ReleaseReason.FINISHED, False))
    return state


def do(state: State, command: Any) -> int:
    """Returns how many blocks were evicted."""
    events = decide(state, command)
    if events:
        assert redecide(events, state)[1] == events
    for event in events:
        apply(state, event)
        assert not check(state), (command, event, check(state))
    return sum(len(event.blocks) for event in events if isinstance(event, BlocksEvicted))


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("blocks", range(1, 9))
def test_exactly_so_many_go(state: State, tier: Tier, blocks: int) -> None:
    there = 7 if tier == Tier.DEVICE else 6
    assert do(state, Evict(tier, blocks)) == min(blocks, there)
    assert state.place(tier).resident == there - min(blocks, there)
    while left := state.place(tier).resident:
        assert do(state, Evict(tier, 2)) == min(left, 2)
