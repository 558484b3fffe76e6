"""Deciding transfers: write-through copies, the end of a transfer, the end of a quarantine."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from statemachine.commands import Backup, EndQuarantine, FinishTransfer
from statemachine.decide.eviction import evicted, host_room
from statemachine.decide.lookup import transfer_numbered
from statemachine.errors import InvalidCommand, OutOfOrder, UnknownTransfer
from statemachine.events import (
    BACKUP,
    CAPACITY,
    DONE,
    SWAP_IN,
    WRITE_THROUGH,
    Event,
    IntArray,
    QuarantineEnded,
    TransferFinished,
    TransferStarted,
)
from statemachine.state.duplicates import holds
from statemachine.state.nodes import Node
from statemachine.state.state import State


def _finish_transfer(state: State, command: FinishTransfer) -> list[Event]:
    transfer = transfer_numbered(state, command.transfer)
    if transfer.quarantined:
        raise UnknownTransfer(f"transfer {transfer.id} has timed out already; end its quarantine instead")
    total = len(transfer.targets)
    if not 0 <= command.valid <= total or (command.outcome == DONE) != (command.valid == total):
        raise InvalidCommand(f"{command.valid} valid blocks of {total} do not go with {command.outcome.name}")
    first = transfer.parts[0].node
    if transfer.direction == SWAP_IN and command.valid and first is not None and first.parent is not None:
        if first.parent.arriving() and first.parent.transfer is not None:
            raise OutOfOrder(
                f"transfer {transfer.id} continues the path of transfer {first.parent.transfer.id}: finish that first"
            )
    upper = state.next_node if transfer.boundary(command.valid) is not None else 0
    return [TransferFinished(transfer.id, command.outcome, command.valid, upper)]


def _end_quarantine(state: State, command: EndQuarantine) -> list[Event]:
    transfer = transfer_numbered(state, command.transfer)
    if not transfer.quarantined:
        raise UnknownTransfer(f"transfer {transfer.id} is not quarantined: finish it instead")
    return [QuarantineEnded(transfer.id)]


def _back_up(state: State, command: Backup) -> list[Event]:
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
        if (
            not run.valid()
            or run.uncomputed
            or (run.pins and _awaits_its_step(state, run))
            or run.transfer is not None
            or not _used_enough(state, run)
            or run.distrusted
        ):
            del runs[index:]
            break
    wanted = sum(run.size for run in runs)
    if not wanted:
        return []
    room, victims = host_room(state, wanted, {run: run.size for run in state.path(runs[-1])})
    if not room:
        return []
    events: list[Event] = []
    free = state.host.pool.free
    if victims:
        eviction = evicted(state.host, victims, CAPACITY)
        events.append(eviction)
        free = free + eviction.blocks
    nodes, counts, sources = array("Q"), array("I"), array("i")
    upper = 0
    for run in runs:
        count = min(run.size, room - len(sources))
        if not count:
            break
        copy = run.copies[0]
        assert copy is not None
        nodes.append(run.id)
        counts.append(count)
        sources.extend(copy.ids[:count])
        upper = state.next_node if count < run.size else 0
    targets: IntArray = free[len(free) - len(sources) :][::-1]
    none, zero = array("Q"), array("I")
    events.append(TransferStarted(state.next_transfer, BACKUP, 0, upper, nodes, counts, none, zero, sources, targets))
    return events


def _awaits_its_step(state: State, run: Node) -> bool:
    """Whether a request has cached a run and not computed so far yet.

    The run's own mark is not enough: who shares a run that another has cached ahead, and ends before that step has,
    takes the mark along.
    """
    return any(
        run.end > request.computed and request.has_cached(run) and holds(request.leaf, run)
        for request in state.requests.values()
    )


def _used_enough(state: State, node: Node) -> bool:
    enough = state.opened.backup_after
    return enough <= 1 or node.hits >= enough


TRANSFERS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    FinishTransfer: _finish_transfer,
    EndQuarantine: _end_quarantine,
    Backup: _back_up,
}
