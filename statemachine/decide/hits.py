"""Hits: what of a prompt is cached, what a request pins of it, and the swap-in of what is on the host only."""

from __future__ import annotations

from array import array

from statemachine.commands import Admit, Match
from statemachine.decide.eviction import Supply
from statemachine.decide.lookup import find_path
from statemachine.errors import DuplicateRequest, InvalidCommand
from statemachine.events import SWAP_IN, Event, IntArray, RequestMatched, TransferStarted
from statemachine.items import BlockItems
from statemachine.state.nodes import Node
from statemachine.state.state import State
from statemachine.state.tree import Path, find, step


def path_of(state: State, command: Match | Admit) -> Path:
    """The path that a new request would pin."""
    if not isinstance(command.request_id, str):
        raise InvalidCommand(f"the name of a request is a text, not {type(command.request_id).__name__}")
    if command.request_id in state.numbers:
        raise DuplicateRequest(
            f"request {command.request_id!r} is live already: release it first, or choose another name"
        )
    if command.items:
        return find_path(state, command.words, command.namespace, command.limit, command.items)
    return find(state, state.roots.get(command.namespace), command.words, command.limit)


def kept_by(path: Path) -> tuple[dict[Node, int], int]:
    """The runs of a path with how many of their blocks it pins, and how many evictable blocks that takes away."""
    kept: dict[Node, int] = {}
    own = 0
    node = path.leaf
    count = path.cut or (node.size if node is not None else 0)
    while node is not None and node.parent is not None:
        kept[node] = count
        if not node.pins and node.copies[0] is not None:
            own += count
        node = node.parent
        count = node.size
    return kept, own


def matched(state: State, command: Match | Admit, path: Path) -> RequestMatched:
    """The event with which a request begins on that path."""
    key, words, namespace, *_ = command
    cut, device, host = path.cut, path.device, path.host
    leaf = path.leaf.id if path.leaf is not None else 0
    upper = state.next_node if cut else 0
    block_bytes = state.block_bytes
    rest = words[(device + host) * block_bytes : len(words) // block_bytes * block_bytes].tobytes()
    return RequestMatched(state.next_request, leaf, cut, upper, device, host, key, namespace, command.items, rest)


def swapped_in(state: State, path: Path, supply: Supply, events: list[Event]) -> TransferStarted:
    """The swap-in of the host part of a path."""
    nodes, counts, sources = array("Q"), array("I"), array("i")
    node = path.leaf
    assert node is not None
    count = path.cut or node.size
    id = state.next_node if path.cut else node.id
    found: list[tuple[int, IntArray]] = []
    while node is not None and node.copies[0] is None and node.parent is not None:
        copy = node.host
        assert copy is not None
        found.append((id, copy.ids[:count]))
        node = node.parent
        count, id = node.size, node.id
    for id, ids in reversed(found):
        nodes.append(id)
        counts.append(len(ids))
        sources.extend(ids)
    targets, after, held = supply.take(len(sources))
    transfer = state.next_transfer + sum(type(event) is TransferStarted for event in events)
    return TransferStarted(transfer, SWAP_IN, state.next_request, 0, nodes, counts, after, held, sources, targets)


def follow(
    node: Node, words: memoryview, items: BlockItems, block_bytes: int, *, valid: bool = False
) -> tuple[Node, int, int, int]:
    """What is known of ``words`` below ``node``: (deepest run, its cut, known blocks, those valid on the device).

    Args:
        valid: go only through runs that are valid on the device.
    """
    offset = cut = duplicates = 0
    while offset < len(words) and not cut:
        found = step(node, words, offset, items, block_bytes)
        if found is None or (valid and not found[0].valid()):
            break
        node, common = found
        cut = common if common < node.size else 0
        offset += common * block_bytes
        if node.valid():
            duplicates += common
    return node, cut, offset // block_bytes, duplicates
