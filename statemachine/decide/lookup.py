"""Looking up what a command names, and what of a prompt is known."""

from __future__ import annotations

from typing import Any

from statemachine.errors import InvalidCommand, RequestNotReady, UnknownRequest, UnknownTransfer
from statemachine.items import by_block, uncut
from statemachine.state.nodes import Request, Transfer
from statemachine.state.state import State
from statemachine.state.tree import Path, find


def request_named(state: State, request_id: Any) -> Request:
    """The live request of that name, a text: whatever a caller passes is looked at here."""
    try:
        id = state.numbers.get(request_id)
    except TypeError:
        raise InvalidCommand(f"the name of a request is a text, not {type(request_id).__name__}") from None
    if id is None:
        raise UnknownRequest(f"no live request {request_id!r}: it was never admitted, or it was released")
    return state.requests[id]


def ready_request(state: State, request_id: str) -> Request:
    """The live request of that name, which waits for no transfer."""
    request = request_named(state, request_id)
    if request.waits_for:
        raise RequestNotReady(f"request {request_id!r} still waits for transfers {[*request.waits_for]}: poll() first")
    return request


def transfer_numbered(state: State, id: int) -> Transfer:
    """The transfer of that number."""
    transfer = state.transfers.get(id)
    if transfer is None:
        raise UnknownTransfer(f"no transfer {id} is in flight; it has ended, or it never began")
    return transfer


def find_path(state: State, words: memoryview, namespace: bytes, limit: int, records: bytes) -> Path:
    """The path that is known, cut back to before an item in which it would end and must not."""
    root = state.roots.get(namespace)
    size = state.opened.block_size
    items = by_block(records, size)
    path = find(state, root, words, limit, items)
    if items and not state.opened.chunked_multimodal:
        found = path.device + path.host
        shorter = uncut(items, found, size)
        if shorter < found:
            path = find(state, root, words, shorter, items)
    return path


def peek(state: State, words: memoryview, namespace: bytes, limit: int, items: bytes = b"") -> tuple[int, int]:
    """Count the leading blocks that a match of at most ``limit`` finds: (on the device, after those on the host)."""
    path = find_path(state, words, namespace, limit, items)
    return path.device, path.host
