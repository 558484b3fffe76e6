"""Deciding the life of a request: match, admit, extend, allocate, trim, give back, reassign, release."""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Callable
from typing import Any, Final

from statemachine.commands import Admit, Allocate, Extend, GiveBack, Match, Reassign, Release, Settle, Trim
from statemachine.decide.capacity import available_blocks, can_allocate, out_of_blocks
from statemachine.decide.duplicates import replaced_after
from statemachine.decide.eviction import Supply, device_supply
from statemachine.decide.hits import follow, kept_by, matched, path_of, swapped_in
from statemachine.decide.lookup import find_path, ready_request, request_named
from statemachine.decide.sides import admitted, expect_no_groups, grown, released, settle, short_of, trimmed, worthwhile
from statemachine.errors import InvalidCommand, OutOfBlocks, RequestNotReady, UnknownRequest
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksReassigned,
    BlocksTrimmed,
    Event,
    IntArray,
    RequestExtended,
    RequestReleased,
)
from statemachine.items import uncut
from statemachine.state.nodes import Node, Request
from statemachine.state.state import State
from statemachine.state.tree import loosened

_NONE: IntArray = array("Q")
_NO_COUNTS: IntArray = array("I")
_MUCH_LONGER: Final = 8
_LONG_BYTES: Final = 1 << 16
"""A run does not absorb one of more content words than that, and so many times its own blocks: copying them costs more
than another run in every path. So a turn of a long conversation is not paid with a copy of all that was said."""


def _admit(state: State, command: Admit) -> list[Event]:
    path = path_of(state, command)
    if state.groups:
        path = worthwhile(state, command, path)
    cut, device, host = path.cut, path.device, path.host
    blocks = command.blocks
    if command.new_tokens >= 0:
        blocks = device + host + -(-command.new_tokens // state.opened.block_size)
    wanted = max(blocks - device, host)
    least = max(command.must_fit - device, wanted)
    kept, own = kept_by(path)
    reserved = command.watermark if state.requests else 0
    available = available_blocks(state) - own - reserved
    supply = None
    if least <= available:
        supply = device_supply(state, wanted, kept, host, state.next_node + (1 if cut else 0))
    if supply is None:
        leaf = path.leaf.id if path.leaf is not None else 0
        refused = AllocationRefused(0, least, max(min(available, least - 1), 0), leaf, path.cut, command.request_id)
        raise out_of_blocks(state, refused, device + least, reserved=reserved)
    sides = admitted(state, command, path, device + wanted) if state.groups else ()
    events: list[Event] = [matched(state, command, path), *supply.events]
    if host:
        events.append(swapped_in(state, path, supply, events))
    count = wanted - host
    if count:
        events.append(_granted(array("Q", [state.next_request]), array("I", [count]), supply, count))
    events += sides
    return events


def _match(state: State, command: Match) -> list[Event]:
    expect_no_groups(state, "match", "admit the request, which gives it the blocks of all groups")
    path = path_of(state, command)
    if not path.host:
        return [matched(state, command, path)]
    while True:
        kept, own = kept_by(path)
        host = min(path.host, available_blocks(state) - own)
        supply = None
        if host == path.host:
            supply = device_supply(state, host, kept, host, state.next_node + (1 if path.cut else 0))
        if supply is not None:
            events: list[Event] = [matched(state, command, path), *supply.events]
            if host:
                events.append(swapped_in(state, path, supply, events))
            return events
        # The device has no room for all of the host part now: match only what fits.
        shorter = path.device + (host if host < path.host else 0)
        path = find_path(state, command.words, command.namespace, max(shorter, 0), command.items)


def _granted(requests: IntArray, counts: IntArray, supply: Supply, total: int) -> BlocksAllocated:
    blocks, after, held = supply.take(total)
    return BlocksAllocated(requests, counts, after, held, blocks)


def _allocate(state: State, command: Allocate) -> list[Event]:
    numbers = state.numbers
    try:
        requests = array("Q", [numbers[request_id] for request_id in command.request_ids])
    except KeyError as error:
        raise UnknownRequest(f"no live request {error.args[0]!r}: nothing was allocated") from None
    total = sum(command.counts)
    if not total:
        return []
    available = available_blocks(state)
    supply = device_supply(state, total) if total <= available else None
    if supply is None or (state.groups and short_of(state, total)):
        raise _batch_refused(state, command, requests, total, available if supply is None else -1)
    granted = _granted(requests, array("I", command.counts), supply, total)
    if state.groups:
        return [*supply.events, granted, *grown(state, requests, command.counts)]
    return [*supply.events, granted]


def _batch_refused(state: State, command: Allocate, requests: IntArray, total: int, available: int) -> OutOfBlocks:
    """The error for an allocation that does not fit: how many requests would, and the first that does not.

    ``available``: device blocks, where these are too few; else -1, and a side group has too few.
    """
    sums = [0, *itertools.accumulate(command.counts)]
    if available < 0:
        return _side_refused(state, command, requests, sums)
    fitting, most = 0, bisect.bisect_right(sums, available) - 1
    while fitting < most:  # fewer than are available where copies in flight are in the way
        middle = (fitting + most + 1) // 2
        if can_allocate(state, sums[middle]):
            fitting = middle
        else:
            most = middle - 1
    while state.groups and short_of(state, sums[fitting]):
        fitting -= 1
    longest, culprit = 0, fitting
    for index, (id, count) in enumerate(zip(requests, command.counts)):
        length = len(state.requests[id].table) + count
        if length > max(longest, state.device.pool.capacity):
            culprit = index  # one that never fits is meant, wherever it stands
        longest = max(longest, length)
    request = requests[0] if len(requests) == 1 else 0
    refused = AllocationRefused(request, total, min(available, total - 1), 0, 0, command.request_ids[culprit])
    return out_of_blocks(state, refused, longest, fitting=fitting, requests=len(requests))


def _side_refused(state: State, command: Allocate, requests: IntArray, sums: list[int]) -> OutOfBlocks:
    """The same where the device has enough blocks of group 0, and a side group has not."""
    fitting = 0
    while not short_of(state, sums[fitting + 1]):
        fitting += 1
    group = short_of(state, sums[-1])
    available = len(state.sides[group - 1].pool.free)
    request = requests[0] if len(requests) == 1 else 0
    held = len(state.requests[requests[fitting]].sides[group - 1].blocks())
    refused = AllocationRefused(request, sums[-1], available, 0, 0, command.request_ids[fitting], group)
    longest = held + command.counts[fitting]
    return out_of_blocks(state, refused, longest, fitting=fitting, requests=len(requests))


def _extend(state: State, command: Extend) -> list[Event]:
    request = ready_request(state, command.request_id)
    end = request.leaf.end
    if request.leaf.distrusted:
        return []  # nothing is found below it, and its own copies may be better than the runs'
    if state.groups:
        command = command._replace(limit=end)  # nothing that others have computed is of use to every group
    node, cut, found = _further(state, request, command.limit)
    if request.items and not state.opened.chunked_multimodal:
        shorter = uncut(request.items, end + found, state.opened.block_size)
        if shorter < end + found:
            node, cut, found = _further(state, request, shorter)
    if not found and not request.duplicate_ranges:
        return []
    upper = state.next_node if cut else 0
    leaf = node.id if found else 0
    own = request.own_copies(end + found)[::-1]
    return [RequestExtended(request.number, leaf, cut, upper, found, own)]


def _further(state: State, request: Request, limit: int) -> tuple[Node, int, int]:
    """What is valid on the device below a request's path, to ``limit`` blocks: (deepest run, its cut, blocks)."""
    words = memoryview(request.words)[: max(limit - request.leaf.end, 0) * state.block_bytes]
    node, cut, found, _ = follow(request.leaf, words, request.items, state.block_bytes, valid=True)
    return node, cut, found


def _trim(state: State, command: Trim) -> list[Event]:
    request = request_named(state, command.request_id)
    if not request.leaf.end <= command.blocks <= len(request.table):
        raise InvalidCommand(
            f"request {command.request_id!r} has {len(request.table)} blocks, the first {request.leaf.end} are cached: "
            f"it cannot be trimmed to {command.blocks}"
        )
    blocks = request.table[command.blocks :][::-1]
    if not blocks:
        return []
    if not state.groups:
        return [BlocksTrimmed(request.number, blocks)]
    fixed = request.fixed(state.opened.block_size)
    if command.blocks < fixed:
        raise InvalidCommand(
            f"tokens in the first {fixed} blocks of request {command.request_id!r} are settled, and what their "
            f"window has left is gone: it cannot be trimmed to {command.blocks}"
        )
    return [*trimmed(state, request, command.blocks), BlocksTrimmed(request.number, blocks)]


def _give_back(state: State, command: GiveBack) -> list[Event]:
    expect_no_groups(state, "give_back", "trim the request")
    request = ready_request(state, command.request_id)
    tail = set(request.table[request.leaf.end :])
    if len(set(command.blocks)) != len(command.blocks) or not tail.issuperset(command.blocks):
        wrong = sorted(set(command.blocks) - tail)
        raise InvalidCommand(f"blocks {wrong[:8]} are not request {command.request_id!r}'s own, or named twice")
    return [BlocksTrimmed(request.number, array("i", command.blocks))] if command.blocks else []


def _reassign(state: State, command: Reassign) -> list[Event]:
    expect_no_groups(state, "reassign", "release the one request and admit the other")
    source, target = request_named(state, command.request_id), request_named(state, command.target)
    if source is target:
        raise InvalidCommand("blocks cannot be reassigned to the request that has them")
    if source.waits_for:
        raise RequestNotReady(
            f"request {command.request_id!r} still waits for transfers {[*source.waits_for]}: poll() first"
        )
    tail = source.table[source.leaf.end :]
    if command.blocks == tail[len(tail) - len(command.blocks) :]:  # the last ones, as they were allocated
        return [BlocksReassigned(source.number, target.number, command.blocks)] if command.blocks else []
    if len(set(command.blocks)) != len(command.blocks) or not set(tail).issuperset(command.blocks):
        wrong = sorted(set(command.blocks) - set(tail))
        raise InvalidCommand(f"blocks {wrong[:8]} are not request {command.request_id!r}'s own, or named twice")
    return [BlocksReassigned(source.number, target.number, command.blocks)] if command.blocks else []


def _release(state: State, command: Release) -> list[Event]:
    request = request_named(state, command.request_id)
    loose = loosened(request.leaf)
    final = 0
    if command.final:
        for index, run in enumerate(loose):
            if len(run.children) > (1 if index else 0):
                break
            final += 1
    merged, absorbed = _merges(loose, final) if len(loose) > 1 else (_NONE, _NO_COUNTS)
    blocks = request.private()[::-1]
    event = RequestReleased(request.number, command.reason, final, merged, absorbed, blocks)
    events: list[Event] = [*released(state, request), event] if state.groups else [event]
    return [*events, *replaced_after(state, request)] if state.duplicating else events


def _merges(loose: list[Node], final: int) -> tuple[IntArray, IntArray]:
    """Which of these runs (deepest first) absorb how many of their ancestors; none across the border of ``final``."""
    merged, absorbed = array("Q"), array("I")
    index = 0
    while index < len(loose):
        stop = index + 1
        size = loose[index].size
        while stop < len(loose) and stop != final and loose[stop - 1].can_absorb(loose[stop]):
            above = loose[stop]
            if above.size > _MUCH_LONGER * size and len(above.words) > _LONG_BYTES:
                break
            size += above.size
            stop += 1
        if stop - index > 1:
            merged.append(loose[index].id)
            absorbed.append(stop - index - 1)
        index = stop
    return merged, absorbed


REQUESTS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Match: _match,
    Admit: _admit,
    Extend: _extend,
    Allocate: _allocate,
    Trim: _trim,
    GiveBack: _give_back,
    Reassign: _reassign,
    Settle: settle,
    Release: _release,
}
