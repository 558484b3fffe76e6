"""A ledger that follows another manager gets that one's blocks, whatever it would have chosen itself."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from ipc import LogReader
from kvledger import CacheConfig, CacheManager
from kvledger.debugger.explain.wording import Wording
from statemachine.apply import apply
from statemachine.check import check
from statemachine.decide.derive import redecide
from statemachine.errors import InvalidCommand, InvariantViolation
from statemachine.events import BlocksAllocated, BlocksChosen, BlocksEvicted, EngineDeparted, Event
from statemachine.records.replay import event_of
from tests.manager.test_manager import replays

PROMPT = np.arange(16, dtype=np.int32)


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    """Eight blocks of four tokens."""
    with CacheManager.create(f"followed-{os.getpid()}", CacheConfig(block_size=4, device_blocks=8)) as manager:
        yield manager
        assert not check(manager.state) and replays(manager)


def events_of(manager: CacheManager) -> list[Event]:
    reader = LogReader(manager.name)
    try:
        return [event_of(record) for record in reader.poll()]
    finally:
        reader.close()


def test_free_blocks_are_granted_in_the_order_of_the_other(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.adopt_blocks("a", [5, 2, 7])
    assert manager.block_table("a").tolist() == [5, 2, 7]
    manager.adopt_blocks("a", [])
    assert manager.allocate({"a": 1})["a"].tolist() == [0], "the rest is in its order"


def test_what_is_cached_in_them_goes_with_all_below_it(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.adopt_blocks("a", [0, 1, 2, 3])
    manager.cache("a", 4)
    manager.release("a")
    manager.match("b", PROMPT[:9])  # holds the first two; another prompt goes on from there
    assert manager.block_table("b").tolist() == [0, 1]
    manager.adopt_blocks("b", [2, 6])
    assert manager.block_table("b").tolist() == [0, 1, 2, 6]
    assert manager.peek(PROMPT, max_blocks=4) == (2, 0)
    evicted = next(event for event in events_of(manager) if isinstance(event, BlocksEvicted))
    assert list(evicted.blocks) == [3, 2]


def test_a_run_that_loses_its_end_loses_what_forks_below_it(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.adopt_blocks("a", [0, 1, 2, 3])
    manager.cache("a", 4)
    fork = np.concatenate([PROMPT[:8], PROMPT[:8] + 100])
    manager.match("b", fork)
    manager.adopt_blocks("b", [4, 5])
    manager.cache("b", 4)
    manager.release("a")
    manager.release("b")
    manager.match("c", PROMPT + 500)
    manager.adopt_blocks("c", [1])
    assert manager.peek(PROMPT, max_blocks=4) == manager.peek(fork, max_blocks=4) == (1, 0)
    assert {1, 2, 3, 4, 5} == {
        block for event in events_of(manager) if isinstance(event, BlocksEvicted) for block in event.blocks
    }
    assert manager.available_blocks() == 7


def test_what_somebody_uses_is_refused_and_nothing_changes(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.adopt_blocks("a", [4])
    last = len(events_of(manager))
    for blocks in ([4], [1, 1], [1, 99], [1, 4]):
        with pytest.raises(InvalidCommand, match="cannot be adopted by request 'a'"):
            manager.adopt_blocks("a", blocks)
    assert len(events_of(manager)) == last and manager.available_blocks() == 7


def test_a_choice_of_what_is_not_free_contradicts_the_state(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.adopt_blocks("a", [4])
    for blocks in ([4], [1, 1]):
        with pytest.raises(InvariantViolation, match="is not free, or named twice"):
            apply(manager.state, BlocksChosen(array("i", blocks)))


def test_a_departure_is_told_and_changes_nothing(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    manager.note_departure("a", "3 blocks were cached there, 2 here")
    event = events_of(manager)[-1]
    assert event == EngineDeparted(1, "a", "3 blocks were cached there, 2 here")
    assert Wording()(event).endswith("for 'a': 3 blocks were cached there, 2 here")


def test_the_same_is_decided_again(manager: CacheManager) -> None:
    manager.match("a", PROMPT)
    state = manager.state
    events: list[Event] = [
        BlocksChosen(array("i", [6])),
        BlocksAllocated(array("Q", [1]), array("I", [1]), array("Q"), array("I"), array("i", [6])),
    ]
    _, again, why = redecide(events, state)
    assert (again, why) == (events, "")
    departed: list[Event] = [EngineDeparted(1, "a", "x")]
    assert redecide(departed, state)[1] == departed
