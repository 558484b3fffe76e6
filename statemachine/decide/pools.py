"""Deciding what happens to whole pools: a new size, a tier that is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.commands import LoseTier, Resize
from statemachine.decide.eviction import Victim, droppable, evicted, evicted_everywhere
from statemachine.errors import Busy, InvalidCommand
from statemachine.events import BlocksEvicted, Event, EvictReason, PoolResized, TierLost
from statemachine.state.nodes import Node
from statemachine.state.ownership import owner
from statemachine.state.places import Place
from statemachine.state.state import MOST_BLOCKS, State


def _resize(state: State, command: Resize) -> list[Event]:
    place = state.place(command.tier)
    pool = place.pool
    capacity = command.blocks + place.staging
    if not (1 if place is state.device else 0) <= command.blocks <= MOST_BLOCKS:
        raise InvalidCommand(f"a {place} pool of {command.blocks} blocks is of no use, or too large")
    surplus = max(pool.capacity - capacity, 0)
    taken = set(range(capacity, pool.capacity)) - set(pool.free) if surplus else set()
    events: list[Event] = _vacate(state, place, taken) if taken else []
    events += _shrink_residents(state, place, command.blocks, events)
    return _first_step(events, command.step) or [*events, PoolResized(command.tier, command.blocks)]


def _first_step(events: list[Event], step: int) -> list[Event]:
    """As many whole runs of the first of these evictions as ``step`` blocks allow, one at least; none: all fit."""
    if sum(len(event.blocks) for event in events if isinstance(event, BlocksEvicted)) <= step:
        return []
    event = events[0]
    assert isinstance(event, BlocksEvicted)
    runs = blocks = 0
    for count in event.counts:
        if runs and blocks + count > step:
            break
        runs += 1
        blocks += count
    return [event._replace(nodes=event.nodes[:runs], counts=event.counts[:runs], blocks=event.blocks[:blocks])]


def _vacate(state: State, place: Place, blocks: set[int]) -> list[Event]:
    """Evict the runs that hold these blocks, with all below them; refuse when somebody uses one."""
    doomed: set[Node] = set()
    cached: set[int] = set()
    for node in state.nodes.values():
        copy = node.copies[place.number]
        if copy is not None and not blocks.isdisjoint(copy.ids):
            cached.update(copy.ids)
            stack = [node]
            while stack:
                run = stack.pop()
                if run not in doomed:
                    doomed.add(run)
                    stack.extend(run.children.values())
    for block in sorted(blocks - cached):
        raise Busy(f"{place} block {block} belongs to {owner(state, place, block)}: release it, then resize")
    used = min((node.id for node in doomed if node.pins or node.transfer is not None), default=0)
    if used:
        raise Busy(f"{place} blocks of run {used} are in use: release or wait, then resize")
    return evicted_everywhere(state, doomed, EvictReason.RESIZED, nearest=place.number)


def _shrink_residents(state: State, place: Place, blocks: int, events: list[Event]) -> list[Event]:
    """A smaller place may hold fewer blocks, whichever their ids are."""
    gone = {state.nodes[id] for event in events if isinstance(event, BlocksEvicted) for id in event.nodes}
    excess = place.resident - sum(node.size for node in gone) - blocks
    if excess <= 0:
        return []
    chosen: list[Victim] = []
    for victim in droppable(place, place.pool.capacity):
        if excess <= 0:
            break
        if victim.node not in gone:
            chosen.append(Victim(victim.node, victim.node.size, True))
            excess -= victim.node.size
    if excess > 0:
        raise Busy(f"{excess} {place} blocks too many are in use: wait for transfers, then resize")
    return [evicted(place, chosen, EvictReason.RESIZED)] if chosen else []


def _lose_tier(state: State, command: LoseTier) -> list[Event]:
    device = state.place(command.tier) is state.device
    if state.transfers or (device and state.requests):
        raise Busy("end the transfers (and for the device, the requests) first")
    if device and not command.pools:
        raise InvalidCommand("there is no doing without the device tier: name the pools that take its place")
    return [TierLost(command.tier, command.reason, command.pools)]


POOLS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Resize: _resize,
    LoseTier: _lose_tier,
}
