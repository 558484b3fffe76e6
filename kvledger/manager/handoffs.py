"""Split prefill and decode: what a manager needs of its sender and receiver, and what dead ones leave behind.

Both import this module, and it imports neither.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

from ipc import LedgerNotFound
from ipc.ownership import objects_of, remove_objects
from ipc.signals import Signals
from kvledger.errors import HandoffError
from kvledger.manager.wait import loop
from workers.handoff import pushes
from workers.handoff.tickets import Tickets, claimed
from workers.processes.adopted import AdoptedProcess
from workers.processes.supervisor import end

STILL_WRITING_S = 10.0
"""A pusher that hangs in the middle of a layer is given so long before an engine is told."""


class Handoff(Protocol):
    """A sender or receiver, as its manager sees it."""

    def busy(self) -> bool:
        """Whether somebody reads or writes blocks of the device pool for it."""

    def fold(self) -> None:
        """Take in what the other side has said; :meth:`poll` of the sender or receiver reports it to its user."""

    def uses(self, request_id: str) -> bool:
        """Whether the block table of a request has to stay as it is."""

    def released(self, request_id: str) -> None:
        """End whatever is under way for a request that is about to be released."""

    def close(self, *, keep: bool = False) -> None:
        """Close, because the manager does."""

    def disown(self) -> None:
        """Do nothing any more, and end nothing: this process is a fork of the engine's."""


def end_pushers(ledger: str) -> None:
    """End what a dead engine of this ledger was sending.

    Raises:
        HandoffError: a pusher cannot be ended; it may still be writing into another instance's pool.
        ipc.NotPrivate, ipc.TooManyFiles: it cannot be told.
    """
    log = pushes.log_name(ledger)
    for own in objects_of(log):
        if own.name.endswith(".signals"):
            with contextlib.suppress(LedgerNotFound):
                signals = Signals(f"/{own.name}", identity=own.identity)
                try:
                    _end_pusher(ledger, signals)
                finally:
                    signals.close()
    remove_objects(log)


def _end_pusher(ledger: str, signals: Signals) -> None:
    process = AdoptedProcess.of(signals)
    if process is not None:
        end(process)
        if process.poll() is None:  # its signals stay: they are what an instance it writes to looks at
            raise HandoffError(
                f"process {process.pid}, which pushed blocks of {ledger!r}, still runs and cannot be ended from here: "
                "end it (it may belong to another container, or hang in the kernel), and try again"
            )


def end_receiving(ledger: str) -> None:
    """End what a dead engine of this ledger was receiving.

    When it returns nobody writes into the ledger's device pool any more, and nothing has to be quarantined.

    Raises:
        HandoffError: a pusher of another instance hangs in the middle of a copy; ended, it lets go.
        ipc.NotPrivate, ipc.TooManyFiles: what it was receiving cannot be looked at.
    """
    try:
        board = Tickets(ledger, inherit=True)
    except LedgerNotFound:
        return
    tickets = board.revoke_all()
    writers: dict[int, int] = {}

    def silent() -> bool:
        writers.clear()
        writers.update(claimed(tickets))
        return not writers

    if not loop(silent, STILL_WRITING_S):
        board.close()
        raise HandoffError(f"processes {sorted(set(writers.values()))} still write into {ledger!r}: end them first")
    board.close(remove=True)
