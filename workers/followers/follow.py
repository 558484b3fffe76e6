"""Following a ledger from another process: its state, kept up to date from the log.

Starts at a snapshot (or at the first event, while it is still there) and applies what comes. A follower that is too
slow is told so (:class:`ipc.Overrun`, with what is gone) and may go on from the newest snapshot, knowing what it
skipped.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

from ipc import LedgerError, LedgerNotFound, LogCorrupt, LogReader, Overrun, Record, snapshots
from statemachine.records import codec
from statemachine.records.replay import Replay
from statemachine.records.snapshot import SnapshotError, restore
from statemachine.state.state import State

ORPHAN_GRACE_S = 5.0
_BATCH = 10_000


class OtherVersion(LedgerError):
    """The ledger is written by a kvledger with another event table."""


class Skipped(NamedTuple):
    """Events that a follower has not seen: ``first`` to ``last``."""

    first: int
    last: int


class Follower:
    """A state and the reader that keeps it up to date.

    Args:
        ledger: its name.
        oldest: begin as far back as the log and the snapshots reach; default: at the newest snapshot.
        before: begin at the newest snapshot that holds no event from this one on, or as close to it as can be had.

    Raises:
        ipc.LedgerNotFound, OtherVersion
        ipc.Overrun: the first events are gone, and there is no snapshot.
    """

    def __init__(self, ledger: str, *, oldest: bool = False, before: int | None = None) -> None:
        self.ledger = ledger
        self.reader: LogReader
        self.state: State | None
        self.sequence: int
        """The last event that is in the state; 0: none yet."""
        self.missed_from = 0
        """The ledger was removed before its events from this one on could be read; 0: nothing was missed."""
        self._orphan_since = 0.0
        self.digests = 0
        """How many digests of the engine were compared."""
        self._begin(oldest, before)

    def _begin(self, oldest: bool, before: int | None = None) -> None:
        gone: Overrun | LogCorrupt | None = None
        for _ in range(3):  # while we look, the log goes on, and new snapshots replace old ones
            for sequence, state in _starting_points(self.ledger, oldest, before):
                try:
                    self.reader = LogReader(self.ledger, from_sequence=sequence + 1)
                except (Overrun, LogCorrupt) as error:
                    gone = error
                    continue
                if self.reader.schema_hash != codec.SCHEMA_HASH:
                    self.reader.close()
                    raise OtherVersion(
                        f"ledger {self.ledger!r} has another event table: use the kvledger that writes it"
                    )
                self.sequence = sequence
                self.state = state
                return
        assert gone is not None
        raise gone

    def poll(self, timeout: float = 0.0) -> list[Record]:
        """The next records, whole transactions, *before* they are applied; waits up to ``timeout`` seconds.

        Raises:
            ipc.Overrun: what comes next is gone; see :meth:`resynchronise`.
            ipc.LogCorrupt
        """
        try:
            return self.reader.poll(_BATCH) or (self.reader.wait(timeout) if timeout else [])
        except Overrun:
            if self.reader.exists():
                raise
            self.missed_from = self.reader.cursor
            return []

    def apply(self, records: Iterable[Record]) -> State:
        """Bring the state up to date.

        Raises:
            InvariantViolation, statemachine.records.codec.CodecError: see
            :meth:`statemachine.records.replay.Replay.feed`;
                :attr:`sequence` is the last event that could be applied.
        """
        replay = Replay(self.state)
        try:
            replay.feed(records)
        finally:
            self.digests += replay.digests
            if replay.events:
                self.state = replay.state
                self.sequence += replay.events
        return replay.state

    def resynchronise(self) -> Skipped:
        """Go on from the newest snapshot after an :class:`ipc.Overrun`; says what was skipped.

        Raises:
            ipc.Overrun: there is no snapshot that the log continues.
        """
        behind = self.reader
        self._begin(oldest=False)
        behind.close()
        return Skipped(behind.cursor, self.sequence)

    def ended(self) -> bool:
        """Whether nothing will come any more: the ledger was removed, or no process writes it for some time.

        To be asked when there was nothing to read; an engine that died may be started again within the grace period.
        """
        if not self.reader.exists():
            return True
        if self.reader.writer_alive():
            self._orphan_since = 0.0
            return False
        self._orphan_since = self._orphan_since or time.monotonic()
        return time.monotonic() - self._orphan_since > ORPHAN_GRACE_S

    def close(self) -> None:
        """Stop reading."""
        self.reader.close()


def _starting_points(ledger: str, oldest: bool, before: int | None) -> Iterable[tuple[int, State | None]]:
    """Snapshots that are intact, in the order in which to try them, and the beginning (0)."""
    numbers = [0, *snapshots.sequences(ledger)]
    if before is not None:
        numbers = [n for n in reversed(numbers) if n < before or not n] + [n for n in numbers if n and n >= before]
    elif not oldest:
        numbers.reverse()
    for sequence in numbers:
        try:
            yield sequence, restore(snapshots.read(ledger, sequence)) if sequence else None
        except (LedgerNotFound, LogCorrupt, SnapshotError):
            continue  # replaced since we looked, or damaged
