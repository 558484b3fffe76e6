"""A process that somebody else started, known by the lock on its signals: its end is proven by the kernel.

A signal is sent where its number means it: to a process that holds its lock, in the namespaces of this one. Where that
is not so, it is asked to leave by a word that it reads itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from typing import Self

from ipc.liveness import Lock, life_of
from ipc.processes import Identity, Life, life_by_number
from ipc.signals import Signals
from workers.processes.presence import LEAVE, owner_of

_LOOK_EVERY_S = 0.005


class AdoptedProcess:
    """The part of :class:`subprocess.Popen` that a supervisor needs, for a process that is not a child."""

    def __init__(self, signals: Signals, lock: Lock) -> None:
        """``signals``: open for writing, for as long as this object is used."""
        self.returncode: int | None = None
        self._signals = signals
        self._lock = lock
        self._owner = owner_of(signals)
        self._fd = _process_descriptor(self._owner)

    @classmethod
    def of(cls, signals: Signals) -> Self | None:
        """The process whose signals these are; ``None``: there is none, and there will not be one any more.

        Raises:
            ipc.LedgerNotFound, ipc.NotPrivate, ipc.TooManyFiles
        """
        lock = Lock.on(signals.name, signals.identity)
        if lock.take():
            signals.words[LEAVE] = 1  # one that is only starting reads it as soon as it has the lock
            lock.close()
            return None
        return cls(signals, lock)

    @property
    def pid(self) -> int:
        """Its process id, in its own namespace; 0 while it has not said it."""
        return self._owner.pid

    def poll(self) -> int | None:
        """``None`` while it may run; then 0, since only its parent learns its exit status."""
        if self.returncode is None and self._ended():
            self.returncode = 0
            self._lock.close()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None
        return self.returncode

    def _ended(self) -> bool:
        """The lock is free. The kernel may still have to close a device then, which its descriptor waits for."""
        if life_of(self._lock.is_taken(), self._owner) is not Life.DEAD:
            if not self._owner.pid:
                self._owner = owner_of(self._signals)
            return False
        if self._fd is None:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises :class:`subprocess.TimeoutExpired`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(_LOOK_EVERY_S)
        return 0

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it, or where no signal reaches it, ask it to."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is not None:
            return
        self._signals.words[LEAVE] = 1
        with contextlib.suppress(OSError):  # not allowed here, or it has just ended
            if self._fd is not None:
                signal.pidfd_send_signal(self._fd, number)
            elif life_by_number(self._owner) is Life.ALIVE:  # it holds its lock, so its number is still its own
                os.kill(self._owner.pid, number)


def _process_descriptor(process: Identity) -> int | None:
    """A descriptor that becomes readable when the process has ended; ``None``: there is none to be had."""
    if life_by_number(process) is not Life.ALIVE:
        return None
    try:
        fd = os.pidfd_open(process.pid)
    except (OSError, OverflowError):
        return None
    if life_by_number(process) is Life.ALIVE:  # looked at after the descriptor was there: it is that very process
        return fd
    os.close(fd)
    return None
