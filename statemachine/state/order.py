"""Eviction orders: doubly linked lists with O(1) insertion anywhere."""

from __future__ import annotations

from collections.abc import Iterator

from statemachine.state.nodes import Node


class EvictionOrder:
    """Runs in eviction order, first to go at the front.

    Keyed by object identity only; iteration follows the links, so the order is exactly the history of calls.
    """

    __slots__ = ("_next", "_prev")

    def __init__(self) -> None:
        self._next: dict[Node | None, Node | None] = {None: None}
        self._prev: dict[Node | None, Node | None] = {None: None}

    def append(self, node: Node) -> None:
        """Put ``node`` at the back."""
        last = self._prev[None]
        self._next[last] = self._prev[None] = node
        self._prev[node] = last
        self._next[node] = None

    def remove(self, node: Node) -> None:
        """Take ``node`` out."""
        before, behind = self._prev.pop(node), self._next.pop(node)
        self._next[before] = behind
        self._prev[behind] = before

    def insert_after(self, node: Node, new: Node) -> None:
        """Put ``new`` right behind ``node``."""
        behind = self._next[node]
        self._next[node] = self._prev[behind] = new
        self._prev[new] = node
        self._next[new] = behind

    def neighbours(self, node: Node | None) -> tuple[Node | None, Node | None]:
        """The run before ``node`` and the one behind it; those of ``None`` are the last one and the first."""
        return self._prev[node], self._next[node]

    def __contains__(self, node: Node) -> bool:
        return node in self._next

    def __iter__(self) -> Iterator[Node]:
        links = self._next
        node = links[None]
        while node is not None:
            yield node
            node = links[node]

    def __len__(self) -> int:
        return len(self._next) - 1
