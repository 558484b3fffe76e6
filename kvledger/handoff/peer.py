"""What sender and receiver have in common: how a hand-over ended, and the log in which the other side says so."""

from __future__ import annotations

import time
from typing import NamedTuple

from ipc import LedgerError, LogReader, Overrun
from kvledger.errors import HandoffError
from kvledger.manager.ranks import BlockTable
from statemachine.events import Outcome
from workers.handoff import pushes


class Handed(NamedTuple):
    """How handing over a request has ended."""

    request_id: str
    outcome: Outcome
    """Only with ``DONE`` all blocks have arrived, in all layers, on all ranks."""
    reason: str
    """Why the outcome is not ``DONE``; empty if it is."""


class Received(NamedTuple):
    """How receiving the blocks of a request has ended; see :class:`Handed`."""

    request_id: str
    outcome: Outcome
    reason: str
    block_table: BlockTable
    """Of the request now; the blocks are at its end if they have arrived, and not in it otherwise."""


class PeerLog:
    """The log of pushes of a prefill instance, followed by a decode instance from now on.

    Raises:
        HandoffError: no sender runs on that ledger.
    """

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger
        self.finished: list[pushes.PushFinished] = []
        """What has ended since it was last emptied."""
        self.lost = ""
        """Why the log of pushes has ended; empty while it has not."""
        self._next_look = 0.0
        try:
            self._reader = read_from_the_oldest(pushes.log_name(ledger), "decode")
        except LedgerError as error:
            raise HandoffError(f"no sender runs on ledger {ledger!r}: {error}") from error
        if self._reader.schema_hash != pushes.SCHEMA_HASH:
            self._reader.close()
            raise HandoffError(f"the sender of {ledger!r} runs another version of kvledger")
        self.look()
        if self.lost:
            self._reader.close()
            raise HandoffError(self.lost)
        self.finished.clear()

    def look(self) -> None:
        """Read what is new, and look whether the sender lives, 50 times per second at most."""
        now = time.monotonic()
        gone = ""
        if now >= self._next_look:
            self._next_look = now + 0.02
            if not (self._reader.writer_alive() and self._reader.exists()):
                gone = f"prefill instance {self.ledger!r} is gone"  # after what it has written before
        try:
            for record in self._reader.poll():
                fact = pushes.fact_of(record)
                if isinstance(fact, pushes.PushFinished):
                    self.finished.append(fact)
        except (LedgerError, ValueError) as error:
            gone = f"the log of pushes of {self.ledger!r} cannot be followed: {error}"
        self.lost = self.lost or gone

    def close(self) -> None:
        """Stop following."""
        self._reader.close()


def read_from_the_oldest(log: str, name: str) -> LogReader:
    """A reader of a log of pushes, from the oldest record that is still there.

    Raises:
        ipc.LedgerNotFound
    """
    oldest = 1
    while True:
        try:
            return LogReader(log, from_sequence=oldest, name=name)
        except Overrun as overrun:
            oldest = overrun.available
