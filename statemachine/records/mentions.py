"""What an event mentions: blocks by tier, requests, runs and transfers. Filters, histories and indexes ask this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksComputed,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    DigestTaken,
    Direction,
    EpochStarted,
    Event,
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    TierLost,
    TransferFinished,
    TransferStarted,
    WorkerJoined,
    WorkerLost,
)

_NONE: tuple[int, ...] = ()


class Mentions(NamedTuple):
    """Ids that stand in an event."""

    device: Sequence[int] = _NONE
    host: Sequence[int] = _NONE
    requests: Sequence[int] = _NONE
    nodes: Sequence[int] = _NONE
    transfers: Sequence[int] = _NONE


_NOTHING = Mentions()


def mentions(event: Event) -> Mentions:
    """The ids in an event; 0 where the event names no run or request."""
    return FINDERS[type(event)](event)


def _evicted(event: BlocksEvicted) -> Mentions:
    nodes = [*event.nodes, event.upper] if event.upper else event.nodes
    return Mentions(_NONE, event.blocks, _NONE, nodes) if event.tier else Mentions(event.blocks, _NONE, _NONE, nodes)


def _started(event: TransferStarted) -> Mentions:
    device, host = event.sources, event.targets
    if event.direction == Direction.SWAP_IN:
        device, host = host, device
    nodes = [*event.nodes, event.upper] if event.upper else event.nodes
    return Mentions(device, host, (event.request,), nodes, (event.transfer, *event.after))


def _extended(event: RequestExtended) -> Mentions:
    return Mentions(event.blocks, _NONE, (event.request,), (event.leaf, event.upper))


def _nothing(event: Event) -> Mentions:
    return _NOTHING


FINDERS: dict[type[Any], Callable[[Any], Mentions]] = {
    LedgerOpened: _nothing,
    RequestMatched: lambda event: Mentions(_NONE, _NONE, (event.request,), (event.leaf, event.upper)),
    BlocksAllocated: lambda event: Mentions(event.blocks, _NONE, event.requests, _NONE, event.after),
    AllocationRefused: lambda event: Mentions(_NONE, _NONE, (event.request,), (event.leaf,)),
    BlocksCached: lambda event: Mentions(event.blocks, _NONE, (event.request,), (event.leaf, event.upper, event.node)),
    BlocksReassigned: lambda event: Mentions(event.blocks, _NONE, (event.request, event.target)),
    BlocksTrimmed: lambda event: Mentions(event.blocks, _NONE, (event.request,)),
    RequestReleased: lambda event: Mentions(event.blocks, _NONE, (event.request,), event.merged),
    BlocksEvicted: _evicted,
    TransferStarted: _started,
    TransferFinished: lambda event: Mentions(_NONE, _NONE, _NONE, (event.upper,), (event.transfer,)),
    QuarantineEnded: lambda event: Mentions(transfers=(event.transfer,)),
    CacheCleared: _nothing,
    PoolResized: _nothing,
    TierLost: _nothing,
    WorkerJoined: _nothing,
    WorkerLost: _nothing,
    EpochStarted: _nothing,
    DigestTaken: _nothing,
    RequestExtended: _extended,
    BlocksComputed: lambda event: Mentions(requests=(event.request,)),
}
