"""Applying the life of a request: match, allocate, reassign, trim, release."""

from __future__ import annotations

import itertools
from array import array

from statemachine.apply.expect import (
    expect_blocks,
    expect_cut,
    expect_free,
    expect_granted,
    node_of,
    request_of,
    violated,
)
from statemachine.events import (
    DEVICE,
    SWAP_IN,
    AllocationRefused,
    BlocksAllocated,
    BlocksReassigned,
    BlocksTrimmed,
    IntArray,
    RequestMatched,
    RequestReleased,
)
from statemachine.state import tree
from statemachine.state.nodes import ALL, Node, Request
from statemachine.state.ownership import owner
from statemachine.state.state import State


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
        if transfer.direction != SWAP_IN:
            busy = set(transfer.sources)
            transfer.held.extend([block for block in blocks if block in busy])
            blocks = array("i", [block for block in blocks if block not in busy])
    state.device.free.extend(blocks)


def request_matched(state: State, event: RequestMatched) -> None:
    """A request begins and pins its path."""
    number, leaf_id, cut, upper, device_blocks, host_blocks, key, namespace, words = event
    if number != state.next_request or key in state.keys:
        violated(event, f"request {number} ({key!r}) is not the next new one")
    namespace_root = state.roots.get(namespace)
    leaf = namespace_root
    nodes: list[Node] = []
    found = device_blocks + host_blocks
    if leaf_id:
        node = leaf = node_of(state, event, leaf_id)
        if cut or upper:
            if not cut or not upper:
                violated(event, "a cut needs a new id and the other way round")
            expect_cut(state, event, leaf, cut, upper)
        length = leaf.start + (cut or leaf.size)
        on_device = length
        while node.parent is not None:
            nodes.append(node)
            if node.device is None:
                on_device -= cut if cut and node is leaf else node.size
                if not node.matchable():
                    violated(event, f"a run on the path to {leaf.id} is still arriving on the host")
            node = node.parent
        if node is not namespace_root:
            violated(event, f"run {leaf.id} is not in the namespace of the request")
        if on_device != device_blocks or length != found:
            violated(event, f"the path to run {leaf.id} has {on_device} blocks on the device, {length} in all")
    elif found or cut or upper:
        violated(event, "blocks without a run")

    if leaf is None:
        leaf = tree.root(state, namespace)
    elif upper:
        leaf = nodes[0] = tree.split(state, leaf, cut, upper)
    request = Request(number, key, namespace, leaf, words)
    tree.pin(state, leaf)
    if state.opened.backup_after > 1:
        tree.count_use(state, nodes)
    table = request.table
    for node in reversed(nodes):
        if node.device is None:
            break
        table.extend(node.device)
        if not node.device_ready:
            assert node.transfer is not None
            request.waits.setdefault(node.transfer.id, node.start)
            node.transfer.waiters[request.id] = None
    state.requests[number] = request
    state.keys[key] = number
    state.next_request = number + 1
    counters = state.counters
    counters.requests += 1
    counters.queried_blocks += found + len(words) // state.block_bytes
    counters.device_hit_blocks += device_blocks
    counters.host_hit_blocks += host_blocks


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
        free = state.device.free
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


def _wait_for_held(
    state: State, request: Request, position: int, stop: int, plain: int, event: BlocksAllocated
) -> None:
    """Of the granted blocks, those from ``position`` to ``stop`` go to ``request``; copies still read the last ones."""
    first = plain
    for id, held in zip(event.after, event.held):
        begin, end = max(first, position), min(first + held, stop)
        if begin < end:
            request.waits.setdefault(id, len(request.table) + begin - position)
            state.transfers[id].waiters[request.id] = None
        first += held


def allocation_refused(state: State, event: AllocationRefused) -> None:
    """Changes nothing."""


def blocks_reassigned(state: State, event: BlocksReassigned) -> None:
    """Private blocks change their request."""
    source, target = request_of(state, event, event.request), request_of(state, event, event.target)
    if source is target or source.waits:
        violated(event, f"blocks cannot move from request {source.key!r} to {target.key!r}")
    tail = source.table[source.leaf.end :]
    if event.blocks == tail[len(tail) - len(event.blocks) :]:
        del source.table[len(source.table) - len(event.blocks) :]
        target.table.extend(event.blocks)
        return
    moved = set(event.blocks)
    if len(moved) != len(event.blocks) or not moved.issubset(tail):
        wrong = next((block for block in event.blocks if block not in tail), event.blocks[0])
        violated(event, f"DEVICE block {wrong} is not request {source.key!r}'s: {owner(state, DEVICE, wrong)}")
    source.table = source.table[: source.leaf.end] + array("i", [block for block in tail if block not in moved])
    target.table.extend(event.blocks)


def blocks_trimmed(state: State, event: BlocksTrimmed) -> None:
    """Private blocks become free."""
    request = request_of(state, event, event.request)
    length = len(request.table) - len(event.blocks)
    if length < request.leaf.end:
        violated(event, f"only {len(request.table) - request.leaf.end} blocks of {request.key!r} can be trimmed")
    if event.blocks != request.table[length:][::-1]:
        _free_some(state, event, request)
        return
    give_back(state, request, event.blocks)
    del request.table[length:]
    for id in [id for id, position in request.waits.items() if position >= length]:
        del request.waits[id]
        del state.transfers[id].waiters[request.id]


def _free_some(state: State, event: BlocksTrimmed, request: Request) -> None:
    """Private blocks from anywhere behind the path become free."""
    end = request.leaf.end
    tail = request.table[end:]
    gone = set(event.blocks)
    if request.waits or len(gone) != len(event.blocks) or not gone.issubset(tail):
        wrong = next((block for block in event.blocks if block not in tail), event.blocks[0])
        violated(event, f"DEVICE block {wrong} is not request {request.key!r}'s: {owner(state, DEVICE, wrong)}")
    request.table = request.table[:end] + array("i", [block for block in tail if block not in gone])
    state.device.free.extend(event.blocks)


def _merges(event: RequestReleased, loose: list[Node]) -> list[tuple[Node, list[Node]]]:
    """Which of the runs that nobody holds any more, deepest first, absorb which."""
    if len(event.merged) != len(event.absorbed):
        violated(event, "merges do not fit")
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
    number, _, final, merged, absorbed, blocks = event
    request = request_of(state, event, number)
    own = request.private()[::-1]
    if blocks != own:
        expect_blocks(state, event, DEVICE, blocks, own, f"private to {request.key!r}")
    merges: list[tuple[Node, list[Node]]] = []
    if final or merged or absorbed:
        loose = tree.loosened(request.leaf)
        if final > len(loose) or any(len(run.children) > (1 if i else 0) for i, run in enumerate(loose[:final])):
            violated(event, f"the deepest {final} runs are not the end of everything")
        merges = _merges(event, loose)

    if request.computed != ALL:
        for node in state.path(request.leaf):
            node.ahead = False
    tree.unpin(state, request.leaf, final=final)
    if request.waits:
        for id in request.waits:
            del state.transfers[id].waiters[number]
        give_back(state, request, blocks)
    else:
        state.device.free.extend(blocks)
    del state.requests[number]
    del state.keys[request.key]
    for lower, ancestors in merges:
        tree.absorb(state, lower, ancestors)
