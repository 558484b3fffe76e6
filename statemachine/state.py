"""What the state machine knows: pools, the prefix tree of runs, requests, transfers.

Only data and the questions one can ask of it; :mod:`statemachine.apply` is the only place that changes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from statemachine.events import Direction, HostPolicy, LedgerOpened, Tier
from statemachine.order import Order

if TYPE_CHECKING:
    from statemachine.events import IntArray

ALL: Final = 2**32 - 1
"""More blocks than any request has."""
MOST_BLOCKS = 1 << 26
"""Blocks that a pool may have: a damaged or hostile log cannot make anybody build a larger free list."""

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


class Pool:
    """The blocks of one tier. ``free`` is a stack: the last id is granted first."""

    __slots__ = ("capacity", "free")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free: IntArray = array("i", range(capacity - 1, -1, -1))


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


class State:
    """Everything a ledger's events add up to."""

    __slots__ = (
        "block_bytes",
        "counters",
        "device",
        "device_order",
        "epoch",
        "evictable",
        "final",
        "generation",
        "host",
        "host_blocks",
        "host_order",
        "host_resident",
        "keys",
        "next_node",
        "next_request",
        "next_transfer",
        "nodes",
        "opened",
        "policy",
        "pools",
        "requests",
        "retired",
        "roots",
        "transfers",
        "workers",
    )

    def __init__(self, opened: LedgerOpened) -> None:
        self.opened = opened
        self.policy = HostPolicy(opened.host_policy)
        """What happens on the host tier; ``OFF`` once that tier was lost for good."""
        self.pools = opened.pools
        """Random ids of the pools."""
        self.block_bytes = 4 * opened.block_size
        self.device = Pool(opened.device_blocks)
        self.host = Pool(opened.host_blocks + opened.host_staging_blocks)
        self.host_blocks = opened.host_blocks
        """How many blocks may reside on the host; the staging blocks come on top."""
        self.roots: dict[bytes, Node] = {}
        """By namespace."""
        self.retired: list[Node] = []
        """Roots of cleared trees that somebody still holds; nothing matches there any more."""
        self.nodes: dict[int, Node] = {}
        self.requests: dict[int, Request] = {}
        self.keys: dict[str, int] = {}
        self.transfers: dict[int, Transfer] = {}
        self.final = Order()
        """Runs on the device that nobody holds and that are not expected to come back: evicted first."""
        self.device_order = Order()
        """All the other runs on the device that nobody holds, least recently released first."""
        self.host_order = Order()
        """Runs with a host copy that nobody holds."""
        self.evictable = 0
        """Blocks in the two device orders."""
        self.host_resident = 0
        """Blocks with a host copy there or arriving, without those that a swap-in takes away."""
        self.next_node = 1
        self.next_request = 1
        self.next_transfer = 1
        self.generation = 0
        self.epoch = 1
        self.workers: dict[int, int] = {}
        """Rank → incarnation of its worker."""
        self.counters = Counters()

    def pool(self, tier: Tier) -> Pool:
        """The pool of a tier."""
        return self.device if tier == Tier.DEVICE else self.host

    def path(self, leaf: Node) -> list[Node]:
        """The runs from the root (not included) to ``leaf``."""
        nodes = []
        node = leaf
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def all_roots(self) -> Iterator[Node]:
        """Roots of all trees, retired ones last."""
        yield from self.roots.values()
        yield from self.retired


COUNTERS = (
    "allocated_blocks",
    "backed_up_blocks",
    "cached_blocks",
    "device_evicted_blocks",
    "device_hit_blocks",
    "duplicate_blocks",
    "failed_transfers",
    "host_evicted_blocks",
    "host_hit_blocks",
    "queried_blocks",
    "requests",
    "swapped_in_blocks",
    "swapped_out_blocks",
)
"""Names of the totals, in the order of their encoding."""


class Counters:
    """Totals since genesis; they are part of the state, so two replays can compare them cheaply."""

    __slots__ = COUNTERS
    requests: int
    queried_blocks: int
    device_hit_blocks: int
    host_hit_blocks: int
    allocated_blocks: int
    cached_blocks: int
    duplicate_blocks: int
    device_evicted_blocks: int
    host_evicted_blocks: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    backed_up_blocks: int
    failed_transfers: int

    def __init__(self) -> None:
        for name in COUNTERS:
            setattr(self, name, 0)

    def as_dict(self) -> dict[str, int]:
        """All totals by name."""
        return {name: getattr(self, name) for name in COUNTERS}
