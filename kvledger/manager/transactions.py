"""From decided events to the log: encode, reserve room, apply, publish, in that order.

Nobody can act on something that is not in the log, and what is refused leaves no trace.
"""

from __future__ import annotations

import struct

from ipc import LedgerError, LogWriter, SharedMemoryFull, TransactionTooLarge, record_bytes
from kvledger.errors import CallTooLarge
from statemachine.apply import HANDLERS
from statemachine.errors import InvalidCommand
from statemachine.events import (
    BlocksComputed,
    BlocksTrimmed,
    CopiesReplaced,
    Event,
    QuarantineEnded,
    RequestReleased,
    SideFreed,
    TierLost,
    TransferFinished,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records import codec
from statemachine.state.state import State

_GIVING_BACK = {
    BlocksComputed,  # a release begins with it
    RequestReleased,
    CopiesReplaced,
    BlocksTrimmed,
    SideFreed,
    WindowPassed,
    TransferFinished,
    QuarantineEnded,
    TierLost,
    WorkerLost,
    WorkerJoined,
}
"""Transactions of only these must go on being logged as long as possible when there is no room for more log."""


class Transactions:
    """Turns the events of one call into one transaction of the log and one change of the state, or into neither.

    Between :meth:`begin` and :meth:`end` the events of several calls are collected and become one transaction. The
    state has them at once; the log has room for them, and shows none of them before the end.
    """

    def __init__(self, writer: LogWriter, state: State) -> None:
        self._writer = writer
        self._state = state
        self.step = 0
        """Of the scheduler, written beside every event."""
        self.closed = ""
        """Why nothing may be committed any more."""
        self.collecting = False
        """Whether calls are collected."""
        self._collected: list[codec.Encoded] = []
        self._calls: set[int] = set()
        """Indexes of the records with which the second and every further collected call begins."""
        self._bytes = 0
        """Room that the collected records take in the log."""

    @property
    def next_sequence(self) -> int:
        """Sequence number of the next event, after those that are collected."""
        return self._writer.next_sequence + len(self._collected)

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
            if self.collecting:
                self._collect(records, events)
            else:
                self._stage(records, events)
            if apply_them:
                state = self._state
                for event in events:
                    HANDLERS[type(event)](state, event)
            if not self.collecting:
                self._writer.publish()
        except (CallTooLarge, LedgerError):  # of staging, which comes first
            raise
        except BaseException as error:
            self._unfinished(error)
            raise

    def begin(self) -> bool:
        """Collect from now on. Returns whether that is new."""
        new = not self.collecting
        self.collecting = True
        return new

    def end(self) -> None:
        """Publish what was collected, as one transaction, and collect no more."""
        self.collecting = False
        self._publish()

    def _publish(self) -> None:
        if not self._collected or self.closed:
            return
        try:
            self._writer.stage(self._collected, self.step, giving_back=True, calls=self._calls)
            self._writer.publish()
        except BaseException as error:  # there is room for it: something has interrupted it
            self._unfinished(error)
            raise
        self._collected, self._calls, self._bytes = [], set(), 0

    def _unfinished(self, error: BaseException) -> None:
        self.closed = f"a transaction was not finished ({type(error).__name__}: {error}); reopen the ledger"

    def _collect(self, records: list[codec.Encoded], events: list[Event]) -> None:
        """Reserve room for these records behind those that are collected; what outgrows a transaction is published."""
        size = sum([record_bytes(len(record[3]) + len(record[4])) for record in records])
        if self._bytes + size > self._writer.max_transaction_bytes:
            self._publish()
        try:
            self._writer.reserve(self._bytes + size)
        except TransactionTooLarge as error:
            raise CallTooLarge(f"{error}; a prompt has up to about {self._most_tokens():,} new tokens here") from error
        except SharedMemoryFull:
            if not all(type(event) in _GIVING_BACK for event in events):
                raise
            self._writer.reserve(self._bytes + size, giving_back=True)
        if self._collected:
            self._calls.add(len(self._collected))
        self._collected += records
        self._bytes += size

    def _most_tokens(self) -> int:
        """So many tokens that are not cached, with the blocks for them, fit in one transaction."""
        return self._writer.max_transaction_bytes // (self._state.block_bytes + 4) * self._state.opened.block_size

    def _stage(self, records: list[codec.Encoded], events: list[Event]) -> None:
        try:
            self._writer.stage(records, self.step)
        except TransactionTooLarge as error:
            raise CallTooLarge(f"{error}; a prompt has up to about {self._most_tokens():,} new tokens here") from error
        except SharedMemoryFull:
            if not all(type(event) in _GIVING_BACK for event in events):
                raise
            self._writer.stage(records, self.step, giving_back=True)
