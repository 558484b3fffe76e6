"""Names of a ledger's objects in shared memory, and finding them again.

``<ledger>.control``, ``<ledger>.<epoch>.<index>`` (log segments) and ``<ledger>.bell.<reader>``, a semaphore, belong
to a log. Whatever else starts with ``<ledger>.`` (a worker's own log, pools, signals) belongs to the same ledger.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import posix_ipc

from ipc.errors import InvalidName, TooManyFiles

SHM = Path("/dev/shm")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,32}){0,4}")
_SEGMENT = re.compile(r"(\d+)\.(\d+)")


def check_name(ledger: str) -> str:
    """The name itself.

    Raises:
        InvalidName: it could not be a file name, or has other characters than letters, digits, ``_``, ``-`` and
            the dots between parts.
    """
    if not isinstance(ledger, str) or not _NAME.fullmatch(ledger):
        raise InvalidName(f"{ledger!r} is no ledger name: use up to 64 letters, digits, '_' and '-'")
    return ledger


def control_name(ledger: str) -> str:
    """Name of the control segment."""
    return f"/{ledger}.control"


def segment_name(ledger: str, epoch: int, index: int) -> str:
    """Name of a log segment."""
    return f"/{ledger}.{epoch}.{index}"


def bell_name(ledger: str, reader: int) -> str:
    """Name of a reader's doorbell."""
    return f"/{ledger}.bell.{reader}"


def segments_of(ledger: str) -> list[tuple[int, int]]:
    """``(epoch, index)`` of the log segments that exist, oldest first."""
    prefix = check_name(ledger) + "."
    found = []
    for name in _listing():
        if name.startswith(prefix) and (match := _SEGMENT.fullmatch(name[len(prefix) :])):
            found.append((int(match[1]), int(match[2])))
    return sorted(found)


def objects_of(ledger: str) -> list[str]:
    """File names in ``/dev/shm`` of everything that belongs to a ledger, semaphores included."""
    prefix = check_name(ledger) + "."
    return sorted(name for name in _listing() if name.removeprefix("sem.").startswith(prefix))


def _listing() -> list[str]:
    try:
        return os.listdir(SHM)
    except OSError as error:
        raise TooManyFiles(f"{SHM} cannot be read: {error.strerror}") from error


def unlink(name: str) -> None:
    """Remove a shared-memory object; it may be gone already."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(name)


def remove_objects(ledger: str) -> None:
    """Remove everything that belongs to a ledger. The caller has made sure that nobody uses it.

    Its control segment goes last: as long as something is left it can be found by it.
    """
    control = control_name(ledger)[1:]
    for name in sorted(objects_of(ledger), key=lambda name: (name == control, name)):
        if name.startswith("sem."):
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_semaphore("/" + name.removeprefix("sem."))
        else:
            unlink("/" + name)
