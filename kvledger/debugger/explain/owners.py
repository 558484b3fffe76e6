"""Who has a block, in a state: the free list, a run, a request or a transfer, and where in it."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from kvledger.debugger.explain.wording import block_name, count, listed, namespace_name
from kvledger.debugger.source.hashes import hash_of
from kvledger.debugger.source.source import SourceError
from statemachine.events import Tier
from statemachine.state.nodes import Node, Request, Transfer
from statemachine.state.state import State
from statemachine.state.tree import root_of

_SHOWN_TOKENS = 8
_SHOWN_NAMES = 6
_NO_IDS = array("i")


class Owner(NamedTuple):
    """An owner, and the block's place there. Exactly one of the four is set."""

    free: bool = False
    node: Node | None = None
    request: Request | None = None
    transfer: Transfer | None = None
    place: int = 0
    """In the run, from 0; in the block table; in the free list, 0 is granted next."""


def expect_block(state: State, tier: Tier, block: int) -> None:
    """Raises :class:`SourceError` unless the pool of the tier has this block, now."""
    capacity = max(state.pool(tier).capacity, 0)
    if not 0 <= block < capacity:
        there = f"0 to {capacity - 1}" if capacity else "none"
        raise SourceError(f"there is no {block_name(tier, block)}: the blocks of that tier are {there}")


def owners_of(state: State, tier: Tier, block: int) -> list[Owner]:
    """All owners of a block: one, unless something is wrong."""
    found: list[Owner] = []
    free = state.pool(tier).free
    if block in free:
        found.append(Owner(free=True, place=len(free) - 1 - free.index(block)))
    found += (Owner(node=node, place=place) for node, place in _runs_with(state, tier, block))
    if tier == Tier.DEVICE:
        for request in state.requests.values():
            if block in request.table and block in request.private():
                found.append(Owner(request=request, place=request.table.index(block)))
    for transfer in state.transfers.values():
        if block in transfer.own_blocks(tier):
            found.append(Owner(transfer=transfer))
    return found


def _runs_with(state: State, tier: Tier, block: int) -> list[tuple[Node, int]]:
    """The runs that have a block, and its place in each. All ids in one array: ten times as fast as one by one."""
    nodes = list(state.nodes.values())
    copies = [copy.ids if copy is not None else _NO_IDS for copy in (node.copies[tier] for node in nodes)]
    places = np.flatnonzero(np.frombuffer(b"".join(copies), np.int32) == block)
    if not len(places):
        return []
    ends = np.cumsum([len(ids) for ids in copies])
    return [(nodes[run], copies[run].index(block)) for run in np.unique(np.searchsorted(ends, places, side="right"))]


def short(owner: Owner) -> str:
    """An owner in a few words."""
    if owner.free:
        return "free"
    if owner.node is not None:
        return f"block {owner.place} of run {owner.node.id}"
    if owner.request is not None:
        return f"private to request {owner.request.request_id!r}, at position {owner.place} of its block table"
    assert owner.transfer is not None
    held = "quarantined with" if owner.transfer.quarantined else "held by"
    return f"{held} transfer {owner.transfer.id} until that ends"


def holders(state: State, node: Node) -> list[Request]:
    """Live requests whose path goes through a run, oldest first."""
    return [request for request in state.requests.values() if on_path(request.leaf, node)]


def on_path(leaf: Node, node: Node) -> bool:
    """Whether ``node`` is ``leaf`` or above it."""
    above: Node | None = leaf
    while above is not None and above is not node:
        above = above.parent
    return above is node


def tokens(words: bytes) -> str:
    """Content words as token ids; those of a multimodal item are shown as what they are."""
    values = array("i", words)
    shown = [str(value) if value >= 0 else f"item:{value & 0x7FFFFFFF:x}" for value in values[:_SHOWN_TOKENS]]
    return ", ".join(shown) + (f", … ({len(values)} tokens)" if len(values) > _SHOWN_TOKENS else "")


def content(state: State, node: Node, place: int, words: bool = True) -> str:
    """What a cached block holds: its hash, and its tokens and namespace unless ``words`` is false (they are users')."""
    size = state.block_bytes
    held = f"tokens {tokens(node.words[place * size : (place + 1) * size])}; " if words else ""
    namespace = root_of(node).words
    space = f", under {namespace_name(namespace)}" if words and namespace else ""
    return f"{held}hash {hash_of(state, node, place).hex()}{space}"


def describe(state: State, tier: Tier, block: int, words: bool = True) -> list[str]:
    """A block now: its owner, what it holds, who holds it, when its turn to be evicted comes. See :func:`content`.

    Raises:
        SourceError: there is no such block.
    """
    expect_block(state, tier, block)
    found = owners_of(state, tier, block)
    name = block_name(tier, block)
    if not found:
        return [f"{name} is lost: nobody has it"]
    if len(found) > 1:
        return [f"{name} has {len(found)} owners: {listed(short(owner) for owner in found)}"]
    owner = found[0]
    if owner.free:
        return [f"{name} is free, {'next' if not owner.place else f'behind {owner.place:,} others'} to be granted"]
    lines = [f"{name} is {short(owner)}"]
    node = owner.node
    if node is None:
        return lines
    lines[0] += f", position {node.start + owner.place} of its path"
    copy = node.copies[tier]
    if copy is None or not copy.ready:
        assert node.transfer is not None
        lines.append(f"its content is still arriving with transfer {node.transfer.id}")
    if node.distrusted:
        lines.append("it turned out bad: nothing matches it, and it goes when nobody holds it")
    if node.uncomputed:
        lines.append("it is cached ahead: the step that computes it is not over yet")
    lines.append(f"it stands for {content(state, node, owner.place, words)}")
    for other, copy in zip(Tier, node.copies):
        if copy is not None and other != tier:
            lines.append(f"the run has a copy on the other tier: {block_name(other, copy.ids[owner.place])}")
    lines.append(_held(state, tier, node))
    return lines


def _held(state: State, tier: Tier, node: Node) -> str:
    if node.pins:
        names = [f"{request.request_id!r}" for request in holders(state, node)]
        swaps = [str(t.id) for t in state.transfers.values() if t.leaf is not None and on_path(t.leaf, node)]
        text = f"held by request{'s' * (len(names) > 1)} {listed(names[:_SHOWN_NAMES])}" if names else "held"
        if len(names) > _SHOWN_NAMES:
            text += f" and {len(names) - _SHOWN_NAMES} more"
        return text + (f" and by swap-in {listed(swaps)}" if swaps else "")
    before = 0
    for order in state.place(tier).orders:
        for run in order:
            if run is node:
                return f"nobody holds it: it can be evicted after {count(before, 'block')} of other runs"
            before += run.size
    return "nobody holds it"
