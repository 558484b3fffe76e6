"""The control segment of a ledger: who writes, which segment is current, and 128 reader lines.

::

    magic u64 | version u64 | schema hash u64 | writer pid u64 | writer start time u64
    at 192: current epoch << 32 | index, u64
    at 4096, 128 lines of 64 B: pid u64 | start time u64 | cursor u64 | parked u64 | kind mask u64 | worker u64
                                | name 16 B

The writer holds ``flock`` on it as long as it lives; the kernel gives that up at SIGKILL. Each line has one writer, its
reader; lines are handed out under a POSIX record lock.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from typing import Final, NamedTuple

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
from ipc.memory import open_new, open_private
from ipc.names import SHM, check_name, control_name, unlink
from ipc.processes import alive, own_identity
from ipc.segment import MAGIC, VERSION

READERS = 128
_TEARDOWN_S = 5.0
_LINES = 4096
_BYTES = _LINES + READERS * 64
_BEING_CREATED = "ledger {!r} is only being created, or its creator died before it was done"
_SCHEMA, _PID, _START = 2, 3, 4
CURRENT: Final = 192 // 8
"""Word of the current segment."""
PID, START, CURSOR, PARKED, MASK, WORKER, NAME = range(7)
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

    def __init__(self, ledger: str, fd: int) -> None:
        self.ledger = ledger
        self._fd = fd
        self._map = mmap.mmap(fd, _BYTES)
        self._buffer = memoryview(self._map)
        self.words = self._buffer.cast("Q")
        self._release, self._acquire = make_fence()
        self._writes = False

    @classmethod
    def create(cls, ledger: str, schema_hash: int) -> Control:
        """Create it, with this process as the writer.

        Raises:
            LedgerExists: with who writes it, or what to do about a dead one.
        """
        try:
            memory = open_new(control_name(check_name(ledger)))
        except LedgerExists:
            raise LedgerExists(_who_is_there(ledger)) from None
        try:
            os.posix_fallocate(memory.fd, 0, _BYTES)
            control = cls(ledger, memory.fd)
        except BaseException as error:
            unlink(control_name(ledger))
            os.close(memory.fd)
            if isinstance(error, OSError):
                raise SharedMemoryFull(f"no room for {control_name(ledger)}: {error.strerror}") from error
            raise
        words = control.words
        words[1], words[_SCHEMA] = VERSION, schema_hash
        control.lock()
        control._fence()  # who sees the first word sees the others
        words[0] = MAGIC
        return control

    @classmethod
    def open(cls, ledger: str) -> Control:
        """Map the control segment of a ledger.

        Raises:
            LedgerNotFound, LogCorrupt, NotPrivate
        """
        try:
            memory = open_private(control_name(check_name(ledger)), write=True)
        except LedgerNotFound:
            raise LedgerNotFound(f"there is no ledger {ledger!r} on this machine") from None
        if not memory.size:
            os.close(memory.fd)
            raise LedgerNotFound(_BEING_CREATED.format(ledger))
        if memory.size < _BYTES:
            os.close(memory.fd)
            raise LogCorrupt(control_name(ledger), 0, "too short for a control segment")
        try:
            control = cls(ledger, memory.fd)
        except OSError as error:
            os.close(memory.fd)
            raise SharedMemoryFull(f"{control_name(ledger)} cannot be mapped: {error.strerror}") from error
        if not control.words[0]:
            control.close()
            raise LedgerNotFound(_BEING_CREATED.format(ledger))
        control._fence()
        if control.words[0] != MAGIC or control.words[1] != VERSION:
            control.close()
            raise LogCorrupt(control_name(ledger), 0, "not a control segment of this version of kvledger")
        return control

    def lock(self) -> None:
        """Become the only writer, until this process ends.

        Raises:
            WriterAlive: naming the process.
        """
        deadline = time.monotonic() + _TEARDOWN_S
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # A writer that was killed while it started a process leaves the lock to the child, until that execs.
                if self.writer_alive():
                    raise WriterAlive(_who_is_there(self.ledger)) from None
                if time.monotonic() > deadline:
                    raise WriterAlive(
                        f"ledger {self.ledger!r}: its writer, process {self.writer[0]}, is dead, but a child of it "
                        "still holds the lock: end that child"
                    ) from None
            time.sleep(0.001)
        # The start time first: who sees one without the other takes the writer for dead, not for alive.
        pid, self.words[_START] = own_identity()
        self.words[_PID] = pid
        self._writes = True

    def _fence(self) -> None:
        self._release()
        self._acquire()

    @property
    def schema_hash(self) -> int:
        """Of the events in this log."""
        return self.words[_SCHEMA]

    @property
    def writer(self) -> tuple[int, int]:
        """``(pid, start time)`` of the last writer."""
        return self.words[_PID], self.words[_START]

    def writer_alive(self) -> bool:
        """Whether the writer runs."""
        return alive(*self.writer)

    def exists(self) -> bool:
        """Whether this segment is still the one of that name: the ledger was neither removed nor created anew."""
        try:
            return os.path.samestat(os.stat(SHM / control_name(self.ledger)[1:]), os.fstat(self._fd))
        except FileNotFoundError:
            return False

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
            TooManyReaders
        """
        fcntl.lockf(self._fd, fcntl.LOCK_EX, READERS * 64, _LINES)
        try:
            for line in range(READERS):
                base = self.line(line)
                if not alive(self.words[base + PID], self.words[base + START]):
                    self.words[base + PARKED] = 0
                    self.words[base + CURSOR] = cursor
                    self.words[base + MASK] = mask
                    self.words[base + WORKER] = worker
                    offset = (base + NAME) * 8
                    self._buffer[offset : offset + 16] = name.encode()[:16].ljust(16, b"\0")
                    pid, started = own_identity()
                    self.words[base + START] = started
                    self.words[base + PID] = pid
                    return line
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, READERS * 64, _LINES)
        raise TooManyReaders(f"ledger {self.ledger!r} has {READERS} readers: stop one first")

    def give_back(self, line: int) -> None:
        """Free a reader line."""
        self.words[self.line(line) + PID] = 0

    @staticmethod
    def line(number: int) -> int:
        """Index of the first word of a reader line."""
        return _LINES // 8 + number * 8

    def readers(self) -> list[ReaderLine]:
        """All registered readers, dead ones too."""
        found = []
        for number in range(READERS):
            base = self.line(number)
            pid = self.words[base + PID]
            if pid:
                offset = (base + NAME) * 8
                name = bytes(self._buffer[offset : offset + 16]).rstrip(b"\0").decode(errors="replace")
                living = alive(pid, self.words[base + START])
                found.append(
                    ReaderLine(number, pid, name, self.words[base + CURSOR], bool(self.words[base + WORKER]), living)
                )
        return found

    def disown(self) -> None:
        """This process is a fork of the writer: the lock ends with the writer, not with this process."""
        self._writes = False
        self.close()  # the mapping, too: it has a descriptor of its own

    def close(self) -> None:
        """Unmap it; a writer gives up its lock, and is one no longer although its process lives."""
        if self._writes:
            self.words[_PID] = 0
            self._writes = False
        self.words.release()
        self._buffer.release()
        self._map.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:  # twice: the number may be another file's by now
            os.close(fd)


def _who_is_there(ledger: str) -> str:
    try:
        control = Control.open(ledger)
    except (LedgerNotFound, LogCorrupt, NotPrivate):
        return f"/dev/shm has a {ledger}.control that is no ledger of this version and this user: choose another name"
    try:
        pid, started = control.writer
        if alive(pid, started):
            return f"ledger {ledger!r} is written by process {pid}: end that first, or choose another name"
        left = f"is left of process {pid}, which is dead" if pid else "was closed and kept"
        return (
            f"ledger {ledger!r} {left}: open it, choose another name, or remove it with kvledger segments --remove-dead"
        )
    finally:
        control.close()
