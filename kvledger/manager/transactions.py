"""From decided events to the log: encode, reserve room, apply, publish, in that order.

Nobody can act on something that is not in the log, and what is refused leaves no trace.
"""

from __future__ import annotations

import struct

from ipc import LedgerError, LogWriter, SharedMemoryFull, TransactionTooLarge
from kvledger.errors import CallTooLarge
from statemachine.apply import HANDLERS
from statemachine.errors import InvalidCommand
from statemachine.events import (
    BlocksComputed,
    BlocksTrimmed,
    Event,
    QuarantineEnded,
    RequestReleased,
    TierLost,
    TransferFinished,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records import codec
from statemachine.state.state import State

_GIVING_BACK = {
    BlocksComputed,  # a release begins with it
    RequestReleased,
    BlocksTrimmed,
    TransferFinished,
    QuarantineEnded,
    TierLost,
    WorkerLost,
    WorkerJoined,
}
"""Transactions of only these must go on being logged as long as possible when there is no room for more log."""


class Transactions:
    """Turns the events of one command into one transaction of the log and one change of the state, or into neither."""

    def __init__(self, writer: LogWriter, state: State) -> None:
        self._writer = writer
        self._state = state
        self.step = 0
        """Of the scheduler, written beside every event."""
        self.closed = ""
        """Why nothing may be committed any more."""

    def commit(self, events: list[Event], apply_them: bool = True) -> None:
        """Log these events and apply them, unless the state has them already.

        Raises:
            InvalidCommand: a value does not fit its field; nothing changed.
            CallTooLarge, ipc.SharedMemoryFull, ipc.LedgerError: there is no room for it; nothing changed.
            InvariantViolation: an event contradicts the state: it is not published.

        After that, and after whatever else interrupts it half-way (a signal handler that raises), :attr:`closed` says
        why this ledger has to be opened anew: state and log may differ.
        """
        encoders = codec.ENCODERS
        try:
            records = [encoders[type(event)](event) for event in events]
        except (AttributeError, TypeError, UnicodeEncodeError, struct.error) as error:
            raise InvalidCommand(f"a name or number of this call cannot be written into the log: {error}") from error
        try:
            self._stage(records, events)
            if apply_them:
                state = self._state
                for event in events:
                    HANDLERS[type(event)](state, event)
            self._writer.publish()
        except (CallTooLarge, LedgerError):  # of staging, which comes first
            raise
        except BaseException as error:
            self.closed = f"a transaction was not finished ({type(error).__name__}: {error}); reopen the ledger"
            raise

    def _stage(self, records: list[codec.Encoded], events: list[Event]) -> None:
        try:
            self._writer.stage(records, self.step)
        except TransactionTooLarge as error:
            raise CallTooLarge(str(error)) from error
        except SharedMemoryFull:
            if not all(type(event) in _GIVING_BACK for event in events):
                raise
            self._writer.stage(records, self.step, giving_back=True)
