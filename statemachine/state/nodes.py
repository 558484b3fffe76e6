"""What one object of the state is: a run, a request, a transfer, and the questions one can ask of it."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from statemachine.events import Direction

if TYPE_CHECKING:
    from statemachine.events import IntArray

ALL: Final = 2**32 - 1
"""More blocks than any request has."""
_FEW: Final = 400
"""So many ids an array turns round as fast as NumPy."""

NO_CHILDREN: dict[bytes, Node] = {}
"""Shared by all leaves (a dictionary of its own would cost each 64 bytes); never written."""


class Node:
    """A run: consecutive cached blocks with one parent, one pin count and one residency."""

    __slots__ = (
        "ahead",
        "children",
        "device",
        "device_ready",
        "hits",
        "host",
        "host_ready",
        "id",
        "parent",
        "pins",
        "size",
        "start",
        "transfer",
        "words",
    )

    def __init__(self, id: int, parent: Node | None, start: int, words: bytes, size: int) -> None:
        self.id = id
        self.parent = parent
        self.start = start
        """Position of the first block in its path."""
        self.size = size
        """Number of blocks."""
        self.words = words
        self.children: dict[bytes, Node] = NO_CHILDREN
        """By the content words of the child's first block."""
        self.pins = 0
        self.device: IntArray | None = None
        self.device_ready = False
        """False while the device copy is arriving."""
        self.host: IntArray | None = None
        self.host_ready = False
        """False while the host copy is arriving."""
        self.transfer: Transfer | None = None
        self.ahead = False
        """Cached before the step that computes it has run: matchable, but neither copied out nor trusted."""
        self.hits = 0
        """How often it was used, counted up to what a back-up needs (:attr:`LedgerOpened.backup_after`)."""

    @property
    def end(self) -> int:
        """Number of blocks of the path that ends with this run."""
        return self.start + self.size

    def matchable(self) -> bool:
        """Whether a match may go through.

        Not where the only copy is still arriving on the host, or is being read by a swap-in that was abandoned.
        """
        return self.device is not None or (self.host_ready and self.transfer is None)

    def __repr__(self) -> str:
        return f"<run {self.id}: blocks {self.start}..{self.end}, {self.pins} pins>"


def from_end(ids: IntArray, count: int) -> IntArray:
    """The last ``count`` block ids, the last one first: the order in which they come from the free list, and go there.

    An array does that id by id, 2 to 3 ns each; NumPy takes 1 µs to begin and a sixth of that per id.
    """
    if count < _FEW:
        return ids[: -count - 1 : -1]
    return array("i", np.frombuffer(ids, np.int32)[: -count - 1 : -1].tobytes())


class Request:
    """A live request: its path in the tree, its words beyond the path, its block table."""

    __slots__ = (
        "computed",
        "duplicates",
        "id",
        "joined",
        "key",
        "leaf",
        "matched",
        "namespace",
        "table",
        "waits",
        "words",
    )

    def __init__(self, id: int, key: str, namespace: bytes, leaf: Node, words: bytes) -> None:
        self.id = id
        self.key = key
        self.namespace = namespace
        self.leaf = leaf
        self.matched = leaf.end
        """Leading blocks of the path that were cached when it began; those after them it cached itself."""
        self.words = words
        """Content of the full blocks after the path."""
        self.table: IntArray = array("i")
        """Device block ids in token order."""
        self.duplicates: list[tuple[int, int]] = []
        """Ranges of the path where the table holds a copy of its own."""
        self.joined: list[tuple[int, int]] = []
        """Ranges of the path that it took over from others after its match."""
        self.waits: dict[int, int] = {}
        """Transfer → first position of the block table that is not usable before its end."""
        self.computed = ALL
        """So many leading blocks are computed; what is cached beyond is :attr:`Node.ahead`."""

    def private(self) -> IntArray:
        """Ids of the request's own blocks, in token order."""
        table = self.table
        own = table[self.leaf.end :]
        for start, stop in reversed(self.duplicates):
            own = table[start:stop] + own
        return own


class Part:
    """What a transfer moves for one run. ``node is None``: the run is gone; ``discard``: its target is not wanted."""

    __slots__ = ("discard", "node", "size")

    def __init__(self, node: Node | None, size: int, discard: bool = False) -> None:
        self.node = node
        self.size = size
        self.discard = discard


class Transfer:
    """A copy in flight (or timed out: *quarantined*) and the blocks that belong to it until its end."""

    __slots__ = (
        "after",
        "direction",
        "held",
        "held_host",
        "id",
        "leaf",
        "parts",
        "quarantined",
        "sources",
        "targets",
        "waiters",
    )

    def __init__(
        self, id: int, direction: Direction, parts: list[Part], sources: IntArray, targets: IntArray, after: IntArray
    ) -> None:
        self.id = id
        self.direction = direction
        self.parts = parts
        self.sources = sources
        self.targets = targets
        self.after = after
        self.leaf: Node | None = None
        """End of the path that a swap-in pins."""
        self.held: IntArray = array("i")
        """Device blocks that become free when it ends, last id first."""
        self.held_host: IntArray = array("i")
        self.waiters: dict[int, None] = {}
        """Requests that wait for it, in order."""
        self.quarantined = False
