"""What numbers say of a process: its id alone can be reused, and means something in its own namespace only.

Whether a process of a ledger lives is asked of the locks it holds (:mod:`ipc.liveness`). Numbers name it to people, let
a signal reach it, and are a second proof of death where they mean the same here as where they were written down.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from typing import NamedTuple

UNKNOWN_NAMESPACE = 0
_ENDED = (b"Z", b"X")


class Life(Enum):
    """What is known of a process."""

    ALIVE = "alive"
    DEAD = "dead"
    """Proven: it does nothing any more."""
    UNKNOWN = "cannot tell"


class Identity(NamedTuple):
    """A process, named by numbers."""

    pid: int
    """0: none."""
    started: int
    """See :func:`start_time`."""
    namespace: int
    """See :func:`own_namespace`."""


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (``/proc/<pid>/stat``, field 22); 0: not to be read, or ended.

    A process whose first thread has ended is none that has ended while others of its threads run.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, OverflowError):
        return 0
    return 0 if fields[0] in _ENDED and int(fields[17]) <= 1 else int(fields[19])


def own_namespace() -> int:
    """The namespaces in which this process reads ids and start times, as one number; 0: ``/proc`` is of another one."""
    try:
        if os.readlink("/proc/self") != f"{os.getpid()}":
            return UNKNOWN_NAMESPACE
        numbers = _namespace_number("pid"), _namespace_number("time")
    except (OSError, ValueError):
        return UNKNOWN_NAMESPACE
    return numbers[0] << 32 | numbers[1]


def _namespace_number(kind: str) -> int:
    try:
        return int(os.readlink(f"/proc/self/ns/{kind}").partition("[")[2].rstrip("]")) & 0xFFFFFFFF
    except FileNotFoundError:  # Linux before 5.6 has no time namespaces
        return 0


def own_identity() -> Identity:
    """This process."""
    pid = os.getpid()
    return Identity(pid, start_time(pid), own_namespace())


def life_by_number(process: Identity) -> Life:
    """What the numbers of a process say here.

    Only ``ESRCH`` and another start time are proof of its death. In another namespace, and where ``/proc`` hides what
    belongs to others, numbers say nothing.
    """
    if not process.pid or not process.started:
        return Life.UNKNOWN
    if process.namespace == UNKNOWN_NAMESPACE or process.namespace != own_namespace():
        return Life.UNKNOWN
    try:
        os.kill(process.pid, 0)
    except OverflowError:
        return Life.UNKNOWN
    except OSError as error:
        if error.errno == errno.ESRCH:
            return Life.DEAD
    found = start_time(process.pid)
    if found == process.started:
        return Life.ALIVE
    if found or _is_zombie(process.pid):
        return Life.DEAD
    return Life.UNKNOWN


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] in _ENDED and int(fields[17]) <= 1
