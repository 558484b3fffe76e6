"""``apply(state, event)``: the only way in which the state changes.

Every handler first validates the event against the state and raises :class:`InvariantViolation` naming event, block
and owner; only then it changes anything. No policy lives here: what happens was decided when the event was written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.apply import cache as apply_cache
from statemachine.apply import chunks as apply_chunks
from statemachine.apply import requests as apply_requests
from statemachine.apply import transfers as apply_transfers
from statemachine.apply.expect import violated
from statemachine.errors import InvariantViolation
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
    EpochStarted,
    Event,
    HostPolicy,
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
from statemachine.state.state import MOST_BLOCKS, State


def genesis(event: Event) -> State:
    """The state after the first event of a ledger.

    Raises:
        InvariantViolation: it is not a :class:`LedgerOpened`.
    """
    if not isinstance(event, LedgerOpened):
        raise InvariantViolation(f"a ledger begins with LedgerOpened, not with {type(event).__name__}")
    expect_possible(event)
    return State(event)


def expect_possible(event: LedgerOpened) -> None:
    """Refuse sizes and policies that no ledger can have. Raises :class:`InvariantViolation`."""
    if not 0 < event.block_size <= MOST_BLOCKS or event.host_policy > HostPolicy.WRITE_THROUGH:
        violated(event, "the block size or the host policy is impossible")
    if max(event.device_blocks, event.host_blocks + event.host_staging_blocks) > MOST_BLOCKS:
        violated(event, f"a pool has {MOST_BLOCKS} blocks at most")


def apply(state: State, event: Event) -> None:
    """Apply one event in place.

    Raises:
        InvariantViolation: the event contradicts the state, which is then unchanged.
    """
    HANDLERS[type(event)](state, event)


def _ledger_opened(state: State, event: LedgerOpened) -> None:
    violated(event, "a ledger is opened once")


def _worker_joined(state: State, event: WorkerJoined) -> None:
    if event.rank >= state.opened.ranks or event.incarnation <= state.workers.get(event.rank, 0):
        violated(event, f"rank {event.rank} cannot join as incarnation {event.incarnation}")
    state.workers[event.rank] = event.incarnation


def _worker_lost(state: State, event: WorkerLost) -> None:
    if state.workers.get(event.rank) != event.incarnation:
        violated(event, f"rank {event.rank} has no living incarnation {event.incarnation}")


def _epoch_started(state: State, event: EpochStarted) -> None:
    if event.epoch <= state.epoch:
        violated(event, f"epoch {state.epoch} is not followed by {event.epoch}")
    state.epoch = event.epoch


def _digest_taken(state: State, event: DigestTaken) -> None:
    """Changes nothing; a replay compares it."""


HANDLERS: dict[type[Any], Callable[[State, Any], None]] = {
    LedgerOpened: _ledger_opened,
    RequestMatched: apply_requests.request_matched,
    BlocksAllocated: apply_requests.blocks_allocated,
    AllocationRefused: apply_requests.allocation_refused,
    BlocksCached: apply_cache.blocks_cached,
    BlocksReassigned: apply_requests.blocks_reassigned,
    BlocksTrimmed: apply_requests.blocks_trimmed,
    RequestReleased: apply_requests.request_released,
    BlocksEvicted: apply_cache.blocks_evicted,
    TransferStarted: apply_transfers.transfer_started,
    TransferFinished: apply_transfers.transfer_finished,
    QuarantineEnded: apply_transfers.quarantine_ended,
    CacheCleared: apply_cache.cache_cleared,
    PoolResized: apply_cache.pool_resized,
    TierLost: apply_cache.tier_lost,
    WorkerJoined: _worker_joined,
    WorkerLost: _worker_lost,
    EpochStarted: _epoch_started,
    DigestTaken: _digest_taken,
    RequestExtended: apply_chunks.request_extended,
    BlocksComputed: apply_chunks.blocks_computed,
}
"""Event → how it changes the state; what :func:`apply` looks up, for loops where a call counts."""
