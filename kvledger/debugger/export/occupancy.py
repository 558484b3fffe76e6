"""How the blocks of each tier are used, in numbers: cheap enough to ask after every transaction."""

from __future__ import annotations

from typing import NamedTuple

from statemachine.events import Tier
from statemachine.state.state import State


class Occupancy(NamedTuple):
    """Blocks of one tier, each counted once, by owner: the sum is the pool."""

    free: int
    cached: int
    """In the prefix tree, used or not."""
    private: int
    """Of living requests, not (yet) in the prefix tree."""
    in_flight: int
    """Kept for transfers until they end."""

    @property
    def total(self) -> int:
        """Blocks of the pool."""
        return sum(self)


def occupancy(state: State, tier: Tier) -> Occupancy:
    """Who has the blocks of a tier."""
    pool = state.pool(tier)
    in_flight = sum(len(transfer.own_blocks(tier)) for transfer in state.transfers.values())
    private = 0
    if tier == Tier.DEVICE:
        for request in state.requests.values():
            private += len(request.table) - request.leaf.end
            private += sum(stop - start for start, stop in request.duplicate_ranges)
    free = len(pool.free)
    return Occupancy(free, pool.capacity - free - private - in_flight, private, in_flight)
