"""Who owns a block: every block of a tier has exactly one owner."""

from __future__ import annotations

from collections.abc import Iterator

from statemachine.events import DEVICE, HOST, SWAP_IN, IntArray, Tier
from statemachine.state.nodes import Transfer
from statemachine.state.state import State


def transfer_blocks(transfer: Transfer, tier: Tier) -> IntArray:
    """Blocks of a tier that belong to a transfer itself: held for it, or targets that nobody wants any more."""
    blocks = (transfer.held if tier == DEVICE else transfer.held_host)[:]
    if transfer.quarantined:
        return blocks
    position = 0
    for part in transfer.parts:
        stop = position + part.size
        if transfer.direction == SWAP_IN:
            if tier == DEVICE and part.discard:
                blocks.extend(transfer.targets[position:stop])
            if tier == HOST and part.node is None:
                blocks.extend(transfer.sources[position:stop])
        elif tier == HOST and part.node is None:
            blocks.extend(transfer.targets[position:stop])
        position = stop
    return blocks


def owners(state: State, tier: Tier) -> Iterator[tuple[str, IntArray]]:
    """Every owner on a tier with its blocks, in no particular order."""
    yield "free list", state.pool(tier).free
    for node in state.nodes.values():
        ids = node.device if tier == DEVICE else node.host
        if ids is not None:
            yield f"run {node.id}", ids
    if tier == DEVICE:
        for request in state.requests.values():
            yield f"request {request.key!r} ({request.id})", request.private()
    for transfer in state.transfers.values():
        name = f"{'quarantined ' if transfer.quarantined else ''}transfer {transfer.id}"
        yield name, transfer_blocks(transfer, tier)


def owner(state: State, tier: Tier, block: int) -> str:
    """Name of the owner of a block, for messages; several if something is wrong, "nobody" if it is lost."""
    return " and ".join(name for name, ids in owners(state, tier) if block in ids) or "nobody"
