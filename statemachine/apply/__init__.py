"""``apply(state, event)``: the only way in which the state changes.

Every handler first validates the event against the state and raises :class:`InvariantViolation` naming event, block
and owner; only then it changes anything. No policy lives here: what happens was decided when the event was written.

Rules:

* Validate, then change: an event that cannot be applied leaves the state as it was.
* The same subjects as in ``decide``; :mod:`.tree` and :mod:`.blocks` are the writers that all of them use.

Words: ``docs/glossary.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.apply import blocks, cache, ledger, pools, requests, sides, transfers
from statemachine.apply.ledger import genesis
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
    RequestExtended,
    RequestMatched,
    RequestReleased,
    SideAllocated,
    SideFreed,
    TierLost,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.state.state import State


def apply(state: State, event: Event) -> None:
    """Apply one event in place.

    Raises:
        InvariantViolation: the event contradicts the state, which is then unchanged.
    """
    HANDLERS[type(event)](state, event)


HANDLERS: dict[type[Any], Callable[[State, Any], None]] = {
    LedgerOpened: ledger.ledger_opened,
    RequestMatched: requests.request_matched,
    BlocksAllocated: blocks.blocks_allocated,
    AllocationRefused: blocks.allocation_refused,
    BlocksCached: cache.blocks_cached,
    BlocksReassigned: blocks.blocks_reassigned,
    BlocksTrimmed: blocks.blocks_trimmed,
    RequestReleased: requests.request_released,
    BlocksEvicted: cache.blocks_evicted,
    TransferStarted: transfers.transfer_started,
    TransferFinished: transfers.transfer_finished,
    QuarantineEnded: transfers.quarantine_ended,
    CacheCleared: cache.cache_cleared,
    PoolResized: pools.pool_resized,
    TierLost: pools.tier_lost,
    WorkerJoined: ledger.worker_joined,
    WorkerLost: ledger.worker_lost,
    EpochStarted: ledger.epoch_started,
    DigestTaken: ledger.digest_taken,
    RequestExtended: requests.request_extended,
    BlocksComputed: requests.blocks_computed,
    WeightsLoaded: ledger.weights_loaded,
    CopiesReplaced: cache.copies_replaced,
    BlocksDistrusted: cache.blocks_distrusted,
    SideAllocated: sides.side_allocated,
    WindowPassed: sides.window_passed,
    SideFreed: sides.side_freed,
    BlocksChosen: blocks.blocks_chosen,
    EngineDeparted: lambda state, event: None,
}
"""Event → how it changes the state; what :func:`apply` looks up, for loops where a call counts."""

__all__ = ["HANDLERS", "apply", "genesis"]
