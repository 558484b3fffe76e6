"""Whether kvledger can work on this machine, in this container, for this user: what ``kvledger doctor`` runs.

Only what really fails in practice, and what kvledger itself would say later or never.

Rules:

* A check removes what it made before it answers, and a finding says what to do.
* The checks of the installation import nothing that could be missing: they run where kvledger cannot be imported.

Words: ``docs/glossary.md``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvledger.doctor import installation
from kvledger.doctor.finding import Finding, Status, problem

__all__ = ["Finding", "Result", "Status", "examine"]


class Result(NamedTuple):
    """A check and its answer."""

    check: str
    finding: Finding


def examine() -> Iterator[Result]:
    """All checks, one after the other; each has removed what it made when its answer comes.

    Where kvledger cannot be imported, those of the installation alone.
    """
    for name, check in (("version", installation.version), ("packages", installation.packages)):
        yield _result(name, check)
    imports = _result("imports", installation.imports)
    yield imports
    if imports.finding.status == Status.PROBLEM:
        return
    from kvledger.doctor import limits, optional, processes, shared_memory
    from kvledger.doctor.trial import trial

    ledger = f"doctor-{os.getpid()}-{secrets.token_hex(4)}"  # containers may share /dev/shm and not process ids
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("crc32c", installation.checksums),
        ("/dev/shm", shared_memory.file_system),
        ("room", shared_memory.room),
        ("segment", lambda: shared_memory.shared_segment(ledger)),
        ("semaphore", lambda: shared_memory.semaphore(ledger)),
        ("who lives", lambda: processes.who_lives(ledger)),
        ("open files", limits.open_files),
        ("file size", limits.file_size),
        ("address space", limits.address_space),
        ("worker", processes.worker),
        ("cores", processes.cores),
        ("ledgers", processes.left_behind),
        ("extras", optional.extras),
        ("GPU", optional.gpu),
        ("trial", lambda: trial(ledger)),
    ]
    for name, check in checks:
        yield _result(name, check)


def _result(name: str, check: Callable[[], Finding]) -> Result:
    try:
        return Result(name, check())
    except Exception as error:  # a sick machine may refuse anything, and the other checks may say why
        lines = str(error).splitlines() or [""]
        return Result(name, problem(f"{type(error).__name__}: {lines[0]}", "see what else is said here"))
