"""A process that somebody else started, watched through a pidfd: its end is proven, its number cannot be mistaken."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from typing import Self

from ipc.processes import alive


class AdoptedProcess:
    """The part of :class:`subprocess.Popen` that a supervisor needs, for a process that is not a child."""

    def __init__(self, pid: int, fd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd = fd

    @classmethod
    def of(cls, pid: int, started: int) -> Self | None:
        """The process with this id and start time, if it still runs."""
        try:
            fd = os.pidfd_open(pid)
        except (OSError, OverflowError):
            return None
        if alive(pid, started):  # looked at after the pidfd was there: it is this very process that the pidfd holds
            return cls(pid, fd)
        os.close(fd)
        return None

    def poll(self) -> int | None:
        """``None`` while it runs; then 0, since only its parent learns its exit status."""
        if self.returncode is None and self._ended(0):
            self.returncode = 0
            os.close(self._fd)
        return self.returncode

    def _ended(self, timeout: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises :class:`subprocess.TimeoutExpired`."""
        if self.returncode is None and not self._ended(1 << 20 if timeout is None else timeout):
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.poll() or 0

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)
