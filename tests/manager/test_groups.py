"""A manager whose model has layers of several kinds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy, InvalidCommand, OutOfBlocks, ReleaseReason
from kvledger.groups import chunk, full, scratch, state, static, window
from statemachine.events import KIND_OF, SideAllocated, SideFreed, WindowPassed
from statemachine.records.snapshot import state_digest
from statemachine.state.groups import Group

NAME = f"groups-{os.getpid()}"
CONFIG = CacheConfig(
    block_size=4,
    device_blocks=40,
    groups=(full(), window(10, blocks=20, replay=10), chunk(16, blocks=20), scratch(blocks=4), static(blocks=5)),
)


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    with CacheManager.create(NAME, CONFIG) as manager:
        yield manager


def test_a_table_for_each_group(manager: CacheManager) -> None:
    admission = manager.admit("r", [*range(22)], static_tokens=9)
    assert [len(table) for table in admission.block_tables] == [6, 6, 6, 1, 3]
    assert all(table.dtype == "int32" for table in admission.block_tables)
    assert admission.block_tables[0] is admission.block_table and not admission.replay_tokens
    manager.commit({"r": 22})
    tables = [list(table) for table in manager.block_tables("r")]
    assert tables == [[0, 1, 2, 3, 4, 5], [-1, -1, -1, 3, 4, 5], [-1, -1, -1, -1, 4, 5], [0], [0, 1, 2]]
    assert [manager.available_blocks(group) for group in range(5)] == [34, 17, 18, 3, 2]


def test_a_hit_is_replayed_from_where_every_group_has_what_it_needs(manager: CacheManager) -> None:
    manager.admit("first", [*range(80)])
    manager.commit({"first": 80})
    admission = manager.admit("second", [*range(80)])
    assert (admission.cached_tokens, admission.replay_tokens) == (76, 12)  # 66 is no border of a chunk, 64 is
    assert list(admission.block_tables[1] < 0) == [True] * 16 + [False] * 4
    manager.commit({"second": 80})
    assert not manager.admit("short", [*range(15)]).cached_tokens  # computing all of it again is no hit


def test_decoding_holds_a_window_and_no_more(manager: CacheManager) -> None:
    manager.admit("r", [1] * 5)
    manager.commit({"r": 5})
    for length in range(6, 120):
        manager.append("r", 1)
        growth = manager.grow({"r": length})
        assert growth.refusal is None
        for request, new in growth.new_blocks.items():
            assert [len(table) for table in growth.new_side_blocks[request]] == [len(new), len(new), 0, 0]
        manager.commit({"r": length})
        held = [int((table >= 0).sum()) for table in manager.block_tables("r")]
        assert held[1] <= 4 and held[2] <= 4


def test_what_a_group_lacks_is_told_and_made(manager: CacheManager) -> None:
    for number in range(4):
        manager.admit(f"r{number}", [number] * 4)
    with pytest.raises(OutOfBlocks, match="1 blocks of layer group 3 wanted, 0 free") as refused:
        manager.admit("more", [9] * 4)
    assert refused.value.group == 3 and not refused.value.never_fits
    assert not manager.can_allocate(1, group=3)
    assert manager.preempt(1, ["r3", "r2"], group=3) == ["r3"]
    assert manager.admit("more", [9] * 4).block_tables[3].tolist() == [3]
    with pytest.raises(OutOfBlocks, match=re.escape("admit it in chunks (new_tokens)")):
        manager.admit("long", [8] * 120)
    with pytest.raises(InvalidCommand, match="groups 0 to 4, not 5"):
        manager.available_blocks(5)


def test_a_batch_gets_what_the_shortest_group_allows(manager: CacheManager) -> None:
    manager.admit("a", [1] * 32)
    manager.admit("b", [2] * 32)
    growth = manager.grow({"a": 44, "b": 44})
    assert list(growth.new_blocks) == ["a"] and growth.refused == ["b"]
    assert growth.refusal is not None and growth.refusal.group == 1


def test_drafts_are_trimmed_and_what_is_settled_is_not(manager: CacheManager) -> None:
    manager.admit("r", [1] * 22)
    manager.commit({"r": 22})
    manager.grow({"r": 30})
    manager.trim("r", 6)
    assert [len(table) for table in manager.block_tables("r")] == [6, 6, 6, 1, 0]
    with pytest.raises(InvalidCommand, match="the first 6 blocks of request 'r' are settled"):
        manager.trim("r", 5)


def test_what_windows_have_left_cannot_be_computed_again(manager: CacheManager) -> None:
    """Else an engine that does as it is told reads block -1, and what it publishes then is found by others."""
    manager.admit("r", [*range(23)])
    manager.commit({"r": 18})
    digest = state_digest(manager.state)
    with pytest.raises(InvalidCommand, match="release the request, and admit it again"):
        manager.distrust("r", 17)
    assert state_digest(manager.state) == digest
    manager.distrust("r", 9)
    manager.commit({"r": 23})
    manager.release("r")
    assert manager.admit("s", [*range(23)]).cached_tokens <= 8


def test_an_engine_that_dies_leaves_no_block_of_a_group(manager: CacheManager) -> None:
    manager.admit("r", [*range(40)])
    manager.commit({"r": 40})
    manager.release("r")
    manager.admit("s", [*range(80)])
    manager.commit({"s": 60})
    manager.close(keep=True)
    with CacheManager.open(NAME, CONFIG) as successor:
        assert [successor.available_blocks(group) for group in range(1, 5)] == [20, 20, 4, 5]
        assert successor.admit("t", [*range(40)]).cached_tokens
        assert successor.config.groups == CONFIG.groups
        successor.close(keep=True)
    with pytest.raises(ConfigError, match="groups is"):
        CacheManager.open(NAME, replace(CONFIG, groups=(full(), window(11, blocks=20))))
    with CacheManager.open(NAME) as last:
        assert last.config.groups == CONFIG.groups
        assert state_digest(last._state)


def test_counting_blocks_works_as_counting_tokens_does(manager: CacheManager) -> None:
    manager.admit("r", [*range(40)])
    manager.cache("r")
    assert manager.block_tables("r")[1].tolist()[:8] == [-1] * 7 + [7]
    assert manager.extend("r").cached_blocks == 10


def test_what_knows_no_groups_says_so(manager: CacheManager) -> None:
    manager.admit("r", [*range(10)])
    manager.admit("s", [*range(10)])
    for call in (
        lambda: manager.match("m", [1, 2, 3]),
        lambda: manager.reassign("r", "s", [0]),
        lambda: manager.give_back("r", [0]),
        lambda: manager.release("r", ReleaseReason.ABORTED, hold=True),
    ):
        with pytest.raises(InvalidCommand, match="layer groups"):
            call()


def test_static_tokens_without_a_place_for_them_are_refused() -> None:
    for groups in ((), (full(), window(10, blocks=20))):
        with CacheManager.create(NAME, CacheConfig(block_size=4, device_blocks=40, groups=groups)) as manager:
            for call in (manager.admit, manager.can_admit):
                with pytest.raises(InvalidCommand, match="no static"):
                    call("r", [1, 2, 3], static_tokens=9)
            assert manager.next_sequence == 2


def test_one_group_costs_no_event() -> None:
    seen = []
    with CacheManager.create(NAME, CacheConfig(block_size=4, device_blocks=40, groups=(full(),))) as manager:
        commit = manager._transactions.commit
        manager._transactions.commit = lambda events, apply_them=True: (  # type: ignore[method-assign]
            seen.extend(events),
            commit(events, apply_them),
        )[1]
        admission = manager.admit("r", [*range(22)])
        assert len(admission.block_tables) == 1
        manager.commit({"r": 22})
        manager.grow({"r": 30})
        manager.release("r")
    assert not {SideAllocated, SideFreed, WindowPassed} & {type(event) for event in seen} and len(seen) == 5
    assert {25, 26, 27} == {KIND_OF[event] for event in (SideAllocated, WindowPassed, SideFreed)}


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([full()], "is a tuple of what kvledger.groups makes"),
        ((window(10, blocks=5),), "the first of the groups, and no other, is full"),
        ((full(), full("two")), "the first of the groups, and no other, is full"),
        ((full(), window(10, blocks=0)), "blocks of layer group 'window'"),
        ((full(), window(10, blocks=5, sinks=4, replay=10)), "does not bring its 4 sinks back"),
        ((full(), chunk(0, blocks=5)), "size of layer group 'chunk'"),
        ((full(), state(blocks=5, per_request=6)), "size of layer group 'state'"),
        ((full(), window(10, blocks=5), window(20, blocks=5)), "the same name"),
        ((full(), Group(window(10, blocks=5).kind, "w", 5.0, 10)), "has a name and whole numbers"),  # type: ignore[arg-type]
    ],
)
def test_groups_that_cannot_be(groups: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        CacheConfig(device_blocks=10, groups=groups)


def test_what_is_not_built_is_refused() -> None:
    with pytest.raises(ConfigError, match="device alone"):
        replace(CONFIG, host_blocks=10, host_policy=HostPolicy.EXCLUSIVE)
    with pytest.raises(ConfigError, match="leave out ranks"):
        replace(CONFIG, ranks=1)


def test_the_picture_in_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "groups.md").read_text()
    picture = text.partition("```\nposition")[2].partition("```")[0]
    rows = {row.split("  ")[0]: row for row in picture.splitlines() if row}
    groups = (
        full(),
        window(10, blocks=9),
        window(10, blocks=9, sinks=4, name="sinks"),
        chunk(16, blocks=9),
        state(blocks=9),
        scratch(blocks=9),
        static(blocks=9),
    )
    with CacheManager.create(NAME, CacheConfig(block_size=4, device_blocks=9, groups=groups)) as manager:
        manager.admit("r", [1] * 22, static_tokens=9)
        manager.commit({"r": 22})
        names = ["full()", "window(10)", "window(10,", "chunk(16)", "state()", "scratch()", "static()"]
        for name, table in zip(names, manager.block_tables("r"), strict=True):
            drawn = [cell != "." for cell in re.findall(r"(?<= )(?:\.|\d+)(?=$| )", rows[name][12:50])]
            assert drawn == [bool(block >= 0) for block in table], name
