"""Applying what happens to whole pools: a new size, a tier that is lost."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import one_of, violated
from statemachine.apply.tree import delete, drop_copy
from statemachine.events import HostPolicy, PoolResized, Tier, TierLost
from statemachine.state.nodes import Node
from statemachine.state.ownership import owner
from statemachine.state.places import Place
from statemachine.state.state import MOST_BLOCKS, State

_TIERS = tuple(Tier)


def pool_resized(state: State, event: PoolResized) -> None:
    """The highest block ids come or go."""
    place = state.place(one_of(event, _TIERS, event.tier))
    pool = place.pool
    capacity = event.blocks + place.staging
    if capacity > MOST_BLOCKS:
        violated(event, f"a pool has {MOST_BLOCKS} blocks at most")
    kept = array("i", [block for block in pool.free if block < capacity])
    if len(pool.free) - len(kept) != max(pool.capacity - capacity, 0):
        free = set(pool.free)
        block = next(block for block in range(capacity, pool.capacity) if block not in free)
        violated(event, f"{place} block {block} is in use by {owner(state, place, block)}")
    pool.free = array("i", range(capacity - 1, pool.capacity - 1, -1)) + kept
    pool.capacity = capacity
    place.limit = event.blocks


def tier_lost(state: State, event: TierLost) -> None:
    """All copies on the tier are gone; runs that have no other copy go, with all below them."""
    place = state.place(one_of(event, _TIERS, event.tier))
    device = place is state.device
    if state.transfers or (device and state.requests):
        violated(event, "transfers (and for the device, requests) have to end first")
    if device and not event.pools:
        violated(event, "there is no doing without the device tier")
    for order in place.orders:
        for node in list(order):
            _lose_copy(state, place, node)
            if not node.elsewhere(place.number):
                delete(state, node)
    for _, node in sorted(state.nodes.items()):
        if node.copies[place.number] is not None:  # on the path of a request, with a device copy
            _lose_copy(state, place, node)
    if event.pools:
        state.pools = event.pools
    else:
        state.policy = HostPolicy.OFF


def _lose_copy(state: State, place: Place, node: Node) -> None:
    copy = node.copies[place.number]
    assert copy is not None
    place.pool.free.extend(copy.ids[::-1])
    state.counters.evicted(place.number, node.size)
    drop_copy(place, node)
