"""Applying the life of a request: match, extend, what is computed, release."""

from __future__ import annotations

import itertools

from statemachine.apply.blocks import give_back
from statemachine.apply.expect import (
    expect_blocks,
    expect_cut,
    expect_items,
    items_with,
    node_of,
    request_of,
    violated,
)
from statemachine.apply.sides import begin_sides, expect_no_sides
from statemachine.apply.tree import absorb, count_use, ids_of, pin, pin_below, root, split, unpin
from statemachine.events import BlocksComputed, RequestExtended, RequestMatched, RequestReleased
from statemachine.items import NO_ITEMS
from statemachine.state.nodes import ALL, NO_SIDES, Node, Request
from statemachine.state.state import State
from statemachine.state.tree import content_of, loosened, part


def request_matched(state: State, event: RequestMatched) -> None:
    """A request begins and pins its path."""
    number, leaf_id, cut, upper, device_blocks, host_blocks, request_id, namespace, records, words = event
    if number != state.next_request or request_id in state.numbers:
        violated(event, f"request {number} ({request_id!r}) is not the next new one")
    namespace_root = state.roots.get(namespace)
    leaf = namespace_root
    nodes: list[Node] = []
    found = device_blocks + host_blocks
    items = items_with(event, NO_ITEMS, records, state.opened.block_size)
    if leaf_id:
        node = leaf = node_of(state, event, leaf_id)
        if cut or upper:
            if not cut or not upper:
                violated(event, "a cut needs a new id and the other way round")
            expect_cut(state, event, leaf, cut, upper)
        if leaf.distrusted:
            violated(event, f"run {leaf.id} is distrusted: nobody may find it again")
        length = leaf.start + (cut or leaf.size)
        on_device = length
        while node.parent is not None:
            nodes.append(node)
            if items or node.items:
                expect_items(event, node, items, min(node.end, length))
            if node.copies[0] is None:
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
    sides = begin_sides(state, event) if state.groups else NO_SIDES

    if leaf is None:
        leaf = root(state, namespace)
    elif upper:
        leaf = nodes[0] = split(state, leaf, cut, upper)
    request = Request(number, request_id, namespace, leaf, words)
    request.items = items
    request.sides = sides
    pin(state, leaf)
    if state.opened.backup_after > 1:
        count_use(state, nodes)
    table = request.table
    for node in reversed(nodes):
        copy = node.copies[0]
        if copy is None:
            break
        table.extend(copy.ids)
        if not copy.ready:
            assert node.transfer is not None
            request.waits_for.setdefault(node.transfer.id, node.start)
            node.transfer.waiters[request.number] = None
    state.requests[number] = request
    state.numbers[request_id] = number
    state.next_request = number + 1
    counters = state.counters
    counters.requests += 1
    counters.queried_blocks += found + len(words) // state.block_bytes
    counters.device_hit_blocks += device_blocks
    counters.host_hit_blocks += host_blocks


def request_extended(state: State, event: RequestExtended) -> None:
    """A request uses what others have cached behind its path; its own copies are free."""
    request = request_of(state, event, event.request)
    path = request.leaf
    leaf = node_of(state, event, event.leaf) if event.leaf else path
    expect_cut(state, event, leaf, event.cut, event.upper)
    if request.waits_for:
        violated(event, f"request {request.request_id!r} still waits for {[*request.waits_for]}")
    chain: list[Node] = []
    node = leaf
    while node is not path:
        chain.append(node)
        if not node.valid() or node.parent is None:
            violated(
                event, f"run {node.id} is not valid on the device below the path of request {request.request_id!r}"
            )
        node = node.parent
    chain.reverse()
    end = leaf.start + event.cut if event.upper else leaf.end
    length = (end - path.end) * state.block_bytes
    if event.device_blocks != end - path.end:
        violated(event, f"run {leaf.id} is {end - path.end} blocks below the path, not {event.device_blocks}")
    if leaf.distrusted:
        violated(event, f"run {leaf.id} is distrusted: nobody may find it again")
    if chain and not request.words.startswith(part(content_of(chain), 0, length)):
        violated(event, "the words of the request and of the runs differ")
    for run in chain:
        if request.items or run.items:
            expect_items(event, run, request.items, min(run.end, end))
    expected = request.own_copies(end)[::-1]
    expect_blocks(state, event, state.device, event.blocks, expected, f"a copy of request {request.request_id!r}")

    if event.upper:
        leaf = chain[-1] = split(state, leaf, event.cut, event.upper)
    pin_below(state, chain)
    if state.opened.backup_after > 1:
        count_use(state, chain)
    request.table = ids_of(state.path(leaf), 0) + request.table[end:]
    request.joined_ranges += request.duplicate_ranges
    if chain:
        request.joined_ranges.append((path.end, end))
    request.duplicate_ranges = []
    state.duplicating.pop(request.number, None)
    request.leaf = leaf
    request.words = request.words[length:]
    state.device.pool.free.extend(event.blocks)
    state.counters.device_hit_blocks += event.device_blocks


def blocks_computed(state: State, event: BlocksComputed) -> None:
    """What is covered now may be copied out."""
    request = request_of(state, event, event.request)
    request.computed = event.blocks
    for node in state.path(request.leaf):
        if node.end <= event.blocks:
            node.uncomputed = False


def request_released(state: State, event: RequestReleased) -> None:
    """A request ends; its path is unpinned, its runs merge."""
    number, _, final, merged, absorbed, blocks = event
    request = request_of(state, event, number)
    own = request.private()[::-1]
    if blocks != own:
        expect_blocks(state, event, state.device, blocks, own, f"private to {request.request_id!r}")
    if request.sides:
        expect_no_sides(state, event, request)
    merges: list[tuple[Node, list[Node]]] = []
    if final or merged or absorbed:
        loose = loosened(request.leaf)
        if final > len(loose) or any(len(run.children) > (1 if i else 0) for i, run in enumerate(loose[:final])):
            violated(event, f"the deepest {final} runs are not the end of everything")
        merges = _merges(event, loose)

    if request.computed != ALL:
        for node in state.path(request.leaf):
            node.uncomputed = False
    unpin(state, request.leaf, final=final)
    if request.waits_for:
        for id in request.waits_for:
            del state.transfers[id].waiters[number]
        give_back(state, request, blocks)
    else:
        state.device.pool.free.extend(blocks)
    del state.requests[number]
    state.duplicating.pop(number, None)
    del state.numbers[request.request_id]
    for lower, ancestors in merges:
        absorb(state, lower, ancestors)


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
        if not all(lower.can_absorb(upper) for lower, upper in itertools.pairwise(group)):
            violated(event, f"run {id} and its ancestors differ in residency, or have other children")
        merges.append((group[0], group[1:]))
        position += count + 1
    return merges
