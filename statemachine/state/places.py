"""Places: a pool of blocks with what lives there. A place is named by its tier and its group of layers.

What one place does, every place does: code takes a place as a value and asks nowhere which tier it is. Group 0 are the
layers with full attention; another group (:mod:`.groups`) has a place on the device, where requests have blocks and no
run has a copy.
"""

from __future__ import annotations

from array import array

import numpy as np

from statemachine.events import IntArray, Tier
from statemachine.state.nodes import Node
from statemachine.state.order import EvictionOrder


class Pool:
    """Blocks of one size. ``free`` is a stack: the last id is granted first."""

    __slots__ = ("capacity", "free")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free: IntArray = array("i", np.arange(capacity - 1, -1, -1, dtype=np.int32).tobytes())


class Place:
    """One pool of blocks, the copies in it, and the order in which they go.

    Args:
        number: where a run keeps its copy in this place (:attr:`Node.copies`).
        limit: how many blocks may reside there.
        staging: blocks on top of these for copies on their way.
        orders: how many eviction orders: two where somebody says which runs are not expected to come back.
    """

    __slots__ = ("evictable", "group", "limit", "number", "orders", "pool", "resident", "staging", "tier")

    def __init__(self, number: int, tier: Tier, group: int, limit: int, staging: int, orders: int) -> None:
        self.number = number
        self.tier = tier
        self.group = group
        self.limit = limit
        self.staging = staging
        self.pool = Pool(limit + staging)
        self.orders: tuple[EvictionOrder, ...] = tuple(EvictionOrder() for _ in range(orders))
        """Runs with a copy here that nobody holds: all of the first order are evicted before any of the next one."""
        self.evictable = 0
        """Blocks in the orders."""
        self.resident = 0
        """Blocks with a copy here or arriving, without those that a swap-in takes away."""

    @property
    def final(self) -> EvictionOrder:
        """Runs that are not expected to come back, where that is told; else the same as :attr:`lru`."""
        return self.orders[0]

    @property
    def lru(self) -> EvictionOrder:
        """All the other runs, least recently released first."""
        return self.orders[-1]

    def order_of(self, node: Node) -> EvictionOrder:
        """The order in which an evictable run stands."""
        orders = self.orders
        return orders[0] if node in orders[0] else orders[-1]

    def __repr__(self) -> str:
        return self.tier.name if not self.group else f"{self.tier.name} group {self.group}"
