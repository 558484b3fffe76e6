"""Applying the life of the ledger itself: genesis, workers, epochs, digests."""

from __future__ import annotations

from statemachine.apply.expect import violated
from statemachine.errors import InvariantViolation
from statemachine.events import DigestTaken, EpochStarted, Event, LedgerOpened, WeightsLoaded, WorkerJoined, WorkerLost
from statemachine.state.state import State, impossible


def genesis(event: Event) -> State:
    """The state after the first event of a ledger.

    Raises:
        InvariantViolation: it is not a :class:`LedgerOpened`.
    """
    if not isinstance(event, LedgerOpened):
        raise InvariantViolation(f"a ledger begins with LedgerOpened, not with {type(event).__name__}")
    wrong = impossible(event)
    if wrong:
        violated(event, wrong)
    return State(event)


def ledger_opened(state: State, event: LedgerOpened) -> None:
    """Refuse a second genesis."""
    violated(event, "a ledger is opened once")


def worker_joined(state: State, event: WorkerJoined) -> None:
    """A rank has a new worker."""
    if event.rank >= state.opened.ranks or event.incarnation <= state.workers.get(event.rank, 0):
        violated(event, f"rank {event.rank} cannot join as incarnation {event.incarnation}")
    state.workers[event.rank] = event.incarnation


def worker_lost(state: State, event: WorkerLost) -> None:
    """Changes nothing: transfers that the worker was part of end by events of their own."""
    if state.workers.get(event.rank) != event.incarnation:
        violated(event, f"rank {event.rank} has no living incarnation {event.incarnation}")


def epoch_started(state: State, event: EpochStarted) -> None:
    """A new engine process took over."""
    if event.epoch <= state.epoch:
        violated(event, f"epoch {state.epoch} is not followed by {event.epoch}")
    state.epoch = event.epoch


def weights_loaded(state: State, event: WeightsLoaded) -> None:
    """The model has other weights; which namespaces that comes to is not the state's business."""
    state.weights = event.weights


def digest_taken(state: State, event: DigestTaken) -> None:
    """Changes nothing; a replay compares it."""
