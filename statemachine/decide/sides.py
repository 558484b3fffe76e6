"""Deciding about layer groups beside group 0: what a hit is worth to them, their blocks, what a window has left."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from statemachine.commands import Admit, Settle
from statemachine.decide.capacity import out_of_blocks
from statemachine.decide.hits import path_of
from statemachine.decide.lookup import request_named
from statemachine.errors import InvalidCommand
from statemachine.events import AllocationRefused, Event, IntArray, SideAllocated, SideFreed, WindowPassed
from statemachine.state.groups import Kind, resumption
from statemachine.state.nodes import Request, from_end
from statemachine.state.state import State
from statemachine.state.tree import Path


def expect_no_groups(state: State, what: str, instead: str) -> None:
    """Refuse what does not know of layer groups."""
    if state.groups:
        raise InvalidCommand(f"{what} knows of no layer groups, and this ledger has some: {instead}")


def worthwhile(state: State, command: Admit, path: Path) -> Path:
    """The path that a request with side groups pins: none where all of it would have to be computed again."""
    if path.device and not resumption(state.groups, path.device * state.opened.block_size):
        return path_of(state, command._replace(limit=0))
    return path


def admitted(state: State, command: Admit, path: Path, length: int) -> list[Event]:
    """The blocks of all side groups for a request with a block table of that length.

    Raises:
        OutOfBlocks: one of them has too few.
    """
    size = state.opened.block_size
    start = resumption(state.groups, path.device * size)
    begin = start // size
    events: list[Event] = []
    for place, group in zip(state.sides, state.groups):
        if group.kind == Kind.STATIC:
            count = least = -(-command.static_tokens // size)
        elif group.windowed:
            count = length - begin
            most = group.most(max(length * size - start, 0), size)
            least = max(count, min(command.must_fit - begin, most))
        else:
            count = least = group.size
        available = len(place.pool.free)
        if least > available:
            leaf = path.leaf.id if path.leaf is not None else 0
            refused = AllocationRefused(0, least, available, leaf, path.cut, command.request_id, place.group)
            raise out_of_blocks(state, refused, least)
        if count:
            blocks = from_end(place.pool.free, count)
            events.append(SideAllocated(place.group, array("Q", [state.next_request]), array("I", [count]), blocks))
    return events


def short_of(state: State, blocks: int) -> int:
    """The first group beside group 0 in which so many blocks for more positions cannot be had; 0: in none."""
    for place, group in zip(state.sides, state.groups):
        if group.windowed and blocks > len(place.pool.free):
            return place.group
    return 0


def grown(state: State, requests: IntArray, counts: Sequence[int]) -> list[Event]:
    """Blocks of the windowed groups for as many more positions as group 0 gets."""
    events: list[Event] = []
    total = sum(counts)
    for place, group in zip(state.sides, state.groups):
        if group.windowed:
            blocks = from_end(place.pool.free, total)
            events.append(SideAllocated(place.group, requests, array("I", counts), blocks))
    return events


def trimmed(state: State, request: Request, length: int) -> list[Event]:
    """The windowed groups' blocks behind the first ``length`` positions are given back."""
    events: list[Event] = []
    for place, group, side in zip(state.sides, state.groups, request.sides):
        if group.windowed and len(side.table) > length:
            events.append(SideFreed(request.number, place.group, length, side.blocks(length)[::-1]))
    return events


def released(state: State, request: Request) -> list[Event]:
    """All blocks of side groups are given back, before a request ends."""
    events: list[Event] = []
    for place, side in zip(state.sides, request.sides):
        blocks = side.blocks()[::-1]
        if blocks:
            events.append(SideFreed(request.number, place.group, 0, blocks))
    return events


def settle(state: State, command: Settle) -> list[Event]:
    """What the windows of these requests have left. Where none crosses the border of a block there is no event."""
    size = state.opened.block_size
    told = {request_named(state, key).number: tokens for key, tokens in zip(command.request_ids, command.tokens)}
    if len(told) < len(command.request_ids):
        raise InvalidCommand("a request is named twice: its settled tokens are one number")
    events: list[Event] = []
    for place, group in zip(state.sides, state.groups):
        if not group.windowed:
            continue
        sinks = group.kept(size)
        requests, settled, blocks = array("Q"), array("I"), array("i")
        for id in sorted(told):
            side = state.requests[id].sides[place.group - 1]
            if told[id] > len(side.table) * size:
                raise InvalidCommand(
                    f"request {state.requests[id].request_id!r} has room for {len(side.table) * size} tokens, "
                    f"{told[id]} cannot be settled"
                )
            passed = side.passed(group, told[id], size)
            if passed:
                requests.append(id)
                settled.append(told[id])
                blocks.extend(side.blocks(sinks, passed))
        if requests:
            events.append(WindowPassed(place.group, requests, settled, blocks))
    return events
