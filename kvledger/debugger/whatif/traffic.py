"""The traffic in a log: what the engine asked of the cache, without what the cache answered.

Which words a request brought, how long its block table became, what it published and when it ended: that is what stays
the same under another capacity. Which blocks were found, granted, evicted or moved is what a simulation decides anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, assert_never

from kvledger.debugger.source.source import Source
from kvledger.debugger.source.steps import stepped
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksChosen,
    BlocksComputed,
    BlocksDistrusted,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    CopiesReplaced,
    DigestTaken,
    EngineDeparted,
    EpochStarted,
    Event,
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    SideAllocated,
    SideFreed,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.state import tree
from statemachine.state.state import State


class Begin(NamedTuple):
    """A request comes with the ``words`` of its full blocks; ``limit`` of them may match."""

    request: int
    namespace: bytes
    words: bytes
    limit: int
    blocks: int
    """Length that its block table gets at once."""
    found: int
    """Leading blocks that matched where this was recorded."""
    items: bytes
    """Images and sounds of the prompt."""


class Grow(NamedTuple):
    """A request's block table has to have ``blocks`` blocks."""

    request: int
    blocks: int


class Again(NamedTuple):
    """Between two chunks a request looks again for what others have cached; ``found`` blocks behind ``start`` were."""

    request: int
    start: int
    found: int


class Publish(NamedTuple):
    """The first ``blocks`` blocks of a request are computed; ``words``: of the generated blocks among them."""

    request: int
    blocks: int
    words: bytes
    items: bytes = b""


class Shrink(NamedTuple):
    """A request keeps only the first ``blocks`` blocks of its block table."""

    request: int
    blocks: int


class Move(NamedTuple):
    """A request hands so many of its own ``blocks`` to ``target``."""

    request: int
    target: int
    blocks: int


class End(NamedTuple):
    """A request is over. ``final``: the engine's hint did something when this was recorded."""

    request: int
    reason: ReleaseReason
    final: bool


class Spoil(NamedTuple):
    """What a request has cached after its first ``blocks`` blocks turned out bad."""

    request: int
    blocks: int


class Forget(NamedTuple):
    """Everything cached was cleared (``tier is None``), or the memory of a tier was lost."""

    tier: Tier | None


class Refused(NamedTuple):
    """The recorded cache had no room."""


Ask = Begin | Grow | Again | Publish | Shrink | Move | End | Spoil | Forget | Refused


class Moment(NamedTuple):
    """What one transaction says about the traffic."""

    sequence: int
    asks: list[Ask]
    in_use: int
    """Device blocks in use (by requests and copies) after it, where it was recorded."""


def traffic(source: Source) -> Iterator[Moment]:
    """The traffic of a log, from its first event on.

    What a log does not say, and how it is taken:

    * How many blocks a request was willing to match: all full blocks, unless all but the last matched although the last
      was there (engines leave one token to compute).
    * A hint that had no effect is not told from one that was not given.
    * A request that looked again and found nothing did not look.
    * What is cached ahead of its step is published like the rest; runs that were evicted on demand are not.

    Requests that began before the log did are left out.

    Raises:
        Contradiction: an event contradicts the state that it meets.
    """
    for transaction, state in stepped(source):
        asks: list[Ask] = []
        begun: set[int] = set()
        for entry in transaction:
            event = entry.event
            if isinstance(event, RequestMatched):
                begun.add(event.request)
                asks += _begun(state, event)
            else:
                asks += _asks(state, event, begun)
        in_use = state.device.pool.capacity - len(state.device.pool.free) - state.device.evictable
        yield Moment(transaction[-1].sequence, asks, in_use)


def _begun(state: State, event: RequestMatched) -> Iterator[Ask]:
    request = state.requests[event.request]
    matched = event.device_blocks + event.host_blocks
    path = state.path(request.leaf)
    words = tree.content_of(path) + request.words if path else request.words
    count = len(words) // state.block_bytes
    limit = count
    if matched == count - 1:
        last = request.leaf.children.get(request.words + request.items.get(matched, b""))
        if last is not None and last.matchable():
            limit = matched
    yield Begin(request.number, event.namespace, words, limit, len(request.table), matched, event.items)
    if matched:
        # Where these blocks do not match, they are computed and published like the rest.
        yield Publish(request.number, matched, b"")


def _asks(state: State, event: Event, begun: set[int]) -> Iterator[Ask]:
    match event:
        case BlocksAllocated():
            for id in event.requests:
                if id not in begun:
                    yield Grow(id, len(state.requests[id].table))
        case RequestExtended():
            end = state.requests[event.request].leaf.end
            yield Again(event.request, end - event.device_blocks, event.device_blocks)
            yield Publish(event.request, end, b"")  # as above
        case BlocksCached():
            yield Publish(event.request, state.requests[event.request].leaf.end, event.words, event.items)
        case BlocksTrimmed():
            yield Shrink(event.request, len(state.requests[event.request].table))
        case BlocksReassigned():
            yield Move(event.request, event.target, len(event.blocks))
        case RequestReleased():
            yield End(event.request, ReleaseReason(event.reason), event.final > 0)
        case AllocationRefused():
            yield Refused()
        case BlocksDistrusted():
            run = state.nodes.get(event.node)
            if run is not None:  # else it has been dropped in the same step
                yield Spoil(event.request, run.start)
        case CacheCleared():
            yield Forget(None)
        case TierLost():
            yield Forget(Tier(event.tier))
        case LedgerOpened() | RequestMatched() | EpochStarted() | WorkerJoined() | WorkerLost() | DigestTaken():
            pass
        case BlocksComputed() | BlocksEvicted() | PoolResized() | WeightsLoaded() | CopiesReplaced():
            pass
        case SideAllocated() | WindowPassed() | SideFreed():
            pass  # they follow from what is asked of group 0
        case BlocksChosen() | EngineDeparted():
            pass
        case TransferStarted() | TransferFinished() | QuarantineEnded():
            pass
        case _:
            assert_never(event)
