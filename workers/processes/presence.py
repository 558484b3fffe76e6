"""How a worker or pusher says who it is, and shows that it lives: words and a lock in its own signals."""

from __future__ import annotations

from ipc import LedgerNotFound
from ipc.liveness import Lock, life_of
from ipc.processes import Identity, Life, own_identity
from ipc.signals import Signals

_PID, _START, _NAMESPACE = 16, 17, 18
LEAVE = 32
"""Word of the engine: not 0, the process has to end. Heard also where no signal reaches it, or comes too early."""


class Presence:
    """Held by a process for as long as it runs; the kernel takes the lock back when it ends, however it ends."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._lock = Lock.on(signals.name, signals.identity)

    @classmethod
    def announce(cls, signals: Signals) -> Presence | None:
        """Say that this process is the one whose signals these are; ``None``: it is not wanted any more, or another is.

        Raises:
            ipc.LedgerNotFound: the signals were removed meanwhile.
            ipc.liveness.NoLocks
        """
        presence = cls(signals)
        if not presence._lock.take() or presence.is_unwanted():
            presence.close()
            return None
        words, own = signals.words, own_identity()
        words[_START], words[_NAMESPACE] = own.started, own.namespace
        words[_PID] = own.pid
        return presence

    def is_unwanted(self) -> bool:
        """Whether the process has to end."""
        return self._signals.words[LEAVE] != 0

    def close(self) -> None:
        """Give the lock up, when the process ends."""
        self._lock.close()


def owner_of(signals: Signals) -> Identity:
    """Who has announced itself in these signals."""
    return Identity(signals.words[_PID], signals.words[_START], signals.words[_NAMESPACE])


def may_live(signals: Signals) -> bool:
    """Whether the owner of these signals is not proven dead.

    Raises:
        ipc.NotPrivate, ipc.TooManyFiles: it cannot be told.
    """
    try:
        lock = Lock.on(signals.name, signals.identity)
    except LedgerNotFound:  # they are removed after their owner's end, not before
        return False
    try:
        return life_of(lock.is_taken(), owner_of(signals)) is not Life.DEAD
    finally:
        lock.close()
