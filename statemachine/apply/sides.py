"""Applying what happens to the blocks of layer groups beside group 0: granted, left by a window, given back."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import expect_blocks, request_of, violated
from statemachine.events import Event, IntArray, RequestMatched, SideAllocated, SideFreed, WindowPassed
from statemachine.state.groups import NOTHING, resumption
from statemachine.state.nodes import Request, Side, from_end
from statemachine.state.places import Place
from statemachine.state.state import State


def begin_sides(state: State, event: RequestMatched) -> list[Side]:
    """What a request begins with: of what it hit, the windows will have only what is computed again."""
    size = state.opened.block_size
    found = event.device_blocks * size
    start = resumption(state.groups, found)
    if found and not start:
        violated(event, f"a hit of {found} tokens is of no use to the layer groups")
    sides = [Side() for _ in state.groups]
    for group, side in zip(state.groups, sides):
        if group.windowed:
            side.begin = start // size
            side.table = array("i", [NOTHING]) * side.begin
    return sides


def expect_no_sides(state: State, event: Event, request: Request) -> None:
    """A request that ends has given back what it had of the layer groups."""
    for place, side in zip(state.sides, request.sides):
        if side.blocks():
            violated(event, f"request {request.request_id!r} still has {place} blocks {side.blocks().tolist()!r:.200}")


def side_allocated(state: State, event: SideAllocated) -> None:
    """Free blocks become private, at the end of block tables."""
    place = _place(state, event, event.group)
    blocks = event.blocks
    if len(event.requests) != len(event.counts) or sum(event.counts) != len(blocks):
        violated(event, "requests, counts and blocks do not fit")
    requests = [request_of(state, event, id) for id in event.requests]
    free = place.pool.free
    expect_blocks(state, event, place, blocks, from_end(free, len(blocks)), "next on the free list")
    group = state.groups[event.group - 1]
    more = dict.fromkeys(event.requests, 0)
    for request, count in zip(requests, event.counts):
        more[request.number] += count
        if group.windowed and len(request.sides[event.group - 1].table) + more[request.number] > len(request.table):
            violated(event, f"request {request.request_id!r} would have more {place} blocks than device blocks")

    del free[len(free) - len(blocks) :]
    position = 0
    for request, count in zip(requests, event.counts):
        request.sides[event.group - 1].table.extend(blocks[position : position + count])
        position += count


def window_passed(state: State, event: WindowPassed) -> None:
    """What stands before a window becomes free; its place in the block table is empty."""
    place = _place(state, event, event.group)
    group, size = state.groups[event.group - 1], state.opened.block_size
    ids = event.requests
    if len(ids) != len(event.settled) or len({*ids}) < len(ids) or not group.windowed:
        violated(event, "requests and settled tokens do not fit, or the group has no window")
    sinks = group.kept(size)
    expected: IntArray = array("i")
    left: list[tuple[Side, int, int]] = []
    for id, settled in zip(ids, event.settled):
        request = request_of(state, event, id)
        side = request.sides[event.group - 1]
        if not side.settled < settled <= len(side.table) * size:
            violated(
                event, f"{settled} tokens of request {request.request_id!r} cannot be settled, {side.settled} were"
            )
        passed = group.dead(settled) // size
        expected.extend(side.blocks(sinks, max(passed, sinks)))
        left.append((side, settled, passed))
    expect_blocks(state, event, place, event.blocks, expected, "left by a window")

    for side, settled, passed in left:
        side.settled = settled
        if passed > sinks:
            side.table[sinks:passed] = array("i", [NOTHING]) * (passed - sinks)
    place.pool.free.extend(event.blocks)


def side_freed(state: State, event: SideFreed) -> None:
    """The end of a block table becomes free."""
    place = _place(state, event, event.group)
    request = request_of(state, event, event.request)
    side = request.sides[event.group - 1]
    if event.length > len(side.table) or 0 < event.length < max(
        side.begin, -(-side.settled // state.opened.block_size)
    ):
        violated(
            event,
            f"the table of {len(side.table)} {place} blocks of {request.request_id!r} cannot end at {event.length}",
        )
    expected = side.blocks(event.length)[::-1]
    expect_blocks(state, event, place, event.blocks, expected, f"at the end of a table of {request.request_id!r}")

    del side.table[event.length :]
    if not event.length:
        side.begin = side.settled = 0
    place.pool.free.extend(event.blocks)


def _place(state: State, event: Event, group: int) -> Place:
    if not 0 < group <= len(state.sides):
        violated(event, f"there is no layer group {group} beside group 0")
    return state.sides[group - 1]
