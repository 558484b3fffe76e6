"""The control segment of a ledger: who writes, which segment is current, and 128 reader lines.

::

    magic u64 | version u64 | schema hash u64
    writer pid u64 | start time u64 | namespace u64     who wrote the log last
    owner pid u64 | start time u64 | namespace u64      who took the lock last: the writer, or somebody about to be it
    at 192: current epoch << 32 | index, u64
    at 4096, 128 lines of 64 B: pid u64 | namespace u64 | cursor u64 | parked u64 | kind mask u64 | worker u64
                                | name 16 B

The owner holds a lock on the first 4,096 bytes as long as it lives, each reader one on its line (:mod:`ipc.liveness`);
the kernel gives them up when their process ends, however it ends. Each line has one writer, its reader. The segment
appears under its name when it is complete and locked.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import Final, NamedTuple

from ipc import memory
from ipc.errors import (
    LedgerExists,
    LedgerNotFound,
    LogCorrupt,
    NotPrivate,
    SharedMemoryFull,
    TooManyReaders,
    WriterAlive,
)
from ipc.fence import make_fence
from ipc.liveness import Lock, life_of
from ipc.names import check_log_name, control_name, ledger_of
from ipc.ownership import STAMP_BYTES, find, identity_of, new_identity, read_stamp
from ipc.processes import Identity, Life, life_by_number, own_identity
from ipc.segment import MAGIC, VERSION

READERS = 128
_TEARDOWN_S = 5.0
"""A child of a dead process, forked and not yet another program, holds its lock no longer than this."""
_TEARDOWN_ELSEWHERE_S = 0.5
"""As long as that is waited for where it cannot be told whether the owner is dead."""
_LINES = 4096
_LINE_BYTES = 64
_BYTES = _LINES + READERS * _LINE_BYTES
_SCHEMA, _WRITER, _OWNER = 2, 3, 6
CURRENT: Final = 192 // 8
"""Word of the current segment."""
PID, NAMESPACE, CURSOR, PARKED, MASK, WORKER, NAME = range(7)
"""Words of a reader line."""


class ReaderLine(NamedTuple):
    """One registered reader."""

    line: int
    pid: int
    name: str
    cursor: int
    """Sequence of the next record it wants."""
    worker: bool
    alive: bool


class Control:
    """A mapped control segment."""

    def __init__(self, ledger: str, fd: int, map: mmap.mmap, identity: int) -> None:
        """``fd``: of the object; the caller closes it. ``map``: of it; it belongs to this from now on."""
        self.ledger = ledger
        self.identity = identity
        """Random number of the ledger; what is stamped with it is its own (:mod:`ipc.ownership`)."""
        self._map = map
        try:
            self._lock = Lock.beside(fd)
        except BaseException:
            self._map.close()
            raise
        self._buffer = memoryview(self._map)
        self.words = self._buffer.cast("Q")
        self._release, self._acquire = make_fence()
        self._locked = self._writes = False
        self._own_lines: set[int] = set()

    @classmethod
    def create(cls, ledger: str, schema_hash: int) -> Control:
        """Create it, with this process as the writer. It appears when it is complete.

        Raises:
            LedgerExists: with who writes it, or what to do about a dead one.
            LedgerNotFound: the log belongs to a ledger that is not there.
            SharedMemoryFull, TooManyFiles
        """
        owner = ledger_of(check_log_name(ledger))
        identity = identity_of(owner) if owner != ledger else new_identity()
        if not identity:
            raise LedgerNotFound(f"there is no ledger {owner!r} that a log {ledger!r} could belong to")
        begun = memory.Begun(control_name(ledger), _BYTES, identity)
        try:
            control = cls(ledger, begun.fd, begun.map, identity)
            try:
                control.words[0], control.words[1], control.words[_SCHEMA] = MAGIC, VERSION, schema_hash
                control.lock()
                control.begin_writing()
                begun.publish()
            except BaseException:
                control.close()
                raise
        except LedgerExists:
            raise LedgerExists(_who_is_there(ledger)) from None
        finally:
            begun.close()
        return control

    @classmethod
    def open(cls, ledger: str) -> Control:
        """Map the control segment of a ledger.

        Raises:
            LedgerNotFound, LogCorrupt, NotPrivate
        """
        name = control_name(check_log_name(ledger))
        is_ledger = ledger_of(ledger) == ledger
        try:
            if is_ledger:
                shared = memory.open_private(name, write=True)
                size = shared.size - STAMP_BYTES
            else:
                shared, size = memory.open_own(name, write=True)
        except NotPrivate:
            raise
        except LedgerNotFound:
            raise LedgerNotFound(f"there is no ledger {ledger!r} on this machine") from None
        try:
            identity = read_stamp(shared.fd, size + STAMP_BYTES, name)
            if size != _BYTES or identity is None:
                raise LogCorrupt(name, 0, "not a control segment of this version of kvledger, or it is damaged")
            control = cls(ledger, shared.fd, mmap.mmap(shared.fd, size), identity)
        except OSError as error:
            raise SharedMemoryFull(f"{name} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(shared.fd)
        if control.words[0] != MAGIC or control.words[1] != VERSION:
            control.close()
            raise LogCorrupt(name, 0, "not a control segment of this version of kvledger")
        return control

    def lock(self) -> None:
        """Keep everybody else from writing, until this is closed or the process ends.

        What is said of the last writer stays as it is until :meth:`begin_writing`.

        Raises:
            WriterAlive: naming the process.
            NoLocks
        """
        begun = time.monotonic()
        while not self._lock.take(0, _LINES):
            # An owner that was killed while it started a process leaves the lock to the child, until that execs.
            life, waited = life_by_number(self.owner), time.monotonic() - begun
            if life is Life.ALIVE or (life is Life.UNKNOWN and waited > _TEARDOWN_ELSEWHERE_S):
                raise WriterAlive(_who_is_there(self.ledger)) from None
            if waited > _TEARDOWN_S:
                raise WriterAlive(
                    f"ledger {self.ledger!r}: its writer, process {self.owner.pid}, is dead, but a child of it "
                    "still holds the lock: end that child"
                ) from None
            time.sleep(0.001)
        self._locked = True
        self._name(_OWNER, own_identity())

    def begin_writing(self) -> None:
        """This process, which has the lock, is the writer from now on."""
        self._name(_WRITER, self.owner)
        self._writes = True

    def _name(self, word: int, process: Identity) -> None:
        # The id last: who sees it without the rest takes the process for dead, not for another one that lives.
        self.words[word + 1], self.words[word + 2] = process.started, process.namespace
        self._fence()
        self.words[word] = process.pid

    def _fence(self) -> None:
        self._release()
        self._acquire()

    @property
    def schema_hash(self) -> int:
        """Of the events in this log."""
        return self.words[_SCHEMA]

    @property
    def writer(self) -> Identity:
        """The process that wrote last; its id is 0 if it closed the ledger and kept it."""
        return Identity(*self.words[_WRITER : _WRITER + 3])

    @property
    def owner(self) -> Identity:
        """The process that took the lock last."""
        return Identity(*self.words[_OWNER : _OWNER + 3])

    def writer_alive(self) -> bool:
        """Whether somebody writes, or is about to: false only where that process is proven dead."""
        if self._locked:
            return True
        return life_of(self._lock.is_taken(0, _LINES), self.owner) is not Life.DEAD

    def exists(self) -> bool:
        """Whether this segment is still the one of that name: the ledger was neither removed nor created anew."""
        return find(control_name(self.ledger), self.identity) is not None

    @property
    def current(self) -> tuple[int, int]:
        """``(epoch, index)`` of the segment that is being written."""
        word = self.words[CURRENT]
        return word >> 32, word & 0xFFFFFFFF

    @current.setter
    def current(self, segment: tuple[int, int]) -> None:
        self.words[CURRENT] = segment[0] << 32 | segment[1]

    def claim(self, name: str, *, mask: int, worker: bool, cursor: int) -> int:
        """Take a reader line; lines of dead processes are taken over. Returns its number.

        Raises:
            TooManyReaders, NoLocks
        """
        words = self.words
        for line in range(READERS):
            if line not in self._own_lines and self._lock.take(_LINES + line * _LINE_BYTES, _LINE_BYTES):
                self._own_lines.add(line)
                base = self.line(line)
                words[base + PID] = 0  # nobody's, until all of it is said
                self._fence()
                words[base + PARKED] = 0
                words[base + CURSOR] = cursor
                words[base + MASK] = mask
                words[base + WORKER] = worker
                offset = (base + NAME) * 8
                self._buffer[offset : offset + 16] = name.encode()[:16].ljust(16, b"\0")
                process = own_identity()
                words[base + NAMESPACE] = process.namespace
                self._fence()
                words[base + PID] = process.pid
                return line
        raise TooManyReaders(f"ledger {self.ledger!r} has {READERS} readers: stop one first")

    def give_back(self, line: int) -> None:
        """Free a reader line."""
        self.words[self.line(line) + PID] = 0
        self._own_lines.discard(line)
        self._lock.give_back(_LINES + line * _LINE_BYTES, _LINE_BYTES)

    @staticmethod
    def line(number: int) -> int:
        """Index of the first word of a reader line."""
        return _LINES // 8 + number * 8

    def worker_cursors(self) -> dict[str, int]:
        """By name of each living worker: the sequence of the next record it wants.

        By name and not by process id, which is a number of the worker's own namespace. Of several of one name, such as
        a worker that is ending and its successor, the one that is further counts.
        """
        found: dict[str, int] = {}
        for reader in self.readers():
            if reader.worker and reader.alive:
                found[reader.name] = max(reader.cursor, found.get(reader.name, 0))
        return found

    def readers(self) -> list[ReaderLine]:
        """All registered readers, dead ones too."""
        found = []
        for number in range(READERS):
            base = self.line(number)
            pid = self.words[base + PID]
            if pid:
                offset = (base + NAME) * 8
                name = bytes(self._buffer[offset : offset + 16]).rstrip(b"\0").decode(errors="replace")
                living = number in self._own_lines or self._lock.is_taken(_LINES + number * _LINE_BYTES, _LINE_BYTES)
                found.append(
                    ReaderLine(number, pid, name, self.words[base + CURSOR], bool(self.words[base + WORKER]), living)
                )
        return found

    def disown(self) -> None:
        """This process is a fork of the writer: the lock is its parent's, see :mod:`ipc.liveness`."""
        self._locked = self._writes = False
        self.close()

    def close(self) -> None:
        """Unmap it; a writer gives up its lock, and is one no longer although its process lives."""
        if self._writes:
            self.words[_WRITER] = 0
        self._locked = self._writes = False
        self.words.release()
        self._buffer.release()
        self._map.close()
        self._lock.close()


def _who_is_there(ledger: str) -> str:
    try:
        control = Control.open(ledger)
    except (LedgerNotFound, LogCorrupt, NotPrivate):
        return f"/dev/shm has a {ledger}.control that is no ledger of this version and this user: choose another name"
    try:
        if control.writer_alive():
            return f"ledger {ledger!r} is written by {_named(control.owner)}: end that first, or choose another name"
        pid = control.writer.pid
        left = f"is left of {_named(control.writer)}, which is dead" if pid else "was closed and kept"
        return (
            f"ledger {ledger!r} {left}: open it, choose another name, or remove it with kvledger segments --remove-dead"
        )
    finally:
        control.close()


def _named(process: Identity) -> str:
    here = process.namespace == own_identity().namespace
    return f"process {process.pid}" if here else f"process {process.pid} of another container"
