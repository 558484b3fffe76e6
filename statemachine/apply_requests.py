"""Applying the life of a request: match, allocate, reassign, trim, release."""

from __future__ import annotations

import itertools
from array import array

from statemachine import tree
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksReassigned,
    BlocksTrimmed,
    Direction,
    IntArray,
    RequestMatched,
    RequestReleased,
    Tier,
)
from statemachine.expect import expect_blocks, expect_cut, expect_granted, node_of, request_of, violated
from statemachine.ownership import owner
from statemachine.state import Node, Request, State


def take_granted(state: State, plain: int, after: IntArray, held: IntArray) -> None:
    """Take granted ids from their owners."""
    free = state.device.free
    del free[len(free) - plain :]
    for id, count in zip(after, held, strict=True):
        blocks = state.transfers[id].held
        del blocks[len(blocks) - count :]


def give_back(state: State, request: Request, blocks: IntArray) -> None:
    """Free private blocks; those that a copy still reads belong to its transfer until it ends."""
    for id in request.waits:
        transfer = state.transfers[id]
        if transfer.direction != Direction.SWAP_IN:
            busy = set(transfer.sources)
            transfer.held.extend([block for block in blocks if block in busy])
            blocks = array("i", [block for block in blocks if block not in busy])
    state.device.free.extend(blocks)


def request_matched(state: State, event: RequestMatched) -> None:
    """A request begins and pins its path."""
    if event.request != state.next_request or event.key in state.keys:
        violated(event, f"request {event.request} ({event.key!r}) is not the next new one")
    namespace_root = state.roots.get(event.namespace)
    leaf = namespace_root
    nodes: list[Node] = []
    if event.leaf:
        node = leaf = node_of(state, event, event.leaf)
        if bool(event.cut) != bool(event.upper):
            violated(event, "a cut needs a new id and the other way round")
        expect_cut(state, event, leaf, event.cut, event.upper)
        on_device = 0
        while node.parent is not None:
            nodes.append(node)
            if node.device is not None:
                on_device += event.cut if event.upper and node is leaf else node.size
            elif not node.matchable():
                violated(event, f"a run on the path to {leaf.id} is still arriving on the host")
            node = node.parent
        if node is not namespace_root:
            violated(event, f"run {leaf.id} is not in the namespace of the request")
        length = leaf.start + event.cut if event.upper else leaf.end
        if on_device != event.device_blocks or length != event.device_blocks + event.host_blocks:
            violated(event, f"the path to run {leaf.id} has {on_device} blocks on the device, {length} in all")
    elif event.device_blocks or event.host_blocks or event.cut or event.upper:
        violated(event, "blocks without a run")

    if leaf is None:
        leaf = tree.root(state, event.namespace)
    elif event.upper:
        leaf = nodes[0] = tree.split(state, leaf, event.cut, event.upper)
    request = Request(event.request, event.key, event.namespace, leaf, event.words)
    tree.pin(state, leaf)
    table = request.table
    for node in reversed(nodes):
        if node.device is None:
            break
        table.extend(node.device)
        if not node.device_ready:
            assert node.transfer is not None
            request.waits.setdefault(node.transfer.id, node.start)
            node.transfer.waiters[request.id] = None
    state.requests[request.id] = request
    state.keys[request.key] = request.id
    state.next_request += 1
    counters = state.counters
    counters.requests += 1
    counters.queried_blocks += leaf.end + len(event.words) // state.block_bytes
    counters.device_hit_blocks += event.device_blocks
    counters.host_hit_blocks += event.host_blocks


def blocks_allocated(state: State, event: BlocksAllocated) -> None:
    """Free blocks become private."""
    if len(event.requests) != len(event.counts) or sum(event.counts) != len(event.blocks):
        violated(event, "requests, counts and blocks do not fit")
    requests = [request_of(state, event, id) for id in event.requests]
    plain = expect_granted(state, event, event.blocks, event.after, event.held)
    take_granted(state, plain, event.after, event.held)
    position = 0
    for request, count in zip(requests, event.counts):
        stop = position + count
        if stop > plain:
            first = plain
            for id, held in zip(event.after, event.held):
                begin, end = max(first, position), min(first + held, stop)
                if begin < end:
                    request.waits.setdefault(id, len(request.table) + begin - position)
                    state.transfers[id].waiters[request.id] = None
                first += held
        request.table.extend(event.blocks[position:stop])
        position = stop
    state.counters.allocated_blocks += len(event.blocks)


def allocation_refused(state: State, event: AllocationRefused) -> None:
    """Changes nothing."""


def blocks_reassigned(state: State, event: BlocksReassigned) -> None:
    """Private blocks change their request."""
    source, target = request_of(state, event, event.request), request_of(state, event, event.target)
    if source is target or source.waits:
        violated(event, f"blocks cannot move from request {source.key!r} to {target.key!r}")
    moved = set(event.blocks)
    tail = source.table[source.leaf.end :]
    if len(moved) != len(event.blocks) or not moved.issubset(tail):
        wrong = next((block for block in event.blocks if block not in tail), event.blocks[0])
        violated(event, f"DEVICE block {wrong} is not request {source.key!r}'s: {owner(state, Tier.DEVICE, wrong)}")
    source.table = source.table[: source.leaf.end] + array("i", [block for block in tail if block not in moved])
    target.table.extend(event.blocks)


def blocks_trimmed(state: State, event: BlocksTrimmed) -> None:
    """Private blocks become free."""
    request = request_of(state, event, event.request)
    length = len(request.table) - len(event.blocks)
    if length < request.leaf.end:
        violated(event, f"only {len(request.table) - request.leaf.end} blocks of {request.key!r} can be trimmed")
    expect_blocks(state, event, Tier.DEVICE, event.blocks, request.table[length:][::-1], f"the end of {request.key!r}")
    give_back(state, request, event.blocks)
    del request.table[length:]
    for id in [id for id, position in request.waits.items() if position >= length]:
        del request.waits[id]
        del state.transfers[id].waiters[request.id]


def _merges(event: RequestReleased, loose: list[Node]) -> list[tuple[Node, list[Node]]]:
    """Which of the runs that nobody holds any more, deepest first, absorb which."""
    merges: list[tuple[Node, list[Node]]] = []
    position = 0
    for id, count in zip(event.merged, event.absorbed):
        while position < len(loose) and loose[position].id != id:
            position += 1
        group = loose[position : position + count + 1]
        if len(group) != count + 1 or not count or position < event.final < position + count + 1:
            violated(event, f"run {id} cannot absorb {count} ancestors")
        if not all(tree.joinable(lower, upper) for lower, upper in itertools.pairwise(group)):
            violated(event, f"run {id} and its ancestors differ in residency, or have other children")
        merges.append((group[0], group[1:]))
        position += count + 1
    return merges


def request_released(state: State, event: RequestReleased) -> None:
    """A request ends; its path is unpinned, its runs merge."""
    request = request_of(state, event, event.request)
    expect_blocks(state, event, Tier.DEVICE, event.blocks, request.private()[::-1], f"private to {request.key!r}")
    if len(event.merged) != len(event.absorbed):
        violated(event, "merges do not fit")
    loose = []
    node = request.leaf
    while node.parent is not None and node.pins == 1:
        loose.append(node)
        node = node.parent
    if event.final > len(loose) or any(
        len(run.children) > (1 if i else 0) for i, run in enumerate(loose[: event.final])
    ):
        violated(event, f"the deepest {event.final} runs are not the end of everything")
    merges = _merges(event, loose) if event.merged else []

    for id in request.waits:
        del state.transfers[id].waiters[request.id]
    tree.unpin(state, request.leaf, final=event.final)
    give_back(state, request, event.blocks)
    del state.requests[request.id]
    del state.keys[request.key]
    for lower, ancestors in merges:
        tree.absorb(state, lower, ancestors)
