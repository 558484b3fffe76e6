"""Applying what happens to a request's own blocks: granted, given back, moved to another request."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import expect_free, expect_granted, request_of, violated
from statemachine.events import (
    SWAP_IN,
    AllocationRefused,
    BlocksAllocated,
    BlocksChosen,
    BlocksReassigned,
    BlocksTrimmed,
    IntArray,
)
from statemachine.state.nodes import Request
from statemachine.state.ownership import owner
from statemachine.state.state import State


def take_granted(state: State, plain: int, after: IntArray, held: IntArray) -> None:
    """Take granted ids from their owners."""
    free = state.device.pool.free
    del free[len(free) - plain :]
    for id, count in zip(after, held, strict=True):
        blocks = state.transfers[id].held_sources
        del blocks[len(blocks) - count :]


def give_back(state: State, request: Request, blocks: IntArray) -> None:
    """Free private blocks; those that a copy still reads belong to its transfer until it ends."""
    for id in request.waits_for:
        transfer = state.transfers[id]
        if transfer.direction != SWAP_IN:
            busy = set(transfer.sources)
            transfer.held_sources.extend([block for block in blocks if block in busy])
            blocks = array("i", [block for block in blocks if block not in busy])
    state.device.pool.free.extend(blocks)


def blocks_allocated(state: State, event: BlocksAllocated) -> None:
    """Free blocks become private."""
    ids, counts, after, held, blocks = event
    total = len(blocks)
    if len(ids) != len(counts) or sum(counts) != total:
        violated(event, "requests, counts and blocks do not fit")
    live = state.requests
    requests = [live[id] if id in live else request_of(state, event, id) for id in ids]
    if held or after:
        plain = expect_granted(state, event, blocks, after, held)
        take_granted(state, plain, after, held)
    else:
        expect_free(state, event, blocks)
        free = state.device.pool.free
        del free[len(free) - total :]
        plain = total
    position = 0
    for request, count in zip(requests, counts):
        stop = position + count
        if stop > plain:
            _wait_for_held(state, request, position, stop, plain, event)
        request.table.extend(blocks[position:stop])
        position = stop
    state.counters.allocated_blocks += total


def blocks_chosen(state: State, event: BlocksChosen) -> None:
    """Free blocks go to the top of the free list."""
    free = state.device.pool.free
    chosen = set(event.blocks)
    if len(chosen) != len(event.blocks) or not chosen.issubset(free):
        taken = chosen.difference(free)
        wrong = next((block for block in event.blocks if block in taken), event.blocks[0])
        violated(event, f"DEVICE block {wrong} is not free, or named twice: {owner(state, state.device, wrong)}")
    free[:] = array("i", [block for block in free if block not in chosen]) + event.blocks[::-1]


def _wait_for_held(
    state: State, request: Request, position: int, stop: int, plain: int, event: BlocksAllocated
) -> None:
    """Of the granted blocks, those from ``position`` to ``stop`` go to ``request``; copies still read the last ones."""
    first = plain
    for id, held in zip(event.after, event.held):
        begin, end = max(first, position), min(first + held, stop)
        if begin < end:
            request.waits_for.setdefault(id, len(request.table) + begin - position)
            state.transfers[id].waiters[request.number] = None
        first += held


def allocation_refused(state: State, event: AllocationRefused) -> None:
    """Changes nothing."""


def blocks_reassigned(state: State, event: BlocksReassigned) -> None:
    """Private blocks change their request."""
    source, target = request_of(state, event, event.request), request_of(state, event, event.target)
    if source is target or source.waits_for:
        violated(event, f"blocks cannot move from request {source.request_id!r} to {target.request_id!r}")
    tail = source.table[source.leaf.end :]
    if event.blocks == tail[len(tail) - len(event.blocks) :]:
        del source.table[len(source.table) - len(event.blocks) :]
        target.table.extend(event.blocks)
        return
    moved = set(event.blocks)
    if len(moved) != len(event.blocks) or not moved.issubset(tail):
        wrong = next((block for block in event.blocks if block not in tail), event.blocks[0])
        violated(
            event, f"DEVICE block {wrong} is not request {source.request_id!r}'s: {owner(state, state.device, wrong)}"
        )
    source.table = source.table[: source.leaf.end] + array("i", [block for block in tail if block not in moved])
    target.table.extend(event.blocks)


def blocks_trimmed(state: State, event: BlocksTrimmed) -> None:
    """Private blocks become free."""
    request = request_of(state, event, event.request)
    length = len(request.table) - len(event.blocks)
    if length < request.leaf.end:
        violated(event, f"only {len(request.table) - request.leaf.end} blocks of {request.request_id!r} can be trimmed")
    if event.blocks != request.table[length:][::-1]:
        _free_some(state, event, request)
        return
    give_back(state, request, event.blocks)
    del request.table[length:]
    for id in [id for id, position in request.waits_for.items() if position >= length]:
        del request.waits_for[id]
        del state.transfers[id].waiters[request.number]


def _free_some(state: State, event: BlocksTrimmed, request: Request) -> None:
    """Private blocks from anywhere behind the path become free."""
    end = request.leaf.end
    tail = request.table[end:]
    gone = set(event.blocks)
    if request.waits_for or len(gone) != len(event.blocks) or not gone.issubset(tail):
        wrong = next((block for block in event.blocks if block not in tail), event.blocks[0])
        violated(
            event, f"DEVICE block {wrong} is not request {request.request_id!r}'s: {owner(state, state.device, wrong)}"
        )
    request.table = request.table[:end] + array("i", [block for block in tail if block not in gone])
    state.device.pool.free.extend(event.blocks)
