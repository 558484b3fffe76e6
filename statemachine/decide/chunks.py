"""Deciding what an engine asks for between two steps: extend a path, mark what is computed, give single blocks back."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from statemachine.apply.chunks import own_copies
from statemachine.commands import Cache, Extend, GiveBack
from statemachine.errors import InvalidCommand, RequestNotReady, UnknownRequest
from statemachine.events import BlocksComputed, BlocksTrimmed, Event, RequestExtended
from statemachine.state import tree
from statemachine.state.nodes import ALL, Request
from statemachine.state.state import State


def _ready_request(state: State, key: str) -> Request:
    id = state.keys.get(key)
    if id is None:
        raise UnknownRequest(f"no live request {key!r}: it was never admitted, or it was released")
    request = state.requests[id]
    if request.waits:
        raise RequestNotReady(f"request {key!r} still waits for transfers {[*request.waits]}: poll() first")
    return request


def _extend(state: State, command: Extend) -> list[Event]:
    request = _ready_request(state, command.key)
    words = memoryview(request.words)
    block_bytes = state.block_bytes
    stop = min(len(words), max(command.limit - request.leaf.end, 0) * block_bytes)
    node = request.leaf
    offset = cut = 0
    while offset < stop and not cut:
        child = node.children.get(bytes(words[offset : offset + block_bytes]))
        if child is None or not child.device_ready:
            break
        common = tree.common_blocks(child.words, words[:stop], offset, block_bytes)
        cut = common if common < child.size else 0
        offset += common * block_bytes
        node = child
    if not offset and not request.duplicates:
        return []
    found = offset // block_bytes
    upper = state.next_node if cut else 0
    leaf = node.id if offset else 0
    own = own_copies(request, request.leaf.end + found)[::-1]
    return [RequestExtended(request.id, leaf, cut, upper, found, own)]


def mark_computed(request: Request, command: Cache) -> list[Event]:
    """The event that says up to where a request is computed, if that is news."""
    computed = command.computed
    if computed is None:
        if request.computed >= command.blocks:
            return []
        computed = command.blocks
    elif not 0 <= computed < ALL or (request.computed != ALL and computed < request.computed):
        raise InvalidCommand(f"{computed!r} is no number of computed blocks, or less than before ({request.computed})")
    return [BlocksComputed(request.id, computed)] if computed != request.computed else []


def _give_back(state: State, command: GiveBack) -> list[Event]:
    request = _ready_request(state, command.key)
    tail = set(request.table[request.leaf.end :])
    if len(set(command.blocks)) != len(command.blocks) or not tail.issuperset(command.blocks):
        wrong = sorted(set(command.blocks) - tail)
        raise InvalidCommand(f"blocks {wrong[:8]} are not request {command.key!r}'s own, or named twice")
    return [BlocksTrimmed(request.id, array("i", command.blocks))] if command.blocks else []


CHUNKS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Extend: _extend,
    GiveBack: _give_back,
}
