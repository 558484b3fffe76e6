"""Which runs, requests and transfers an event can change.

Asked before and after the event is applied, the two answers together name everything that it changed (and some that it
did not), so that a picture of the state can follow a log without looking at all of it at every event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from statemachine.events import BlocksDistrusted, CacheCleared, Event, LedgerOpened, PoolResized, TierLost
from statemachine.mentions import mentions
from statemachine.state.nodes import Node
from statemachine.state.state import State

_SWEEPING = (LedgerOpened, BlocksDistrusted, CacheCleared, PoolResized, TierLost)
"""They can change what they do not name."""


class Changes(NamedTuple):
    """Ids; some of them may not exist (any more, or yet)."""

    runs: set[int]
    requests: set[int]
    transfers: set[int]


def changes_of(state: State, event: Event) -> Changes:
    """What ``event`` can change of ``state``, or has just changed in it."""
    found = Changes(set(), set(), set())
    if isinstance(event, _SWEEPING):
        found.runs.update(state.nodes)
        found.requests.update(state.requests)
        found.transfers.update(state.transfers)
        return found
    named = mentions(event)
    for id in named.requests:
        _request(state, found, id)
    for id in named.nodes:
        found.runs.add(id)
        _path(found, state.nodes.get(id))
    for id in named.transfers:
        _transfer(state, found, id)
    return found


def _request(state: State, found: Changes, id: int) -> None:
    request = state.requests.get(id)
    found.requests.add(id)
    if request is not None:
        found.transfers.update(request.waits_for)
        _path(found, request.leaf)


def _path(found: Changes, leaf: Node | None) -> None:
    node = leaf
    while node is not None and node.parent is not None:
        _run(found, node)
        node = node.parent


def _run(found: Changes, node: Node | None) -> None:
    """A run and its transfer."""
    if node is not None:
        found.runs.add(node.id)
        if node.transfer is not None:
            found.transfers.add(node.transfer.id)


def _transfer(state: State, found: Changes, id: int) -> None:
    """A transfer, all whose path or waiting it may change, and what hangs below its runs."""
    found.transfers.add(id)
    transfer = state.transfers.get(id)
    if transfer is None:
        return
    for waiter in transfer.waiters:
        _request(state, found, waiter)
    if transfer.leaf is not None:
        _path(found, transfer.leaf)
    _below(found, [part.node for part in transfer.parts if part.node is not None])


def _below(found: Changes, nodes: Iterable[Node]) -> None:
    stack = list(nodes)
    while stack:
        node = stack.pop()
        _run(found, node)
        stack.extend(node.children.values())
