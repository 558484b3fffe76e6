"""Write-through: which cached runs get their copy on the host now."""

from __future__ import annotations

from array import array

from statemachine.commands import Backup
from statemachine.decide.eviction import evicted, host_room
from statemachine.events import BACKUP, CAPACITY, HOST, WRITE_THROUGH, Event, IntArray, TransferStarted
from statemachine.state.nodes import Node
from statemachine.state.state import State


def back_up(state: State, command: Backup) -> list[Event]:
    """Copy the runs of a path that were used often enough and have no host copy yet, ancestors first.

    Where the host is short, as much as fits: the front of a path is worth more than its end.
    """
    node = state.nodes.get(command.node)
    if state.policy != WRITE_THROUGH or node is None:
        return []
    runs: list[Node] = []
    while node is not None and node.parent is not None and node.host is None:
        runs.append(node)
        node = node.parent
    runs.reverse()
    for index, run in enumerate(runs):
        if not run.device_ready or run.ahead or run.transfer is not None or not _used_enough(state, run):
            del runs[index:]
            break
    wanted = sum(run.size for run in runs)
    if not wanted:
        return []
    room, victims = host_room(state, wanted, {run: run.size for run in state.path(runs[-1])})
    if not room:
        return []
    events: list[Event] = []
    free = state.host.free
    if victims:
        eviction = evicted(HOST, victims, CAPACITY)
        events.append(eviction)
        free = free + eviction.blocks
    nodes, counts, sources = array("Q"), array("I"), array("i")
    upper = 0
    for run in runs:
        count = min(run.size, room - len(sources))
        if not count:
            break
        assert run.device is not None
        nodes.append(run.id)
        counts.append(count)
        sources.extend(run.device[:count])
        upper = state.next_node if count < run.size else 0
    targets: IntArray = free[len(free) - len(sources) :][::-1]
    none, zero = array("Q"), array("I")
    events.append(TransferStarted(state.next_transfer, BACKUP, 0, upper, nodes, counts, none, zero, sources, targets))
    return events


def _used_enough(state: State, node: Node) -> bool:
    enough = state.opened.backup_after
    return enough <= 1 or node.hits >= enough
