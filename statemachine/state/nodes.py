"""What lives in a ledger: runs and their copies, requests, transfers; and the questions about one of them."""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np

from statemachine.events import SWAP_IN, Direction, IntArray
from statemachine.items import NO_ITEMS, BlockItems
from statemachine.state.groups import Group

ALL: Final = 2**32 - 1
"""More blocks than any request has."""

_FEW: Final = 400
"""So many ids an array turns round as fast as NumPy."""

_NO_CONTENT: Final = 7
"""Length of a key that is no content: that is a multiple of four bytes."""

NO_CHILDREN: dict[bytes, Node] = {}
"""Shared by all leaves (a dictionary of its own would cost each 64 bytes); never written."""


class Copy:
    """The copy of a run in one place: its blocks there. ``ready`` is false while their content is arriving."""

    __slots__ = ("ids", "ready")

    def __init__(self, ids: IntArray, ready: bool) -> None:
        self.ids = ids
        self.ready = ready


class Node:
    """A run: consecutive cached blocks with one parent, one pin count and one residency."""

    __slots__ = (
        "children",
        "copies",
        "distrusted",
        "hits",
        "id",
        "items",
        "parent",
        "pins",
        "size",
        "start",
        "transfer",
        "uncomputed",
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
        self.items: BlockItems = NO_ITEMS
        """What else belongs to the content: the images and sounds that begin in these blocks."""
        self.children: dict[bytes, Node] = NO_CHILDREN
        """By :meth:`key`: the content of the child's first block."""
        self.pins = 0
        self.copies: list[Copy | None] = [None, None]
        """By the number of the place (:attr:`Place.number`), the nearest first (written out: that is faster)."""
        self.transfer: Transfer | None = None
        self.uncomputed = False
        """Cached before the step that computes it has run: matchable, but neither copied out nor trusted."""
        self.distrusted = False
        """It turned out bad, as all below it: nothing matches it any more, it goes when nobody holds it."""
        self.hits = 0
        """How often it was used, counted up to what a back-up needs (:attr:`LedgerOpened.backup_after`)."""

    @property
    def end(self) -> int:
        """Number of blocks of the path that ends with this run."""
        return self.start + self.size

    def content(self, block_bytes: int, offset: int = 0) -> bytes:
        """Words of the block at ``offset`` and the items that begin there. The first one's tells siblings apart."""
        words = self.words[offset * block_bytes : (offset + 1) * block_bytes]
        return words + self.items.get(self.start + offset, b"") if self.items else words

    def key(self, block_bytes: int) -> bytes:
        """Under which its parent has it: the content of its first block, or what is no content if it is distrusted."""
        if self.distrusted:
            return self.id.to_bytes(_NO_CONTENT, "little")
        return self.content(block_bytes)

    @property
    def device(self) -> Copy | None:
        """The copy on the device."""
        return self.copies[0]

    @property
    def host(self) -> Copy | None:
        """The copy on the host."""
        return self.copies[1]

    def valid(self, place: int = 0) -> bool:
        """Whether the run has a copy in that place (the device) that has arrived."""
        copy = self.copies[place]
        return copy is not None and copy.ready

    def arriving(self) -> bool:
        """Whether the device copy of the run is still being swapped in."""
        copy = self.copies[0]
        return copy is not None and not copy.ready

    def elsewhere(self, place: int) -> bool:
        """Whether the run has a copy in another place than that one."""
        copies = self.copies
        return len(copies) - copies.count(None) > (copies[place] is not None)

    def as_near(self, place: int) -> bool:
        """Whether the run has a copy in that place or in a nearer one."""
        return any(copy is not None for copy in self.copies[: place + 1])

    def matchable(self) -> bool:
        """Whether a match may go through.

        Not where the only copy is still arriving on the host, or is being read by a swap-in that was abandoned.
        """
        if self.copies[0] is not None:
            return True
        return self.transfer is None and any(copy is not None and copy.ready for copy in self.copies)

    def strands(self, place: int, gone: set[Node]) -> bool:
        """Whether a child would stay behind in mid-air if the run lost its copy in that place.

        A child stays unless it is one of those that are ``gone``. With another copy of the run it may stay where the
        run stays, so that only a child in that very place is in the way.
        """
        other = self.elsewhere(place)
        for child in self.children.values():
            if child not in gone and (not other or child.copies[place] is not None):
                return True
        return False

    def can_absorb(self, parent: Node) -> bool:
        """Whether the run may absorb its parent: only child, same places and uses, nothing in flight."""
        if (
            parent.parent is None
            or len(parent.children) != 1
            or self.transfer is not None
            or parent.transfer is not None
            or self.hits != parent.hits
            or self.distrusted != parent.distrusted
        ):
            return False
        for mine, its in zip(self.copies, parent.copies):  # noqa: SIM110 (a generator takes three times as long)
            if (mine is None) != (its is None):
                return False
        return True

    def __repr__(self) -> str:
        return f"<run {self.id}: blocks {self.start}..{self.end}, {self.pins} pins>"


def from_end(ids: IntArray, count: int) -> IntArray:
    """The last ``count`` block ids, the last one first: the order in which they come from the free list, and go there.

    An array does that id by id, 2 to 3 ns each; NumPy takes 1 µs to begin and a sixth of that per id.
    """
    if count < _FEW:
        return ids[: -count - 1 : -1]
    return array("i", np.frombuffer(ids, np.int32)[: -count - 1 : -1].tobytes())


class Side:
    """What a request has of a side group."""

    __slots__ = ("begin", "settled", "table")

    def __init__(self) -> None:
        self.table: IntArray = array("i")
        """Block ids of the group; -1 where there is nothing (any more)."""
        self.begin = 0
        """Leading entries that never had a block: what it hit there is not cached for this group."""
        self.settled = 0
        """Tokens whose settling was told; what the window has left by then is given up."""

    def passed(self, group: Group, settled: int, block_size: int) -> int:
        """So many leading positions a window has left once ``settled`` tokens are; 0: no more than before."""
        if not group.windowed:
            return 0
        passed = group.dead(settled) // block_size
        before = group.dead(self.settled) // block_size
        return passed if passed > max(before, self.begin, group.kept(block_size)) else 0

    def blocks(self, start: int = 0, stop: int = ALL) -> IntArray:
        """The blocks that stand between two positions of the table, in order."""
        return array("i", [block for block in self.table[start:stop] if block >= 0])


NO_SIDES: list[Side] = []
"""Of all requests of a ledger without side groups; never written."""


class Request:
    """A live request: its path in the tree, its words beyond the path, its block table."""

    __slots__ = (
        "computed",
        "duplicate_ranges",
        "items",
        "joined_ranges",
        "leaf",
        "matched",
        "namespace",
        "number",
        "replaced_ranges",
        "request_id",
        "sides",
        "table",
        "waits_for",
        "words",
    )

    def __init__(self, number: int, request_id: str, namespace: bytes, leaf: Node, words: bytes) -> None:
        self.number = number
        """The ledger's own name of the request."""
        self.request_id = request_id
        """The engine's name of the request."""
        self.namespace = namespace
        self.leaf = leaf
        self.matched = leaf.end
        """Leading blocks of the path that were cached when it began; those after them it cached itself."""
        self.words = words
        """Content of the full blocks after the path."""
        self.items: BlockItems = NO_ITEMS
        """The images and sounds of all its content, also of what is no full block yet."""
        self.table: IntArray = array("i")
        """Device block ids in token order."""
        self.duplicate_ranges: list[tuple[int, int]] = []
        """Ranges of the path where the table holds a copy of its own."""
        self.joined_ranges: list[tuple[int, int]] = []
        """Ranges of the path that it took over from others after its match."""
        self.replaced_ranges: list[tuple[int, int]] = []
        """Ranges of the path whose runs took its copies in the place of theirs."""
        self.waits_for: dict[int, int] = {}
        """Transfer → first position of the block table that is not usable before its end."""
        self.computed = ALL
        """So many leading blocks are computed; what is cached beyond is :attr:`Node.uncomputed`."""
        self.sides: list[Side] = NO_SIDES
        """What it has of the side groups, in their order."""

    def fixed(self, block_size: int) -> int:
        """Leading blocks that no trim gives back: they are cached, or windows have passed on what is in them."""
        return max([self.leaf.end, *[-(-side.settled // block_size) for side in self.sides]])

    def private(self) -> IntArray:
        """Ids of the request's own blocks, in token order."""
        table = self.table
        own = table[self.leaf.end :]
        for start, stop in reversed(self.duplicate_ranges):
            own = table[start:stop] + own
        return own

    def has_cached(self, node: Node) -> bool:
        """Whether the request has cached a run of its path itself: it neither found it, nor has a copy beside it."""
        taken_over = self.duplicate_ranges + self.joined_ranges
        return node.start >= self.matched and not any(start <= node.start < stop for start, stop in taken_over)

    def keeps(self, node: Node) -> bool:
        """Whether the block table holds a copy of the request's own of a run of its path."""
        return any(start <= node.start < stop for start, stop in self.duplicate_ranges)

    def own_copies(self, end: int) -> IntArray:
        """The request's own blocks among the first ``end`` positions of its block table, in token order."""
        own = array("i")
        for start, stop in self.duplicate_ranges:
            own.extend(self.table[start:stop])
        own.extend(self.table[self.leaf.end : end])
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
        "direction",
        "held_sources",
        "held_targets",
        "id",
        "leaf",
        "parts",
        "quarantined",
        "source",
        "sources",
        "target",
        "targets",
        "waiters",
        "waits_for",
    )

    def __init__(
        self,
        id: int,
        direction: Direction,
        route: tuple[int, int],
        parts: list[Part],
        sources: IntArray,
        targets: IntArray,
        waits_for: IntArray,
    ) -> None:
        self.id = id
        self.direction = direction
        self.source, self.target = route
        """Numbers of the places that it reads and writes."""
        self.parts = parts
        self.sources = sources
        self.targets = targets
        self.waits_for = waits_for
        """Transfers that each rank has to have run before it."""
        self.leaf: Node | None = None
        """End of the path that a swap-in pins."""
        self.held_sources: IntArray = array("i")
        """Blocks it reads that become free when it ends, last id first."""
        self.held_targets: IntArray = array("i")
        """Blocks it writes that become free when it ends, last id first."""
        self.waiters: dict[int, None] = {}
        """Requests that wait for it, in order."""
        self.quarantined = False

    def part_of(self, node: Node) -> Part:
        """What it moves for a run of its own. Raises :class:`StopIteration` for another one."""
        return next(part for part in self.parts if part.node is node)

    def boundary(self, valid: int) -> tuple[Node, int] | None:
        """The run, and after how many of its blocks, that has to be cut if exactly ``valid`` blocks arrived."""
        position = 0
        for part in self.parts:
            if position < valid < position + part.size and part.node is not None:
                return part.node, valid - position
            position += part.size
        return None

    def held_in(self, place: int) -> IntArray:
        """Blocks of a place that become free when it ends, last id first."""
        return self.held_sources if place == self.source else self.held_targets

    def own_blocks(self, place: int) -> IntArray:
        """Blocks of a place that belong to the transfer itself: held for it, or targets that nobody wants any more."""
        blocks = self.held_in(place)[:]
        if self.quarantined:
            return blocks
        position = 0
        for part in self.parts:
            stop = position + part.size
            if place == self.target:
                if part.discard or part.node is None:
                    blocks.extend(self.targets[position:stop])
            elif self.direction == SWAP_IN and part.node is None:  # a copy outwards holds its sources from the start
                blocks.extend(self.sources[position:stop])
            position = stop
        return blocks
