"""Every invariant fires: a sound state is corrupted, and exactly that violation is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from statemachine import check
from statemachine.apply import apply, genesis
from statemachine.apply.tree import drop_copy, put_copy
from statemachine.commands import Admit, Cache, Command, FinishTransfer, Release
from statemachine.content import Item
from statemachine.decide import decide
from statemachine.errors import InvariantViolation
from statemachine.events import (
    BlocksAllocated,
    BlocksEvicted,
    HostPolicy,
    LedgerOpened,
    Outcome,
    QuarantineEnded,
    ReleaseReason,
    RequestReleased,
    TransferFinished,
    WorkerLost,
    blocks,
)
from statemachine.items import item_records
from statemachine.records.snapshot import SnapshotError, restore, snapshot, state_digest
from statemachine.state.nodes import Side
from statemachine.state.state import State
from tests.statemachine.test_machine import words


def sound_state() -> State:
    """Nine device blocks; "b" holds a run, "c" waits for a swap-in, a path of two runs is unused."""
    state = genesis(LedgerOpened(1, 9, 8, 4, HostPolicy.EXCLUSIVE, 1, "", ""))

    def do(command: Command) -> None:
        for event in decide(state, command):
            apply(state, event)

    def whole(key: str, prompt: list[int]) -> None:
        do(Admit(key, words(prompt), b"", 99, len(prompt)))
        for id in list(state.transfers):
            do(FinishTransfer(id, Outcome.DONE, len(state.transfers[id].targets)))
        do(Cache(key, len(prompt), b""))

    whole("a", [1, 2, 3])
    do(Release("a", ReleaseReason.FINISHED, False))
    whole("u", [20, 21])
    whole("v", [20, 21, 22])
    whole("w", [20, 21, 23])  # the run [20, 21] has two children
    for key in "uvw":
        do(Release(key, ReleaseReason.FINISHED, False))
    whole("b", [50, 51, 52])  # sends [2, 3] to the host
    whole("x", [20, 21, 22])
    do(Release("x", ReleaseReason.FINISHED, False))
    do(Admit("c", words([1, 2, 3]), b"", 99, 3))
    assert not check.check(state)
    assert state.transfers and any(transfer.waiters for transfer in state.transfers.values())
    return state


def lose_a_block(state: State) -> None:
    owner = next(request for request in state.requests.values() if request.request_id == "b")
    state.device.pool.capacity += 1
    assert owner


def free_twice(state: State) -> None:
    state.host.pool.free.append(state.host.pool.free[0])


def forget_a_pin(state: State) -> None:
    next(node for node in state.nodes.values() if node.pins).pins += 1


def parent_off_the_device(state: State) -> None:
    lower = next(n for n in state.device.lru if n.parent is not None and n.parent.parent is not None)
    upper = lower.parent
    assert upper is not None and upper.device is not None and not upper.pins
    state.device.pool.free.extend(upper.device.ids)
    drop_copy(state.device, upper)
    put_copy(state.host, upper, state.host.pool.free[: upper.size], True)
    del state.host.pool.free[: upper.size]


def unlink_a_child(state: State) -> None:
    root = next(iter(state.roots.values()))
    key, child = next(iter(root.children.items()))
    del root.children[key]
    root.children[b"else"] = child


def ancestor_first(state: State) -> None:
    lower = next(n for n in state.device.lru if n.parent is not None and n.parent.parent is not None)
    state.device.lru.remove(lower)
    state.device.lru.append(lower)


def miscount_residents(state: State) -> None:
    state.host.resident += 1


def forget_a_waiter(state: State) -> None:
    next(transfer for transfer in state.transfers.values() if transfer.waiters).waiters.clear()


def permute_a_table(state: State) -> None:
    table = next(request for request in state.requests.values() if request.request_id == "c").table
    table[0], table[1] = table[1], table[0]


def forget_who_computes(state: State) -> None:
    next(node for node in state.nodes.values() if node.pins and node.valid()).uncomputed = True


def find_what_turned_out_bad(state: State) -> None:
    node = next(node for node in state.nodes.values() if node.pins and not node.children)
    node.distrusted = True


def misremember_the_match(state: State) -> None:
    next(request for request in state.requests.values() if request.request_id == "b").matched = 1


def see_what_is_no_group(state: State) -> None:
    next(iter(state.requests.values())).sides = [Side()]


def an_image_of_tokens(state: State) -> None:
    request = next(request for request in state.requests.values() if request.leaf.id)
    node = state.path(request.leaf)[0]
    assert node.parent is not None
    del node.parent.children[node.content(state.block_bytes)]
    request.items = node.items = {node.start: item_records([Item(b"image", node.start, 1)])}
    node.parent.children[node.content(state.block_bytes)] = node


CORRUPTIONS: list[tuple[Callable[[State], None], str]] = [
    (lose_a_block, "conservation"),
    (free_twice, "conservation"),
    (forget_a_pin, "pin counts"),
    (parent_off_the_device, "residency"),
    (unlink_a_child, "links"),
    (ancestor_first, "orders"),
    (miscount_residents, "in flight"),
    (forget_who_computes, "ahead"),
    (find_what_turned_out_bad, "distrusted"),
    (an_image_of_tokens, "items"),
    (forget_a_waiter, "transfers end"),
    (permute_a_table, "block tables"),
    (misremember_the_match, "block tables"),
    (see_what_is_no_group, "windows"),
]


@pytest.mark.parametrize(("corrupt", "invariant"), CORRUPTIONS, ids=[entry[0].__name__ for entry in CORRUPTIONS])
def test_invariant_fires(corrupt: Callable[[State], None], invariant: str) -> None:
    state = sound_state()
    corrupt(state)
    broken = check.check(state)
    assert broken and {message.partition(":")[0] for message in broken} == {invariant}, broken


def test_all_invariants_are_shown_to_fire() -> None:
    assert {invariant for _, invariant in CORRUPTIONS} == set(check.INVARIANTS)


@pytest.mark.parametrize(
    "event",
    [
        BlocksAllocated(blocks(), blocks(), blocks(), blocks(), blocks([9])),
        BlocksAllocated(blocks([99]), blocks([1]), blocks(), blocks(), blocks([0])),
        BlocksEvicted(0, 0, 0, blocks([99]), blocks([1]), blocks([0])),
        TransferFinished(99, 0, 1, 0),
        QuarantineEnded(99),
        RequestReleased(99, 0, 0, blocks(), blocks(), blocks()),
        WorkerLost(0, 3, ""),
        LedgerOpened(1, 1, 0, 0, 0, 0, "", ""),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_impossible_event_is_named_and_changes_nothing(event: object) -> None:
    state = sound_state()
    before = state_digest(state)
    with pytest.raises(InvariantViolation, match=type(event).__name__ if "Ledger" not in str(event) else "opened once"):
        apply(state, event)  # type: ignore[arg-type]
    assert state_digest(state) == before


def test_snapshots_round_trip_and_refuse_damage() -> None:
    state = sound_state()
    data = snapshot(state)
    assert state_digest(restore(data)) == state_digest(state) and not check.check(restore(data))
    for damaged in (data[:-1], data[:40], b"", b"x" + data[1:]):
        with pytest.raises(SnapshotError):
            restore(damaged)
