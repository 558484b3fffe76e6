"""Split prefill and decode: what a manager needs of its sender and receiver, and what dead ones leave behind."""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple, Protocol

from ipc import LedgerError, LedgerNotFound, LogReader, Overrun
from ipc.names import objects_of, remove_objects, unlink
from ipc.signals import Signals
from kvledger.manager import wait as waiting
from kvledger.manager.ranks import BlockTable
from statemachine.events import Outcome
from workers import transfer
from workers.handoff import pushes
from workers.handoff.tickets import Tickets, board_name, claimed
from workers.processes.adopted import AdoptedProcess
from workers.processes.supervisor import end

STILL_WRITING_S = 10.0
"""A messager that hangs in the middle of a layer is given so long before an engine is told."""


class HandoffError(RuntimeError):
    """A request cannot be handed from one instance to the other: the message says why, and nothing has happened."""


class Handed(NamedTuple):
    """A request has been handed over, or has not."""

    key: str
    outcome: Outcome
    """Only with ``DONE`` all blocks have arrived, in all layers, on all ranks."""
    reason: str
    """Why not."""


class Received(NamedTuple):
    """As :class:`Handed`, where the blocks arrive."""

    key: str
    outcome: Outcome
    reason: str
    block_table: BlockTable
    """Of the request now; the blocks are at its end if they have arrived, and not in it otherwise."""


class Handoff(Protocol):
    """A sender or receiver, as its manager sees it."""

    def busy(self) -> bool:
        """Whether somebody reads or writes blocks of the device pool for it."""

    def fold(self) -> None:
        """Take in what has happened; :meth:`poll` of the sender or receiver tells it to its user."""

    def uses(self, key: str) -> bool:
        """Whether the block table of a request has to stay as it is."""

    def released(self, key: str) -> None:
        """A request is about to be released: whatever is under way for it ends first."""

    def close(self, *, keep: bool = False) -> None:
        """The manager closes."""

    def disown(self) -> None:
        """This process is a fork of the engine's: nothing is done here any more, nor ended."""


def end_messagers(ledger: str) -> None:
    """End what a dead engine of this ledger was sending."""
    log = pushes.log_name(ledger)
    for name in objects_of(log):
        if name.endswith(".signals"):
            with contextlib.suppress(LedgerError):
                signals = Signals(f"/{name}", read_only=True)
                process = AdoptedProcess.of(signals.words[transfer.PID], signals.words[transfer.START])
                signals.close()
                if process is not None:
                    end(process)
    remove_objects(log)


def end_receiving(ledger: str) -> None:
    """End what a dead engine of this ledger was receiving.

    When it returns nobody writes into the ledger's device pool any more, and nothing has to be quarantined.

    Raises:
        HandoffError: a messager of another instance hangs in the middle of a copy; ended, it lets go.
        ipc.NotPrivate, ipc.TooManyFiles: what it was receiving cannot be looked at.
    """
    try:
        board = Tickets(ledger, inherit=True)
    except LedgerNotFound:
        unlink(board_name(ledger))  # it may be one that a dead engine had only begun to create
        return
    tickets = board.revoke_all()
    writers: dict[int, int] = {}

    def silent() -> bool:
        writers.clear()
        writers.update(claimed(tickets))
        return not writers

    if not waiting.loop(silent, STILL_WRITING_S):
        board.close()
        raise HandoffError(f"processes {sorted(set(writers.values()))} still write into {ledger!r}: end them first")
    board.close(remove=True)


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
        """Why nothing will come any more."""
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
        """Read on; 50 times per second at most also whether the sender lives."""
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
