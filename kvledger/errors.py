"""What a manager raises beside the rejections of the state machine (:mod:`statemachine.errors`)."""

from __future__ import annotations

from ipc import LedgerError
from statemachine.errors import CommandRejected, InvalidCommand


class ManagerClosed(RuntimeError):
    """The manager was closed, or an internal error ended it; reopen the ledger."""


class WrongThread(RuntimeError):
    """The call came from a thread that does not own the manager; nothing happened."""


class Paused(CommandRejected):
    """The manager is paused: nothing is matched or handed out before :meth:`CacheManager.resume`."""


class CallTooLarge(InvalidCommand):
    """What one call would log is more than a quarter of a log segment: split the call, or make segment_bytes larger."""


class HandoffError(RuntimeError):
    """A request cannot be handed from one instance to the other: the message says why, and nothing has happened."""


class CannotContinue(LedgerError):
    """A dead engine's ledger has other events than this kvledger, or none: it can only be replaced."""
