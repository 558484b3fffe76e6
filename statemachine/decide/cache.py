"""Deciding what happens to cached blocks: cache, distrust, forget, evict, make room, clear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.commands import Cache, Clear, Distrust, Evict, Forget, MakeRoom
from statemachine.decide.duplicates import replaced_by
from statemachine.decide.eviction import Victim, device_supply, droppable, evicted
from statemachine.decide.hits import follow
from statemachine.decide.lookup import request_named
from statemachine.errors import Busy, InvalidCommand, RequestNotReady
from statemachine.events import BlocksCached, BlocksComputed, BlocksDistrusted, CacheCleared, Event, EvictReason
from statemachine.items import extended
from statemachine.state.nodes import ALL, Node, Request
from statemachine.state.state import State


def _cache(state: State, command: Cache) -> list[Event]:
    request = request_named(state, command.request_id)
    block_bytes = state.block_bytes
    start = request.leaf.end
    count = command.blocks - start
    marked: list[Event] = []
    if command.computed is not None or request.computed != ALL:
        marked = _mark_computed(request, command)
    if count <= 0 and not command.words and not command.items:
        return marked
    if command.blocks > len(request.table):
        raise InvalidCommand(
            f"request {command.request_id!r} has {len(request.table)} blocks, not {command.blocks}: "
            "allocate before caching"
        )
    content = request.words + command.words if command.words else request.words
    if len(command.words) % block_bytes or len(content) < count * block_bytes:
        raise InvalidCommand(
            f"the content of {len(content) / block_bytes:g} full blocks after the first {start} of "
            f"{command.request_id!r} is known, {count} are to be cached: pass the tokens that follow as generated"
        )
    if any(position < command.blocks for position in request.waits_for.values()):
        raise RequestNotReady(
            f"request {command.request_id!r} still waits for transfers {[*request.waits_for]}: poll() first"
        )
    items = extended(request.items, command.items, state.opened.block_size)
    own_words = memoryview(content)[: max(count, 0) * block_bytes]
    node, cut, known, duplicates = follow(request.leaf, own_words, items, block_bytes)
    next_node = state.next_node
    upper = next_node if cut else 0
    new = next_node + bool(cut) if known < count else 0
    own = request.table[start + duplicates : command.blocks]
    leaf = node.id if known else 0
    taken = known - duplicates
    records, words = command.items, command.words
    cached = BlocksCached(request.number, leaf, cut, upper, new, duplicates, taken, own, records, words)
    return [*marked, cached, *replaced_by(state, request, node, cached)] if duplicates else [*marked, cached]


def _mark_computed(request: Request, command: Cache) -> list[Event]:
    """The event that says up to where a request is computed, if that is news."""
    computed = command.computed
    if computed is None:
        if request.computed >= command.blocks:
            return []
        computed = command.blocks
    elif not 0 <= computed < ALL or (request.computed != ALL and computed < request.computed):
        raise InvalidCommand(f"{computed!r} is no number of computed blocks, or less than before ({request.computed})")
    return [BlocksComputed(request.number, computed)] if computed != request.computed else []


def _distrust(state: State, command: Distrust) -> list[Event]:
    request = request_named(state, command.request_id)
    if command.blocks < 0:
        raise InvalidCommand(f"no request has {command.blocks} good blocks")
    node = request.leaf
    if command.blocks >= node.end:
        return []
    while node.start > command.blocks:
        assert node.parent is not None
        node = node.parent
    if node.distrusted:
        return []
    cut = command.blocks - node.start
    return [BlocksDistrusted(request.number, node.id, cut, state.next_node if cut else 0)]


def _evict(state: State, command: Evict) -> list[Event]:
    if command.blocks < 0:
        raise InvalidCommand(f"{command.blocks} blocks cannot be evicted")
    place = state.place(command.tier)
    root = None
    if command.namespace is not None:
        root = state.roots.get(command.namespace)
        if root is None:
            return []
    victims = droppable(place, command.blocks, root, distrusted=command.distrusted)
    if not victims:
        return []
    last = victims[-1]
    upper = state.next_node if not last.emptied and last.node.elsewhere(place.number) else 0
    reason = EvictReason.DISTRUSTED if command.distrusted else EvictReason.CLEARED
    return [evicted(place, victims, reason, upper)]


def _forget(state: State, command: Forget) -> list[Event]:
    node = state.nodes.get(command.node)
    below: Node | None = None
    chain: list[Node] = []
    while node is not None and node.parent is not None and not node.pins and node.transfer is None:
        if any(child is not below for child in node.children.values()):
            break
        chain.append(node)
        below, node = node, node.parent
    events: list[Event] = []
    for place in reversed(state.places):
        victims = [Victim(run, run.size, True) for run in chain if run.copies[place.number] is not None]
        if victims:
            events.append(evicted(place, victims, EvictReason.CLEARED))
    return events


def _make_room(state: State, command: MakeRoom) -> list[Event]:
    if command.blocks < 0:
        raise InvalidCommand(f"{command.blocks} blocks cannot be made free")
    wanted = min(command.blocks, state.device.evictable)
    supply = device_supply(state, len(state.device.pool.free) + wanted)
    return supply.events if supply is not None else []


def _clear(state: State, command: Clear) -> list[Event]:
    if (state.requests or state.transfers) and not command.force:
        raise Busy(
            f"{len(state.requests)} requests and {len(state.transfers)} transfers use the cache: "
            "release and poll first, or force"
        )
    return [CacheCleared(state.generation + 1)]


CACHE: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Cache: _cache,
    Distrust: _distrust,
    Evict: _evict,
    Forget: _forget,
    MakeRoom: _make_room,
    Clear: _clear,
}
