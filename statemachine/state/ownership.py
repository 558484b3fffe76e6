"""Who owns a block: every block of a place has exactly one owner."""

from __future__ import annotations

from collections.abc import Iterator

from statemachine.events import IntArray
from statemachine.state.places import Place
from statemachine.state.state import State


def owners(state: State, place: Place) -> Iterator[tuple[str, IntArray]]:
    """Every owner in a place with its blocks, in no particular order."""
    yield "free list", place.pool.free
    if place.group:
        for request in state.requests.values():
            for side in request.sides[place.group - 1 : place.group]:
                yield f"request {request.request_id!r} ({request.number})", side.blocks()
        return
    for node in state.nodes.values():
        copy = node.copies[place.number]
        if copy is not None:
            yield f"run {node.id}", copy.ids
    if place is state.device:
        for request in state.requests.values():
            yield f"request {request.request_id!r} ({request.number})", request.private()
    for transfer in state.transfers.values():
        name = f"{'quarantined ' if transfer.quarantined else ''}transfer {transfer.id}"
        yield name, transfer.own_blocks(place.number)


def owner(state: State, place: Place, block: int) -> str:
    """Name of the owner of a block, for messages; several if something is wrong, "nobody" if it is lost."""
    return " and ".join(name for name, ids in owners(state, place) if block in ids) or "nobody"
