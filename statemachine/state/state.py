"""What the state machine knows: pools, the prefix tree of runs, requests, transfers.

Only data and the questions one can ask of it; :mod:`statemachine.apply` is the only place that changes it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from statemachine.events import HostPolicy, LedgerOpened, Tier
from statemachine.state.nodes import Node, Request, Transfer
from statemachine.state.order import Order

if TYPE_CHECKING:
    from statemachine.events import IntArray

MOST_BLOCKS = 1 << 26
"""Blocks that a pool may have: a damaged or hostile log cannot make anybody build a larger free list."""


class Pool:
    """The blocks of one tier. ``free`` is a stack: the last id is granted first."""

    __slots__ = ("capacity", "free")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free: IntArray = array("i", range(capacity - 1, -1, -1))


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
