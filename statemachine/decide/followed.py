"""Deciding what an engine has decided already, whose own manager is recorded: its blocks, and where it departed."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from statemachine.commands import Adopt, Depart
from statemachine.decide.eviction import Victim, evicted
from statemachine.decide.lookup import request_named
from statemachine.errors import InvalidCommand
from statemachine.events import CAPACITY, BlocksAllocated, BlocksChosen, EngineDeparted, Event, HostPolicy
from statemachine.state.nodes import Node, from_end
from statemachine.state.ownership import owner
from statemachine.state.state import State


def _adopt(state: State, command: Adopt) -> list[Event]:
    request = request_named(state, command.request_id)
    blocks = command.blocks
    if not blocks:
        return []
    if state.policy != HostPolicy.OFF or state.groups:
        raise InvalidCommand("blocks are adopted only where there is no host tier, and one group of layers")
    free = state.device.pool.free
    chosen = set(blocks)
    missing = chosen.difference(free)
    events = _evictions(state, missing)
    if missing or len(chosen) != len(blocks):
        wrong = next((block for block in blocks if block in missing), blocks[0])
        raise InvalidCommand(
            f"block {wrong} cannot be adopted by request {command.request_id!r}: it is named twice, or not free and "
            f"not only cached ({owner(state, state.device, wrong)})"
        )
    for event in events:
        free = free + event.blocks
    followed: list[Event] = [*events]
    if from_end(free, len(blocks)) != blocks:
        followed.append(BlocksChosen(blocks))
    counts = array("I", [len(blocks)])
    followed.append(BlocksAllocated(array("Q", [request.number]), counts, array("Q"), array("I"), blocks))
    return followed


def _evictions(state: State, missing: set[int]) -> list[Any]:
    """What has to be evicted for these blocks: the runs from the first of them on, and all below. Takes them out."""
    takes: dict[Node, int] = {}
    for order in state.device.orders:
        for node in order:
            if not missing:
                break
            copy = node.device
            if copy is None or missing.isdisjoint(copy.ids):
                continue
            first = next(index for index, block in enumerate(copy.ids) if block in missing)
            takes[node] = node.size - first
            missing.difference_update(copy.ids)
            below = list(node.children.values())
            while below:
                child = below.pop()
                below += child.children.values()
                takes[child] = child.size
                if child.device is not None:
                    missing.difference_update(child.device.ids)
    events, group = [], []
    for node in [node for order in state.device.orders for node in order if node in takes]:
        group.append(Victim(node, takes[node], takes[node] == node.size))
        if takes[node] < node.size:  # a run that stays in part ends its event
            events.append(evicted(state.device, group, CAPACITY))
            group = []
    if group:
        events.append(evicted(state.device, group, CAPACITY))
    return events


def _depart(state: State, command: Depart) -> list[Event]:
    return [EngineDeparted(state.numbers.get(command.request_id, 0), command.request_id, command.what)]


FOLLOWED: dict[type[Any], Callable[[State, Any], list[Event]]] = {Adopt: _adopt, Depart: _depart}
