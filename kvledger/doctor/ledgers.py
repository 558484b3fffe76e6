"""What is in ``/dev/shm``: the ledgers of this machine, alive or left by a crash, and removing the dead ones.

What belongs to a ledger carries its stamp (:mod:`ipc.ownership`), also where the control segment is gone. Anything
else, whatever its name, belongs to somebody else and is never touched.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection
from typing import NamedTuple

from ipc import Control, InvalidName, LedgerError, NotPrivate, WriterAlive, segment
from ipc.names import SHM, check_name, ledger_of
from ipc.ownership import Own, identity_of, listing, objects_of, remove_objects, stamped, unlink
from ipc.processes import Life, life_by_number
from ipc.signals import Signals
from workers.handoff import pushes
from workers.processes.presence import may_live, owner_of

_CONTROL, _SIGNALS = ".control", ".signals"


_STATES = {Life.ALIVE: "alive", Life.DEAD: "dead", Life.UNKNOWN: "cannot tell"}


class Ledger(NamedTuple):
    """A ledger, or what is left of one."""

    name: str
    state: str
    """``alive``: an engine writes it; ``orphaned``: only its workers live; ``dead``: proven; ``other user``: not
    readable; ``cannot tell``: what is left was written in another container, whose processes are not seen here."""
    epoch: int
    bytes: int
    """Of everything that belongs to it."""
    age_s: float
    """Since it was created."""
    uid: int
    writer: int
    """Process id of its last engine; 0: not known."""
    workers: list[int]
    """Process ids of its living workers."""
    objects: list[str]
    """Files in ``/dev/shm``."""


def ledgers() -> list[Ledger]:
    """All ledgers of this machine, by name."""
    found: list[Ledger] = []
    for name in sorted(entry.removesuffix(_CONTROL) for entry in listing() if entry.endswith(_CONTROL)):
        with contextlib.suppress(InvalidName, FileNotFoundError):
            ledger = _look(check_name(name))  # the log of a worker has no such name
            if ledger is not None:
                found.append(ledger)
    taken = {file for ledger in found for file in ledger.objects}
    pieces: dict[tuple[str, int], list[Own]] = {}
    for own in stamped(r".+\..+"):
        # A ledger that is made just now has its control segment before anything else.
        if own.file not in taken and (not own.identity or identity_of(own.name) != own.identity):
            pieces.setdefault((ledger_of(own.name), own.identity), []).append(own)
    for (name, identity), left in pieces.items():
        with contextlib.suppress(FileNotFoundError):  # somebody is just removing it
            found.append(_leftover(name, identity, left))
    return sorted(found)


def remove_dead(only: Collection[str] = ()) -> list[Ledger]:
    """Remove this user's ledgers whose engine and workers are dead, all or ``only`` these; returns them."""
    removed = []
    for ledger in ledgers():
        if only and ledger.name not in only:
            continue
        if ledger.state == "dead" and ledger.uid == os.getuid() and _remove(ledger):
            removed.append(ledger)
    return removed


def _remove(ledger: Ledger) -> bool:
    if f"{ledger.name}{_CONTROL}" not in ledger.objects:
        for name in ledger.objects:
            unlink("/" + name)
        return True
    try:
        control = Control.open(ledger.name)
    except LedgerError:
        return False
    try:
        control.lock()  # an engine that would open it now is refused
        if _workers(ledger.name, control):
            return False
        remove_objects(ledger.name, control.identity)
    except WriterAlive:
        return False
    finally:
        control.close()
    return True


def _look(name: str) -> Ledger | None:
    """A ledger by its control segment; ``None``: the object is not one."""
    status = os.lstat(SHM / f"{name}{_CONTROL}")
    if not stat.S_ISREG(status.st_mode):
        return None
    age = max(time.time() - status.st_mtime, 0.0)
    try:
        control = Control.open(name)
    except NotPrivate:
        if status.st_uid == os.geteuid() and not identity_of(name):
            return None
        theirs = sorted(entry for entry in listing() if entry.startswith(f"{name}."))
        if len(theirs) < 2:  # a control segment alone is no ledger
            return None
        return Ledger(name, "other user", 0, _size(theirs), age, status.st_uid, 0, [], theirs)
    except LedgerError:  # of another version of kvledger, or none at all
        return None
    try:
        objects = objects_of(name, control.identity)
        files = sorted(own.file for own in objects)
        size = sum(own.bytes for own in objects)
        workers = _workers(name, control)
        living = control.writer_alive()
        state = "alive" if living else "orphaned" if workers else "dead"
        engine = control.owner if living else control.writer
        return Ledger(name, state, control.current[0], size, age, status.st_uid, engine.pid, workers, files)
    finally:
        control.close()


def _workers(name: str, control: Control) -> list[int]:
    """Processes that follow the log as workers, have signals of their own, or a log of their own that belongs to it."""
    found = {reader.pid for reader in control.readers() if reader.worker and reader.alive}
    engines = name, pushes.log_name(name)
    for own in objects_of(name, control.identity):
        with contextlib.suppress(LedgerError):
            if own.name.endswith(_SIGNALS):
                signals = Signals(f"/{own.name}", read_only=True, identity=own.identity)
                if may_live(signals):
                    found.add(owner_of(signals).pid)
                signals.close()
            elif own.name.endswith(_CONTROL) and own.name.removesuffix(_CONTROL) not in engines:
                theirs = Control.open(own.name.removesuffix(_CONTROL))
                if theirs.writer_alive():
                    found.add(theirs.owner.pid)
                theirs.close()
    return sorted(found)


def _leftover(name: str, identity: int, objects: list[Own]) -> Ledger:
    """What is left of a ledger whose control segment is gone, or another one's now."""
    writer, epoch, state = 0, 0, "dead"
    for own in objects:
        place = own.name.removeprefix(f"{name}.").split(".")
        if len(place) == 2 and all(part.isdecimal() for part in place):
            with contextlib.suppress(LedgerError):
                mapped = segment.MappedSegment(name, int(place[0]), int(place[1]), identity)
                header = mapped.header
                mapped.close()
                writer, epoch = header.writer.pid, header.epoch
                state = _STATES[life_by_number(header.writer)]  # its lock went with its control segment
    files = [own.file for own in objects]
    status = [os.lstat(SHM / file) for file in files]
    age = max(time.time() - min(entry.st_mtime for entry in status), 0.0)
    size = sum(own.bytes for own in objects)
    return Ledger(name, state, epoch, size, age, os.geteuid(), writer, [], files)


def _size(files: list[str]) -> int:
    size = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            size += os.lstat(SHM / file).st_size
    return size
