"""What is in ``/dev/shm``: the ledgers of this machine, alive or left by a crash, and removing the dead ones.

A ledger is known by the magic of its control segment, a piece that lost its control segment by its own magic and name.
Anything else belongs to somebody else and is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ipc import Control, InvalidName, LedgerError, LogCorrupt, NotPrivate, WriterAlive, segment, snapshots
from ipc.names import SHM, check_name, objects_of, remove_objects, segments_of, unlink
from ipc.processes import Life, life_by_number
from ipc.signals import Signals
from workers.handoff import pushes
from workers.pools import memory as pool_memory
from workers.processes.presence import may_live, owner_of

_CONTROL, _SIGNALS = ".control", ".signals"
_PIECE = re.compile(r"(.+)\.(\d+\.\d+|pool\.(?:device|host)\.\d+|snapshot\.\d+)")
_MAGICS = (
    segment.MAGIC.to_bytes(8, "little"),
    snapshots.MAGIC.to_bytes(8, "little"),
    pool_memory.MAGIC,
)


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
    names = sorted(name.removesuffix(_CONTROL) for name in os.listdir(SHM) if name.endswith(_CONTROL))
    found: dict[str, Ledger] = {}
    for name in sorted(names, key=len):
        if any(name.startswith(f"{owner}.") for owner in found):
            continue  # the log of one of its workers
        with contextlib.suppress(InvalidName, FileNotFoundError):
            check_name(name)
            ledger = _look(name)
            if ledger is not None:
                found[name] = ledger
    for name, pieces in _pieces(found):
        with contextlib.suppress(FileNotFoundError):  # somebody is just removing it
            found[name] = _leftover(name, pieces)
    return sorted(found.values())


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
        remove_objects(ledger.name)
    except WriterAlive:
        return False
    finally:
        control.close()
    return True


def _look(name: str) -> Ledger | None:
    """A ledger by its control segment; ``None``: the object is not one."""
    path = SHM / f"{name}{_CONTROL}"
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return None
    objects = objects_of(name)
    size, age = _size(objects), max(time.time() - status.st_mtime, 0.0)
    magic = _magic(path)
    if magic is None:
        if not segments_of(name):
            return None
        return Ledger(name, "other user", 0, size, age, status.st_uid, 0, [], objects)
    if magic != _MAGICS[0]:
        return None
    try:
        control = Control.open(name)
    except LogCorrupt:  # of another version of kvledger
        return None
    except NotPrivate:
        return Ledger(name, "other user", 0, size, age, status.st_uid, 0, [], objects)
    try:
        workers = _workers(name, control)
        living = control.writer_alive()
        state = "alive" if living else "orphaned" if workers else "dead"
        engine = control.owner if living else control.writer
        return Ledger(name, state, control.current[0], size, age, status.st_uid, engine.pid, workers, objects)
    finally:
        control.close()


def _workers(name: str, control: Control) -> list[int]:
    """Processes that follow the log as workers, have signals of their own, or a log of their own that belongs to it."""
    found = {reader.pid for reader in control.readers() if reader.worker and reader.alive}
    engines = name, pushes.log_name(name)
    for entry in objects_of(name):
        with contextlib.suppress(LedgerError):
            if entry.endswith(_SIGNALS):
                signals = Signals(f"/{entry}", read_only=True)
                if may_live(signals):
                    found.add(owner_of(signals).pid)
                signals.close()
            elif entry.endswith(_CONTROL) and entry.removesuffix(_CONTROL) not in engines:
                theirs = Control.open(entry.removesuffix(_CONTROL))
                if theirs.writer_alive():
                    found.add(theirs.owner.pid)
                theirs.close()
    return sorted(found)


def _pieces(known: dict[str, Ledger]) -> Iterator[tuple[str, list[str]]]:
    """What has our names and our magic, and no control segment, by ledger."""
    taken = {name for ledger in known.values() for name in ledger.objects}
    groups: dict[str, list[str]] = {}
    for entry in sorted(os.listdir(SHM)):
        match = _PIECE.fullmatch(entry)
        if match and entry not in taken and _magic(SHM / entry) in _MAGICS:
            groups.setdefault(match[1], []).append(entry)
    yield from groups.items()


def _leftover(name: str, objects: list[str]) -> Ledger:
    status = [os.lstat(SHM / entry) for entry in objects]
    writer, epoch, state = 0, 0, "dead"
    for place in segments_of(name):
        with contextlib.suppress(LedgerError):
            mapped = segment.MappedSegment(name, *place)
            header = mapped.header
            mapped.close()
            writer, epoch = header.writer.pid, header.epoch
            state = _STATES[life_by_number(header.writer)]  # its lock went with its control segment
    age = max(time.time() - min(entry.st_mtime for entry in status), 0.0)
    return Ledger(name, state, epoch, _size(objects), age, status[0].st_uid, writer, [], objects)


def _size(objects: list[str]) -> int:
    size = 0
    for name in objects:
        with contextlib.suppress(FileNotFoundError):
            size += os.lstat(SHM / name).st_size
    return size


def _magic(path: Path) -> bytes | None:
    """The first eight bytes; ``None``: they may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:
        return None
    except OSError:
        return b""
    try:
        return os.read(fd, 8) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
