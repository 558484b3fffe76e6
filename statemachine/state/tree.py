"""The run-compressed prefix tree: finding a path, and the questions about several runs at once.

Two facts make eviction simple. The whole path from the root is pinned, and on release it is appended to the eviction
order deepest run first: so every descendant stands before its ancestors, and taking from the front *is* leaf-first
eviction. And presence is prefix-closed, so one comparison of a run's content decides the whole run.

Whoever only reads needs this module; what changes the tree is in :mod:`statemachine.apply.tree`.
"""

from __future__ import annotations

from statemachine.items import NO_ITEMS, BlockItems, agreement
from statemachine.state.nodes import Node
from statemachine.state.state import State


class Path:
    """What a walk along a prompt's words found."""

    __slots__ = ("blocked", "cut", "device", "host", "leaf")

    def __init__(self, leaf: Node | None, cut: int, device: int, host: int, blocked: bool) -> None:
        self.leaf = leaf
        """Deepest run reached; ``None`` when the namespace has no tree yet."""
        self.cut = cut
        """Blocks of ``leaf`` that belong to the path, when not all of them do; else 0."""
        self.device = device
        """Blocks with a place on the device, counted from the root."""
        self.host = host
        """Blocks after those that are on the host only."""
        self.blocked = blocked
        """The walk ended before a block whose only copy cannot be read yet (:meth:`Node.matchable`)."""


def common_blocks(run: bytes, words: memoryview, offset: int, block_bytes: int) -> int:
    """How many leading blocks of ``run`` equal ``words`` from ``offset``, at least one: a binary search.

    No step compares again what is known to be equal.
    """
    low, high = 1, min(len(run), len(words) - offset) // block_bytes
    step = high - low
    while low < high:
        start, stop = low * block_bytes, (low + step) * block_bytes
        if run.startswith(words[offset + start : offset + stop], start):
            low += step
        else:
            high = low + step - 1
        step = (high - low + 1) // 2
    return low


def find(state: State, root: Node | None, words: memoryview, limit: int, items: BlockItems = NO_ITEMS) -> Path:
    """Follow ``words``, and the ``items`` in them, from ``root`` for at most ``limit`` blocks.

    One dictionary lookup and one comparison per run; the tree holds content, so there is nothing to collide.
    """
    block_bytes = state.block_bytes
    stop = min(limit * block_bytes, len(words) // block_bytes * block_bytes)
    words = words[:stop]
    node = root
    offset = device = cut = 0
    on_device = True
    blocked = False
    while node is not None and offset < stop and not cut:
        content = words[offset : offset + block_bytes].tobytes()
        if items:
            content += items.get(offset // block_bytes, b"")
        child = node.children.get(content)
        if child is None:
            break
        if child.copies[0] is None:
            if not child.matchable():
                blocked = True
                break
            if on_device:
                device = offset // block_bytes
                on_device = False
        node = child
        common = common_blocks(child.words, words, offset, block_bytes)
        if items:
            common = agreement(child.items, items, node.start, node.start + common) - node.start
        cut = common if common < child.size else 0
        offset += common * block_bytes
    found = offset // block_bytes
    if on_device:
        return Path(node, cut, found, 0, blocked)
    return Path(node, cut, device, found - device, blocked)


def step(node: Node, words: memoryview, offset: int, items: BlockItems, block_bytes: int) -> tuple[Node, int] | None:
    """The child of ``node`` in which ``words`` go on from ``offset``, and how many of its blocks they share."""
    content = words[offset : offset + block_bytes].tobytes()
    if items:
        content += items.get(node.end, b"")
    child = node.children.get(content)
    if child is None:
        return None
    common = common_blocks(child.words, words, offset, block_bytes)
    if items:
        common = agreement(child.items, items, child.start, child.start + common) - child.start
    return child, common


def content_of(nodes: list[Node]) -> bytes:
    """The words of consecutive runs."""
    return nodes[0].words if len(nodes) == 1 else b"".join([node.words for node in nodes])


def items_of(nodes: list[Node]) -> BlockItems:
    """The items that begin in consecutive runs."""
    return {block: records for node in nodes for block, records in node.items.items()} or NO_ITEMS


def part(words: bytes, start: int, stop: int) -> bytes:
    """A slice of content words. Compiled code (mypyc) would copy even all of them; Python does not."""
    return words if not start and stop == len(words) else words[start:stop]


def loosened(leaf: Node) -> list[Node]:
    """The runs that nobody holds any more once the only holder of ``leaf`` lets go, deepest first."""
    loose = []
    node = leaf
    while node.pins == 1 and node.parent is not None:
        loose.append(node)
        node = node.parent
    return loose


def root_of(node: Node) -> Node:
    """The root above ``node``."""
    while node.parent is not None:
        node = node.parent
    return node
