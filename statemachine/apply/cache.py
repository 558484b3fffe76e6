"""Applying what happens to cached blocks: cache, evict, clear."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import (
    expect_blocks,
    expect_cut,
    expect_items,
    items_with,
    node_of,
    request_of,
    violated,
)
from statemachine.apply.tree import attach, count_use, detach, distrust, drop_copy, pin_below, put_copy, split, truncate
from statemachine.events import (
    BACKUP,
    EXCLUSIVE,
    SWAP_IN,
    BlocksCached,
    BlocksDistrusted,
    BlocksEvicted,
    CacheCleared,
    CopiesReplaced,
    IntArray,
)
from statemachine.items import BlockItems, within
from statemachine.state.duplicates import holds, users
from statemachine.state.nodes import Node, Request, from_end
from statemachine.state.places import Place
from statemachine.state.state import State
from statemachine.state.tree import content_of, part


def blocks_cached(state: State, event: BlocksCached) -> None:
    """A request's computed blocks enter the tree."""
    number, leaf_id, cut, upper, new, duplicates, taken, blocks, records, generated = event
    request = request_of(state, event, number)
    block_bytes = state.block_bytes
    items = items_with(event, request.items, records, state.opened.block_size)
    bottom = path = request.leaf
    path_end = path.start + path.size
    words = request.words + generated if generated else request.words
    known = duplicates + taken
    total = duplicates + len(blocks)
    chain: list[Node] = []
    if leaf_id:
        bottom = node_of(state, event, leaf_id)
        chain = _known_below(state, event, path, bottom, words, items)
    elif known or upper:
        violated(event, "nothing is known below the request's own path, and that cannot be cut")
    fresh = total - known
    if fresh < 0 or bool(fresh) != bool(new):
        violated(event, f"{known} blocks are known below the path, {total} are cached")
    if len(words) < total * block_bytes:
        violated(event, f"the words of {len(words) // block_bytes} blocks are known, {total} are cached")
    if new:
        content = words[known * block_bytes : (known + 1) * block_bytes] + items.get(path_end + known, b"")
        there = content == bottom.content(block_bytes, cut) if upper else content in bottom.children
        if there or new != state.next_node + bool(upper):
            violated(event, f"run {new} cannot be made below run {bottom.id}")
    if request.waits_for and any(position < path_end + total for position in request.waits_for.values()):
        violated(event, f"request {request.request_id!r} still waits for {[*request.waits_for]}")
    own = request.table[path_end + duplicates : path_end + total]
    if blocks != own:
        expect_blocks(state, event, state.device, blocks, own, "next in the block table of a request")

    if chain:
        if upper:
            bottom = chain[-1] = split(state, bottom, cut, upper)
        position = _join(state, chain, blocks, request.computed)
    else:
        position = 0
    leaf = bottom
    if new:
        leaf = Node(new, bottom, path_end + known, part(words, known * block_bytes, total * block_bytes), fresh)
        leaf.items = within(items, leaf.start, leaf.end)
        leaf.pins = 1
        put_copy(state.device, leaf, blocks[position:], True)
        leaf.uncomputed = leaf.end > request.computed
        attach(state, leaf)
        state.next_node = new + 1
    if state.opened.backup_after > 1:
        count_use(state, chain if leaf is bottom else [*chain, leaf])
    if duplicates:
        request.duplicate_ranges.append((path_end, path_end + duplicates))
        state.duplicating[number] = request
        state.counters.duplicate_blocks += duplicates
    request.leaf = leaf
    request.words = words[total * block_bytes :]
    request.items = items
    state.counters.cached_blocks += len(blocks)


def _known_below(
    state: State, event: BlocksCached, path: Node, bottom: Node, words: bytes, items: BlockItems
) -> list[Node]:
    """The runs from a request's path down to ``bottom``, which hold what the request is about to cache."""
    chain: list[Node] = []
    known = duplicates = 0
    node = bottom
    while node is not path:
        chain.append(node)
        size = event.cut if event.upper and node is bottom else node.size
        known += size
        if node.valid():
            duplicates += size
        if node.parent is None:
            violated(event, f"run {bottom.id} is not below the path of request {event.request}")
        node = node.parent
    chain.reverse()
    if event.upper and not chain:
        violated(event, "a run of the request's own path cannot be cut")
    expect_cut(state, event, bottom, event.cut, event.upper)
    if known != event.duplicates + event.taken:
        violated(event, f"{known} blocks are known below the path, not {event.duplicates + event.taken}")
    if chain and bottom.distrusted:
        violated(event, f"run {bottom.id} is distrusted: nobody may find it again")
    if chain and not words.startswith(part(content_of(chain), 0, known * state.block_bytes)):
        violated(event, "the words of the request and of the runs differ")
    for run in chain:
        if items or run.items:
            expect_items(event, run, items, min(run.end, path.end + known))
    if duplicates != event.duplicates:
        violated(event, f"{duplicates} blocks are valid on the device, not {event.duplicates}")
    return chain


def _join(state: State, chain: list[Node], blocks: IntArray, computed: int) -> int:
    """Pin known runs; those without a valid device copy take the request's blocks. Returns how many are taken."""
    pin_below(state, chain)
    position = 0
    for run in chain:
        if not run.valid():
            _take_over(state, run, blocks[position : position + run.size])
            run.uncomputed = run.end > computed
            position += run.size
    return position


def blocks_distrusted(state: State, event: BlocksDistrusted) -> None:
    """From a run of a request's path on nothing matches again."""
    request = request_of(state, event, event.request)
    node = node_of(state, event, event.node)
    if node not in state.path(request.leaf):
        violated(event, f"run {node.id} is not on the path of request {request.request_id!r}")
    if node.distrusted:
        violated(event, f"run {node.id} is distrusted already")
    expect_cut(state, event, node, event.cut, event.upper)
    if event.upper:
        split(state, node, event.cut, event.upper)
    distrust(state, node)


def _take_over(state: State, node: Node, blocks: IntArray) -> None:
    """A known run without a valid device copy gets a request's computed blocks; no exclusive host copy stays."""
    transfer = node.transfer
    if transfer is not None and transfer.direction == SWAP_IN:
        transfer.part_of(node).discard = True
        for id in transfer.waiters:
            _replace(state.requests[id], node, blocks)
    elif state.policy == EXCLUSIVE:
        copy = node.host
        assert copy is not None
        if transfer is None:
            state.host.pool.free.extend(copy.ids[::-1])
        else:
            transfer.part_of(node).node = node.transfer = None
        drop_copy(state.host, node)
    if node.device is not None:
        drop_copy(state.device, node)
    put_copy(state.device, node, blocks, True)


def _replace(request: Request, node: Node, blocks: IntArray) -> None:
    """Waiters of a swap-in that was overtaken use the computed blocks, if the run is on their path."""
    path = request.leaf
    while path.parent is not None and path is not node:
        path = path.parent
    if path is node:
        request.table[node.start : node.end] = blocks


def copies_replaced(state: State, event: CopiesReplaced) -> None:
    """Runs whose blocks nobody uses take the copies of a request that holds them."""
    request = request_of(state, event, event.request)
    nodes = [node_of(state, event, id) for id in event.nodes]
    own, old = array("i"), array("i")
    end = 0
    for node in nodes:
        copy = node.device
        if copy is None or not copy.ready or node.start < end or not holds(request.leaf, node):
            violated(
                event,
                f"run {node.id} is not valid on the device on the path of {request.request_id!r}, or out of order",
            )
        if not request.keeps(node) or users(state, node):
            violated(event, f"run {node.id} is used by others, or {request.request_id!r} has no copy of its own of it")
        own.extend(request.table[node.start : node.end])
        old.extend(copy.ids)
        end = node.end
    if not nodes:
        violated(event, "no run takes anything")
    expect_blocks(state, event, state.device, event.blocks, own, f"a copy of request {request.request_id!r}")
    expect_blocks(state, event, state.device, event.freed, old[::-1], "the device copy of these runs")

    for node in reversed(nodes):
        copy = node.device
        assert copy is not None
        _out_of_use(state, node).extend(copy.ids[::-1])
        copy.ids = request.table[node.start : node.end]
        node.uncomputed = node.end > request.computed
    for node in nodes:
        request.duplicate_ranges = _without(request.duplicate_ranges, node)
        request.replaced_ranges.append((node.start, node.end))
    if not request.duplicate_ranges:
        del state.duplicating[request.number]


def _out_of_use(state: State, node: Node) -> IntArray:
    """Where device blocks go that a run has no more: to the free list, unless a back-up still reads them."""
    transfer = node.transfer
    if transfer is not None and transfer.source == state.device.number:
        return transfer.held_sources
    return state.device.pool.free


def _without(ranges: list[tuple[int, int]], node: Node) -> list[tuple[int, int]]:
    """Ranges less the positions of a run."""
    left = [(start, min(stop, node.start)) for start, stop in ranges]
    right = [(max(start, node.end), stop) for start, stop in ranges]
    return sorted((start, stop) for start, stop in left + right if start < stop)


def blocks_evicted(state: State, event: BlocksEvicted) -> None:
    """Cached copies become free."""
    tier, _, upper, ids, counts, named = event
    if not 0 <= tier < len(state.places) or len(ids) != len(counts) or not ids:
        violated(event, "tier, runs and counts do not fit")
    place = state.places[tier]
    victims: list[tuple[Node, int, IntArray]] = []
    gone: set[Node] = set()
    position = 0
    last = len(ids) - 1
    for id, count in zip(ids, counts):
        node = node_of(state, event, id)
        copy, transfer = node.copies[tier], node.transfer
        if node.pins or copy is None or not copy.ready or not 0 < count <= node.size or node in gone:
            violated(event, f"{count} blocks of run {id} ({node.pins} pins) are not evictable, or it is named twice")
        if transfer is not None and (transfer.direction != BACKUP or transfer.source != tier):
            violated(event, f"run {id} is in transfer {transfer.id}")
        emptied = count == node.size
        if not emptied and len(victims) != last:
            violated(event, f"{count} of the {node.size} blocks of run {id} cannot be evicted")
        if node.children and node.strands(tier, gone):
            violated(event, f"run {id} has a cached child that stays")
        blocks = named[position : position + count]
        end = from_end(copy.ids, count)
        if blocks != end:
            expect_blocks(state, event, place, blocks, end, f"the end of run {id}")
        position += count
        victims.append((node, count, blocks))
        if emptied:
            gone.add(node)
    if position != len(named):
        violated(event, f"{position} blocks belong to these runs, the event names {len(named)}")
    if bool(upper) != (not emptied and node.elsewhere(tier)):
        violated(event, f"run {node.id} has to be cut exactly if it keeps a copy on the other tier")
    if upper:
        expect_cut(state, event, node, node.size - count, upper)
        split(state, node, node.size - count, upper)
    for node, count, blocks in victims:
        _drop_blocks(state, place, node, count, blocks)


def _drop_blocks(state: State, place: Place, node: Node, count: int, blocks: IntArray) -> None:
    """Free the last blocks of a run in one place; those that a back-up still reads when that ends."""
    state.counters.evicted(place.number, count)
    (place.pool.free if node.transfer is None else node.transfer.held_sources).extend(blocks)
    if count < node.size:
        truncate(state, node, count)
        return
    drop_copy(place, node)
    if not node.elsewhere(place.number):
        detach(state, node)


def cache_cleared(state: State, event: CacheCleared) -> None:
    """Nothing cached so far matches again."""
    if event.generation != state.generation + 1:
        violated(event, f"generation {state.generation} is not followed by {event.generation}")
    state.generation = event.generation
    # by name: a restored state knows no order in which namespaces appeared
    state.retired.update((state.roots[namespace], None) for namespace in sorted(state.roots))
    state.roots = {}
    for place in state.places:
        for node in list(place.lru):
            place.lru.remove(node)
            place.final.append(node)
