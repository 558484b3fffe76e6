"""Capacity: whether blocks can be had, who has to go for them, and how a refusal reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from statemachine.decide.eviction import device_supply
from statemachine.decide.lookup import request_named
from statemachine.errors import OutOfBlocks
from statemachine.events import AllocationRefused, HostPolicy, Tier
from statemachine.state.state import State


def available_blocks(state: State, group: int = 0) -> int:
    """Device blocks of a layer group that are free, or that can be evicted."""
    if group:
        return len(state.place(Tier.DEVICE, group).pool.free)
    return len(state.device.pool.free) + state.device.evictable


def can_allocate(state: State, blocks: int, group: int = 0) -> bool:
    """Whether so many blocks of a layer group can be had now. Nothing is evicted."""
    if group:
        return blocks <= available_blocks(state, group)
    if blocks <= len(state.device.pool.free) or blocks > available_blocks(state) or state.policy == HostPolicy.OFF:
        return blocks <= available_blocks(state)
    return device_supply(state, blocks) is not None  # transfers in flight may be in the way of an eviction


def victims_for(state: State, blocks: int, candidates: Sequence[str], group: int = 0) -> list[str]:
    """How many of the candidates, in order, have to be preempted until so many blocks of a group can be allocated.

    Raises:
        OutOfBlocks: all of them would not be enough.
        UnknownRequest
    """
    available = available_blocks(state, group)
    chosen: list[str] = []
    freed = 0
    pins: Counter[int] = Counter()
    for key in dict.fromkeys(candidates):
        if blocks <= available + freed and (chosen or can_allocate(state, blocks, group)):
            return chosen
        request = request_named(state, key)
        chosen.append(key)
        if group:
            freed += len(request.sides[group - 1].blocks())
            continue
        freed += len(request.private())
        node = request.leaf
        while node.parent is not None:
            pins[node.id] += 1
            if pins[node.id] == node.pins and node.copies[0] is not None:
                freed += node.size
            node = node.parent
    if blocks > available + freed:
        raise out_of_blocks(state, AllocationRefused(0, blocks, available + freed, 0, 0, "", group), blocks)
    return chosen


def out_of_blocks(
    state: State, event: AllocationRefused, blocks: int, *, fitting: int = 0, requests: int = 1, reserved: int = 0
) -> OutOfBlocks:
    """The error for a refused allocation; it carries the event that records it.

    Args:
        blocks: so many the longest block table would have had.
        fitting: so many of the ``requests``, in order, would fit.
        reserved: blocks that are available, and kept for those that run already.
    """
    in_transfer = sum(len(transfer.own_blocks(state.device.number)) for transfer in state.transfers.values())
    never = blocks > state.place(Tier.DEVICE, event.group).pool.capacity
    return OutOfBlocks(event, in_transfer, fitting=fitting, requests=requests, reserved=reserved, never_fits=never)
