"""Applying what happens to cached blocks: cache, evict, clear, resize, a lost tier."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import expect_blocks, expect_cut, node_of, one_of, request_of, violated
from statemachine.apply.transfers import delete
from statemachine.events import (
    BACKUP,
    DEVICE,
    EXCLUSIVE,
    HOST,
    SWAP_IN,
    BlocksCached,
    BlocksEvicted,
    CacheCleared,
    HostPolicy,
    IntArray,
    PoolResized,
    Tier,
    TierLost,
)
from statemachine.state import tree
from statemachine.state.nodes import Node, Request, from_end
from statemachine.state.ownership import owner
from statemachine.state.state import MOST_BLOCKS, State

_TIERS = tuple(Tier)


def blocks_cached(state: State, event: BlocksCached) -> None:
    """A request's computed blocks enter the tree."""
    number, leaf_id, cut, upper, new, duplicates, taken, blocks, generated = event
    request = request_of(state, event, number)
    block_bytes = state.block_bytes
    bottom = path = request.leaf
    path_end = path.start + path.size
    words = request.words + generated if generated else request.words
    known = duplicates + taken
    total = duplicates + len(blocks)
    chain: list[Node] = []
    if leaf_id:
        bottom = node_of(state, event, leaf_id)
        chain = _known_below(state, event, path, bottom, words)
    elif known or upper:
        violated(event, "nothing is known below the request's own path, and that cannot be cut")
    fresh = total - known
    if fresh < 0 or bool(fresh) != bool(new):
        violated(event, f"{known} blocks are known below the path, {total} are cached")
    if len(words) < total * block_bytes:
        violated(event, f"the words of {len(words) // block_bytes} blocks are known, {total} are cached")
    if new:
        siblings = bottom.children
        if upper:
            siblings = {bottom.words[cut * block_bytes : (cut + 1) * block_bytes]: bottom}
        if new != state.next_node + bool(upper) or words[known * block_bytes : (known + 1) * block_bytes] in siblings:
            violated(event, f"run {new} cannot be made below run {bottom.id}")
    if request.waits and any(position < path_end + total for position in request.waits.values()):
        violated(event, f"request {request.key!r} still waits for {[*request.waits]}")
    own = request.table[path_end + duplicates : path_end + total]
    if blocks != own:
        expect_blocks(state, event, DEVICE, blocks, own, "next in the block table of a request")

    if chain:
        if upper:
            bottom = chain[-1] = tree.split(state, bottom, cut, upper)
        position = _join(state, chain, blocks, request.computed)
    else:
        position = 0
    leaf = bottom
    if new:
        leaf = Node(new, bottom, path_end + known, tree.part(words, known * block_bytes, total * block_bytes), fresh)
        leaf.device = blocks[position:]
        leaf.device_ready = True
        leaf.pins = 1
        leaf.ahead = leaf.end > request.computed
        tree.attach(state, leaf)
        state.next_node = new + 1
    if state.opened.backup_after > 1:
        tree.count_use(state, chain if leaf is bottom else [*chain, leaf])
    if duplicates:
        request.duplicates.append((path_end, path_end + duplicates))
        state.counters.duplicate_blocks += duplicates
    request.leaf = leaf
    request.words = words[total * block_bytes :]
    state.counters.cached_blocks += len(blocks)


def _known_below(state: State, event: BlocksCached, path: Node, bottom: Node, words: bytes) -> list[Node]:
    """The runs from a request's path down to ``bottom``, which hold what the request is about to cache."""
    chain: list[Node] = []
    known = duplicates = 0
    node = bottom
    while node is not path:
        chain.append(node)
        size = event.cut if event.upper and node is bottom else node.size
        known += size
        if node.device_ready:
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
    if chain and not words.startswith(tree.part(tree.content_of(chain), 0, known * state.block_bytes)):
        violated(event, "the words of the request and of the runs differ")
    if duplicates != event.duplicates:
        violated(event, f"{duplicates} blocks are valid on the device, not {event.duplicates}")
    return chain


def _join(state: State, chain: list[Node], blocks: IntArray, computed: int) -> int:
    """Pin known runs; those without a valid device copy take the request's blocks. Returns how many are taken."""
    for run in chain:
        if not run.pins:
            tree.leave_orders(state, run)
        run.pins += 1
    position = 0
    for run in chain:
        if not run.device_ready:
            _take_over(state, run, blocks[position : position + run.size])
            run.ahead = run.end > computed
            position += run.size
    return position


def _take_over(state: State, node: Node, blocks: IntArray) -> None:
    """A known run without a valid device copy gets a request's computed blocks."""
    transfer = node.transfer
    exclusive = state.policy == EXCLUSIVE
    if transfer is not None:
        index = next(i for i, part in enumerate(transfer.parts) if part.node is node)
        part = transfer.parts[index]
        if transfer.direction == SWAP_IN:
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
    tier, _, upper, ids, counts, named = event
    if tier not in (0, 1) or len(ids) != len(counts) or not ids:
        violated(event, "tier, runs and counts do not fit")
    device = tier == DEVICE
    victims: list[tuple[Node, int, IntArray]] = []
    gone: set[Node] = set()
    position = 0
    last = len(ids) - 1
    for id, count in zip(ids, counts):
        node = node_of(state, event, id)
        copy, ready, other = (
            (node.device, node.device_ready, node.host) if device else (node.host, node.host_ready, node.device)
        )
        if node.pins or copy is None or not ready or not 0 < count <= node.size or node in gone:
            violated(event, f"{count} blocks of run {id} ({node.pins} pins) are not evictable, or it is named twice")
        if node.transfer is not None and (not device or node.transfer.direction != BACKUP):
            violated(event, f"run {id} is in transfer {node.transfer.id}")
        whole = count == node.size
        if not whole and len(victims) != last:
            violated(event, f"{count} of the {node.size} blocks of run {id} cannot be evicted")
        for child in node.children.values():
            if child not in gone and (other is None or (child.device if device else child.host) is not None):
                violated(event, f"run {id} has the cached child {child.id}")
        blocks = named[position : position + count]
        end = from_end(copy, count)
        if blocks != end:
            expect_blocks(state, event, Tier(tier), blocks, end, f"the end of run {id}")
        position += count
        victims.append((node, count, blocks))
        if whole:
            gone.add(node)
    if position != len(named):
        violated(event, f"{position} blocks belong to these runs, the event names {len(named)}")
    if bool(upper) != (not whole and other is not None):
        violated(event, f"run {node.id} has to be cut exactly if it keeps a copy on the other tier")
    if upper:
        expect_cut(state, event, node, node.size - count, upper)
        tree.split(state, node, node.size - count, upper)
    evict = _evict_device if device else _evict_host
    for node, count, blocks in victims:
        evict(state, node, count, blocks)


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
    tier = one_of(event, _TIERS, event.tier)
    pool = state.pool(tier)
    capacity = event.blocks + (state.opened.host_staging_blocks if tier == HOST else 0)
    if capacity > MOST_BLOCKS:
        violated(event, f"a pool has {MOST_BLOCKS} blocks at most")
    kept = array("i", [block for block in pool.free if block < capacity])
    if len(pool.free) - len(kept) != max(pool.capacity - capacity, 0):
        free = set(pool.free)
        block = next(block for block in range(capacity, pool.capacity) if block not in free)
        violated(event, f"{tier.name} block {block} is in use by {owner(state, tier, block)}")
    pool.free = array("i", range(capacity - 1, pool.capacity - 1, -1)) + kept
    pool.capacity = capacity
    if tier == HOST:
        state.host_blocks = event.blocks


def tier_lost(state: State, event: TierLost) -> None:
    """All copies on the tier are gone; runs that have no other copy go, with all below them."""
    tier = one_of(event, _TIERS, event.tier)
    if state.transfers or (tier == DEVICE and state.requests):
        violated(event, "transfers (and for the device, requests) have to end first")
    if tier == DEVICE and not event.pools:
        violated(event, "there is no doing without the device tier")
    if tier == DEVICE:
        for node in [*state.final, *state.device_order]:
            assert node.device is not None
            state.evictable -= node.size
            state.counters.device_evicted_blocks += node.size
            state.device.free.extend(node.device[::-1])
            (state.final if node in state.final else state.device_order).remove(node)
            node.device = None
            node.device_ready = False
            if node.host is None:
                delete(state, node)
    else:
        for node in list(state.host_order):
            assert node.host is not None
            _evict_host(state, node, node.size, node.host[::-1])
        for _, node in sorted(state.nodes.items()):
            if node.host is not None:  # on the path of a request, with a device copy
                state.host.free.extend(node.host[::-1])
                state.host_resident -= node.size
                state.counters.host_evicted_blocks += node.size
                node.host = None
                node.host_ready = False
        if not event.pools:
            state.policy = HostPolicy.OFF
    if event.pools:
        state.pools = event.pools
