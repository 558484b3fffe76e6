"""What the state machine knows: places, the prefix tree of runs, requests, transfers.

Only data and the questions one can ask of it; :mod:`statemachine.apply` is the only place that changes it.
"""

from __future__ import annotations

from collections.abc import Iterator

from statemachine.events import ROUTES, Direction, HostPolicy, LedgerOpened, Tier
from statemachine.state.groups import Group, impossible_groups, parse
from statemachine.state.nodes import Node, Request, Transfer
from statemachine.state.places import Place, Pool

MOST_BLOCKS = 1 << 26
"""Blocks that a pool may have: a damaged or hostile log cannot make anybody build a larger free list."""


def impossible(opened: LedgerOpened) -> str:
    """What is wrong with sizes and policies that no ledger can have; empty if nothing is."""
    if not 0 < opened.block_size <= MOST_BLOCKS or opened.host_policy > HostPolicy.WRITE_THROUGH:
        return "the block size or the host policy is impossible"
    if opened.chunked_multimodal > 1:
        return "whether the model can begin inside an item is 0 or 1"
    if max(opened.device_blocks, opened.host_blocks + opened.host_staging_blocks) > MOST_BLOCKS:
        return f"a pool has {MOST_BLOCKS} blocks at most"
    if opened.groups and opened.host_policy != HostPolicy.OFF:
        return "layer groups are on the device alone: a ledger that has some has no host tier"
    return impossible_groups(opened.groups, MOST_BLOCKS)


class State:
    """Everything a ledger's events add up to."""

    __slots__ = (
        "block_bytes",
        "counters",
        "device",
        "duplicating",
        "epoch",
        "generation",
        "groups",
        "host",
        "next_node",
        "next_request",
        "next_transfer",
        "nodes",
        "numbers",
        "opened",
        "places",
        "policy",
        "pools",
        "requests",
        "retired",
        "roots",
        "sides",
        "transfers",
        "weights",
        "workers",
    )

    def __init__(self, opened: LedgerOpened) -> None:
        self.opened = opened
        self.policy = HostPolicy(opened.host_policy)
        """What happens on the host tier; ``OFF`` once that tier was lost for good."""
        self.pools = opened.pools
        """Random ids of the pools."""
        self.weights = opened.weights
        """Version of the model's weights in force."""
        self.block_bytes = 4 * opened.block_size
        self.device = Place(0, Tier.DEVICE, 0, opened.device_blocks, 0, orders=2)
        self.host = Place(1, Tier.HOST, 0, opened.host_blocks, opened.host_staging_blocks, orders=1)
        self.places = (self.device, self.host)
        """By number: all tiers of group 0, the nearest first."""
        self.groups: tuple[Group, ...] = ()
        """The side groups; group ``g`` is ``groups[g - 1]``."""
        self.sides: tuple[Place, ...] = ()
        """Their places on the device. Nothing of them is in the tree."""
        if opened.groups:
            self.open_groups(opened.groups)
        self.roots: dict[bytes, Node] = {}
        """By namespace."""
        self.retired: dict[Node, None] = {}
        """Roots of cleared trees that somebody still holds; nothing matches there any more."""
        self.nodes: dict[int, Node] = {}
        self.requests: dict[int, Request] = {}
        self.numbers: dict[str, int] = {}
        """The engine's name of each live request → its number."""
        self.duplicating: dict[int, Request] = {}
        """Those of the requests that have copies of their own of what is cached (:attr:`Request.duplicate_ranges`)."""
        self.transfers: dict[int, Transfer] = {}
        self.next_node = 1
        self.next_request = 1
        self.next_transfer = 1
        self.generation = 0
        self.epoch = 1
        self.workers: dict[int, int] = {}
        """Rank → incarnation of its worker."""
        self.counters = Counters()

    def open_groups(self, text: str) -> None:
        """Make the places of side groups (:attr:`LedgerOpened.groups`)."""
        self.groups = parse(text)
        self.sides = tuple(
            Place(g, Tier.DEVICE, g, group.blocks, 0, orders=1) for g, group in enumerate(self.groups, 1)
        )

    def place(self, tier: Tier, group: int = 0) -> Place:
        """The place of that name. Raises :class:`IndexError`: there is none."""
        return self.sides[group - 1] if group else self.places[tier]

    def route(self, direction: Direction) -> tuple[Place, Place]:
        """The places that a copy in that direction reads and writes."""
        source, target = ROUTES[direction]
        return self.place(source), self.place(target)

    def pool(self, tier: Tier) -> Pool:
        """The pool of a tier."""
        return self.place(tier).pool

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

    def evicted(self, place: int, blocks: int) -> None:
        """Count blocks that the place of that number has given up."""
        if not place:
            self.device_evicted_blocks += blocks
        else:
            self.host_evicted_blocks += blocks

    def as_dict(self) -> dict[str, int]:
        """All totals by name."""
        return {name: getattr(self, name) for name in COUNTERS}
