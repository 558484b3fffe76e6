"""Errors of the shared-memory log, by who is at fault."""

from __future__ import annotations


class LedgerError(RuntimeError):
    """Base of everything :mod:`ipc` raises."""


class InvalidName(LedgerError, ValueError):
    """A ledger cannot have this name."""


class LedgerExists(LedgerError):
    """There is a ledger of that name already: open it, choose another name, or remove it."""


class NotPrivate(LedgerError):
    """A shared-memory object is owned by another user, or others may read or write it: nothing in it can be trusted."""


class WriterAlive(LedgerError):
    """Another process is writing this ledger."""


class LedgerNotFound(LedgerError):
    """There is no ledger of that name, or not the segment that was asked for."""


class NotOurs(NotPrivate, LedgerNotFound):
    """What stands under a name is another user's: whatever it is, it is not what was looked for."""


class SharedMemoryFull(LedgerError):
    """``/dev/shm`` has no room for a segment; nothing was created."""


class TooManyFiles(LedgerError):
    """This process, or the machine, has no file descriptor left; nothing was created."""


class TransactionTooLarge(LedgerError):
    """One transaction may take a quarter of a segment at most; nothing was written."""


class TooManyReaders(LedgerError):
    """All reader lines of the control segment are taken."""


class Overrun(LedgerError):
    """A reader asked for events that are gone: ``wanted`` is below ``available``, the oldest sequence kept."""

    def __init__(self, ledger: str, wanted: int, available: int) -> None:
        self.wanted = wanted
        self.available = available
        super().__init__(
            f"ledger {ledger!r}: events {wanted} to {available - 1} are gone; start again from a snapshot at or after "
            f"{available - 1}, or keep more of the log (retain_bytes)"
        )


class LogCorrupt(LedgerError):
    """A record fails its checksum although later ones are intact. ``segment`` and ``offset`` say where."""

    def __init__(self, segment: str, offset: int, reason: str) -> None:
        self.segment = segment
        self.offset = offset
        super().__init__(f"{segment} at byte {offset}: {reason}")
