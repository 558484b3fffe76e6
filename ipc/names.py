"""Names of a ledger's objects in shared memory.

``<ledger>.control``, ``<ledger>.<epoch>.<index>`` (log segments) and ``<ledger>.bell.<reader>``, a semaphore, belong
to a log. Whatever else starts with ``<ledger>.`` (a worker's own log, pools, signals) belongs to the same ledger: the
name of a ledger has no dot, so none is the beginning of another's. A name alone proves nothing, though: see
:mod:`ipc.ownership`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ipc.errors import InvalidName

SHM = Path("/dev/shm")
_PART = r"(\.[A-Za-z0-9_-]{1,32}){0,4}"
_LEDGER = re.compile(r"[A-Za-z0-9_-]{1,64}")
_LOG = re.compile(_LEDGER.pattern + _PART)
_SEMAPHORES = "sem"
"""What the files of semaphores begin with."""


def check_name(ledger: str) -> str:
    """The name of a ledger, itself.

    Raises:
        InvalidName: it has other characters than letters, digits, ``_`` and ``-``, or is one that the system uses.
    """
    if not isinstance(ledger, str) or not _LEDGER.fullmatch(ledger):
        dotted = isinstance(ledger, str) and _LEDGER.fullmatch(ledger.replace(".", "_"))
        use = f" (a dot stands before what belongs to a ledger: use {ledger.replace('.', '-')!r})" if dotted else ""
        raise InvalidName(f"{ledger!r:.200} is no ledger name: use up to 64 letters, digits, '_' and '-'{use}")
    if ledger == _SEMAPHORES:
        raise InvalidName(f"{ledger!r} is no ledger name: the system uses it for semaphores, choose another one")
    return ledger


def check_log_name(log: str) -> str:
    """The name of a log, itself: a ledger's, or one that belongs to a ledger (``<ledger>.rank0.1``).

    Raises:
        InvalidName: it is neither.
    """
    if not isinstance(log, str) or not _LOG.fullmatch(log):
        return check_name(log)
    check_name(ledger_of(log))
    return log


def ledger_of(name: str) -> str:
    """The ledger that an object or log belongs to by its name."""
    return name.lstrip("/").partition(".")[0]


def control_name(ledger: str) -> str:
    """Name of the control segment."""
    return f"/{ledger}.control"


def segment_name(ledger: str, epoch: int, index: int) -> str:
    """Name of a log segment."""
    return f"/{ledger}.{epoch}.{index}"


def bell_name(ledger: str, reader: int) -> str:
    """Name of a reader's doorbell."""
    return f"/{ledger}.bell.{reader}"
