"""Which runs, requests and transfers an event can change.

Asked before and after the event is applied, the two answers together name everything that it changed (and some that it
did not), so that a picture of the state can follow a log without looking at all of it at every event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, assert_never

from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksComputed,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    DigestTaken,
    EpochStarted,
    Event,
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    TierLost,
    TransferFinished,
    TransferStarted,
    WorkerJoined,
    WorkerLost,
)
from statemachine.state.nodes import Node
from statemachine.state.state import State


class Touched(NamedTuple):
    """Ids; some of them may not exist (any more, or yet)."""

    runs: set[int]
    requests: set[int]
    transfers: set[int]


def touched(state: State, event: Event) -> Touched:
    """What ``event`` can change of ``state``, or has just changed in it."""
    found = Touched(set(), set(), set())
    match event:
        case RequestMatched() | RequestExtended():
            _request(state, found, event.request)
            _path(found, state.nodes.get(event.leaf), state)
            found.runs.add(event.upper)
        case BlocksAllocated():
            for id in event.requests:
                _request(state, found, id)
        case BlocksCached():
            _request(state, found, event.request)
            _path(found, state.nodes.get(event.leaf), state)
            found.runs.update((event.upper, event.node))
        case BlocksReassigned():
            _request(state, found, event.request)
            _request(state, found, event.target)
        case BlocksTrimmed() | BlocksComputed() | RequestReleased():
            _request(state, found, event.request)
        case BlocksEvicted():
            found.runs.add(event.upper)
            for id in event.nodes:
                _run(found, state.nodes.get(id))
                found.runs.add(id)
        case TransferStarted():
            found.transfers.update((event.transfer, *event.after))
            found.runs.update((event.upper, *event.nodes))
            _request(state, found, event.request)
            for id in event.nodes:
                _path(found, state.nodes.get(id), state)
        case TransferFinished() | QuarantineEnded():
            _transfer(state, found, event.transfer)
            found.runs.add(getattr(event, "upper", 0))
        case LedgerOpened() | CacheCleared() | PoolResized() | TierLost():
            found.runs.update(state.nodes)
            found.requests.update(state.requests)
            found.transfers.update(state.transfers)
        case AllocationRefused() | WorkerJoined() | WorkerLost() | EpochStarted() | DigestTaken():
            pass  # nothing that is drawn
        case _:
            assert_never(event)
    return found


def _request(state: State, found: Touched, id: int) -> None:
    request = state.requests.get(id)
    found.requests.add(id)
    if request is not None:
        found.transfers.update(request.waits)
        _path(found, request.leaf, state)


def _path(found: Touched, leaf: Node | None, state: State) -> None:
    node = leaf
    while node is not None and node.parent is not None:
        _run(found, node)
        node = node.parent


def _run(found: Touched, node: Node | None) -> None:
    """A run and its transfer."""
    if node is not None:
        found.runs.add(node.id)
        if node.transfer is not None:
            found.transfers.add(node.transfer.id)


def _transfer(state: State, found: Touched, id: int) -> None:
    """A transfer, all whose path or waiting it may change, and what hangs below its runs."""
    found.transfers.add(id)
    transfer = state.transfers.get(id)
    if transfer is None:
        return
    for waiter in transfer.waiters:
        _request(state, found, waiter)
    if transfer.leaf is not None:
        _path(found, transfer.leaf, state)
    _below(found, [part.node for part in transfer.parts if part.node is not None])


def _below(found: Touched, nodes: Iterable[Node]) -> None:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        _run(found, node)
        stack.extend(node.children.values())
