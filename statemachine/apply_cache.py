"""Applying what happens to cached blocks: cache, evict, clear, resize, a lost tier."""

from __future__ import annotations

from array import array

from statemachine import tree
from statemachine.events import (
    BlocksCached,
    BlocksEvicted,
    CacheCleared,
    Direction,
    HostPolicy,
    IntArray,
    PoolResized,
    Tier,
    TierLost,
)
from statemachine.expect import expect_blocks, expect_cut, node_of, request_of, violated
from statemachine.ownership import owner
from statemachine.state import Node, Request, State


def blocks_cached(state: State, event: BlocksCached) -> None:
    """A request's computed blocks enter the tree."""
    request = request_of(state, event, event.request)
    path_end = request.leaf.end
    bottom = node_of(state, event, event.leaf) if event.leaf else request.leaf
    chain: list[Node] = []
    node = bottom
    while node is not request.leaf:
        chain.append(node)
        if node.parent is None:
            violated(event, f"run {event.leaf} is not below the path of request {request.key!r}")
        node = node.parent
    chain.reverse()
    if event.upper:
        if not chain:
            violated(event, "a run of the request's own path cannot be cut")
        expect_cut(state, event, bottom, event.cut, event.upper)
    known = bottom.end - path_end - (bottom.size - event.cut if event.upper else 0)
    words = request.words + event.words
    total = event.duplicates + len(event.blocks)
    fresh = total - known
    if known != event.duplicates + event.taken or fresh < 0 or bool(fresh) != bool(event.node):
        violated(event, f"{known} blocks are known below the path, {total} are cached")
    content = b"".join([run.words for run in chain])[: known * state.block_bytes]
    if len(words) < total * state.block_bytes or not words.startswith(content):
        violated(event, "the words of the request and of the runs differ")
    valid = sum(run.size for run in chain if run.device_ready)
    if event.upper and bottom.device_ready:
        valid -= bottom.size - event.cut
    if valid != event.duplicates:
        violated(event, f"{valid} blocks are valid on the device, not {event.duplicates}")
    new_id = state.next_node + (1 if event.upper else 0)
    parent_children = bottom.children
    if event.upper:
        stop = (event.cut + 1) * state.block_bytes
        parent_children = {bottom.words[event.cut * state.block_bytes : stop]: bottom}
    first_words = words[known * state.block_bytes : (known + 1) * state.block_bytes]
    if event.node and (event.node != new_id or (first_words in parent_children)):
        violated(event, f"run {event.node} cannot be made below run {bottom.id}")
    if any(position < path_end + total for position in request.waits.values()):
        violated(event, f"request {request.key!r} still waits for {[*request.waits]}")
    own = request.table[path_end + event.duplicates : path_end + total]
    expect_blocks(state, event, Tier.DEVICE, event.blocks, own, f"next in the block table of {request.key!r}")

    if event.upper:
        bottom = tree.split(state, bottom, event.cut, event.upper)
        chain[-1] = bottom
    for run in chain:
        if not run.pins:
            tree.leave_orders(state, run)
        run.pins += 1
    position = 0
    for run in chain:
        if not run.device_ready:
            _take_over(state, run, event.blocks[position : position + run.size])
            position += run.size
    leaf = bottom
    if event.node:
        content = words[known * state.block_bytes : total * state.block_bytes]
        leaf = Node(event.node, bottom, bottom.end, content, fresh)
        leaf.device = event.blocks[position:]
        leaf.device_ready = True
        leaf.pins = 1
        tree.attach(state, leaf)
        state.next_node = event.node + 1
    if event.duplicates:
        request.duplicates.append((path_end, path_end + event.duplicates))
    request.leaf = leaf
    request.words = words[total * state.block_bytes :]
    state.counters.cached_blocks += len(event.blocks)
    state.counters.duplicate_blocks += event.duplicates


def _take_over(state: State, node: Node, blocks: IntArray) -> None:
    """A known run without a valid device copy gets a request's computed blocks."""
    transfer = node.transfer
    exclusive = state.policy == HostPolicy.EXCLUSIVE
    if transfer is not None:
        index = next(i for i, part in enumerate(transfer.parts) if part.node is node)
        part = transfer.parts[index]
        if transfer.direction == Direction.SWAP_IN:
            part.discard = True
            for id in transfer.waiters:
                _replace(state.requests[id], node, blocks)
        elif exclusive:
            part.node = None
            state.host_resident -= node.size
            node.host = node.transfer = None
    elif exclusive:
        assert node.host is not None
        state.host.free.extend(node.host[::-1])
        state.host_resident -= node.size
        node.host = None
        node.host_ready = False
    node.device = blocks
    node.device_ready = True


def _replace(request: Request, node: Node, blocks: IntArray) -> None:
    """Waiters of a swap-in that was overtaken use the computed blocks, if the run is on their path."""
    path = request.leaf
    while path.parent is not None and path is not node:
        path = path.parent
    if path is node:
        request.table[node.start : node.end] = blocks


def blocks_evicted(state: State, event: BlocksEvicted) -> None:
    """Cached copies become free."""
    tier = Tier(event.tier)
    if len(event.nodes) != len(event.counts) or not event.nodes:
        violated(event, "runs and counts do not fit")
    nodes = [node_of(state, event, id) for id in event.nodes]
    gone: set[Node] = set()
    position = 0
    for node, count in zip(nodes, event.counts, strict=True):
        last = node is nodes[-1]
        _expect_evictable(state, event, tier, node, count, last)
        other = node.host if tier == Tier.DEVICE else node.device
        for child in node.children.values():
            copy = child.device if tier == Tier.DEVICE else child.host
            if child not in gone and (copy is not None or other is None):
                violated(event, f"run {node.id} has the cached child {child.id}")
        ids = node.device if tier == Tier.DEVICE else node.host
        assert ids is not None
        stop = position + count
        expected = ids[node.size - count :][::-1]
        expect_blocks(state, event, tier, event.blocks[position:stop], expected, f"the end of run {node.id}")
        position = stop
        if count == node.size:
            gone.add(node)
    if position != len(event.blocks):
        violated(event, f"{position} blocks belong to these runs, the event names {len(event.blocks)}")

    position = 0
    for node, count in zip(nodes, event.counts, strict=True):
        blocks = event.blocks[position : position + count]
        position += count
        if event.upper and node is nodes[-1]:
            tree.split(state, node, node.size - count, event.upper)
        if tier == Tier.DEVICE:
            _evict_device(state, node, count, blocks)
        else:
            _evict_host(state, node, count, blocks)


def _expect_evictable(state: State, event: BlocksEvicted, tier: Tier, node: Node, count: int, last: bool) -> None:
    ids, ready = (node.device, node.device_ready) if tier == Tier.DEVICE else (node.host, node.host_ready)
    if node.pins or ids is None or not ready:
        violated(event, f"run {node.id} ({node.pins} pins) is not evictable on {tier.name}")
    if node.transfer is not None and (tier == Tier.HOST or node.transfer.direction != Direction.BACKUP):
        violated(event, f"run {node.id} is in transfer {node.transfer.id}")
    partial = count != node.size
    if not 0 < count <= node.size or (partial and not last):
        violated(event, f"{count} of the {node.size} blocks of run {node.id} cannot be evicted")
    if last:
        other = node.host if tier == Tier.DEVICE else node.device
        if bool(event.upper) != (partial and other is not None):
            violated(event, f"run {node.id} has to be cut exactly if it keeps a copy on the other tier")
        if event.upper:
            expect_cut(state, event, node, node.size - count, event.upper)


def _evict_device(state: State, node: Node, count: int, blocks: IntArray) -> None:
    state.evictable -= count
    state.counters.device_evicted_blocks += count
    (state.device.free if node.transfer is None else node.transfer.held).extend(blocks)
    if count < node.size:
        _truncate(state, node, count)
        return
    (state.final if node in state.final else state.device_order).remove(node)
    node.device = None
    node.device_ready = False
    if node.host is None:
        tree.detach(state, node)


def _evict_host(state: State, node: Node, count: int, blocks: IntArray) -> None:
    state.host_resident -= count
    state.counters.host_evicted_blocks += count
    state.host.free.extend(blocks)
    if count < node.size:
        _truncate(state, node, count)
        return
    state.host_order.remove(node)
    node.host = None
    node.host_ready = False
    if node.device is None:
        tree.detach(state, node)


def _truncate(state: State, node: Node, count: int) -> None:
    """Cut off the last ``count`` blocks of a run that has one copy only and no children."""
    node.size -= count
    node.words = node.words[: node.size * state.block_bytes]
    if node.device is not None:
        node.device = node.device[: node.size]
    if node.host is not None:
        node.host = node.host[: node.size]


def cache_cleared(state: State, event: CacheCleared) -> None:
    """Nothing cached so far matches again."""
    if event.generation != state.generation + 1:
        violated(event, f"generation {state.generation} is not followed by {event.generation}")
    state.generation = event.generation
    # by name: a restored state knows no order in which namespaces appeared
    state.retired.extend(state.roots[namespace] for namespace in sorted(state.roots))
    state.roots = {}
    for node in list(state.device_order):
        state.device_order.remove(node)
        state.final.append(node)


def pool_resized(state: State, event: PoolResized) -> None:
    """The highest block ids come or go."""
    tier = Tier(event.tier)
    pool = state.pool(tier)
    capacity = event.blocks + (state.opened.host_staging_blocks if tier == Tier.HOST else 0)
    kept = array("i", [block for block in pool.free if block < capacity])
    if len(pool.free) - len(kept) != max(pool.capacity - capacity, 0):
        free = set(pool.free)
        block = next(block for block in range(capacity, pool.capacity) if block not in free)
        violated(event, f"{tier.name} block {block} is in use by {owner(state, tier, block)}")
    pool.free = array("i", range(capacity - 1, pool.capacity - 1, -1)) + kept
    pool.capacity = capacity
    if tier == Tier.HOST:
        state.host_blocks = event.blocks


def tier_lost(state: State, event: TierLost) -> None:
    """All copies on the tier are gone."""
    tier = Tier(event.tier)
    if state.transfers or (tier == Tier.DEVICE and state.requests):
        violated(event, "transfers (and for the device, requests) have to end first")
    pool = state.pool(tier)
    order = list(state.host_order) if tier == Tier.HOST else [*state.final, *state.device_order]
    pinned = [node for node in state.nodes.values() if node.pins and tier == Tier.HOST and node.host is not None]
    for node in order:
        ids = node.host if tier == Tier.HOST else node.device
        assert ids is not None
        if tier == Tier.HOST:
            _evict_host(state, node, node.size, ids[::-1])
        else:
            _evict_device(state, node, node.size, ids[::-1])
    for node in pinned:
        assert node.host is not None
        pool.free.extend(node.host[::-1])
        state.host_resident -= node.size
        node.host = None
        node.host_ready = False
