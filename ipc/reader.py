"""A reader of a log: its own cursor, no lock, no way to slow or corrupt the writer."""

from __future__ import annotations

import contextlib
import os
import time

import posix_ipc

from ipc.control import CURRENT, CURSOR, PARKED, Control
from ipc.errors import LedgerError, LedgerNotFound, LogCorrupt, Overrun
from ipc.fence import make_fence
from ipc.names import SHM, bell_name
from ipc.ownership import segments_of
from ipc.record import Position, Record
from ipc.segment import HEADER_BYTES, NEXT, TAIL, MappedSegment, damaged_beginning, locate, next_segment

SPINS = 200
_NAP_S = 0.002
_LOOK_EVERY_S = 0.1
"""A record that is begun and not published: so often is looked whether its writer still lives."""


def _new_bell(name: str) -> posix_ipc.Semaphore | None:
    """A reader's doorbell, mode 0600 whatever the umask is; one of that name belonged to a dead reader.

    ``None``: the name is another user's. Nobody will wake this reader, which then looks for itself.
    """
    file = SHM / f"sem.{name[1:]}"
    try:
        with contextlib.suppress(FileNotFoundError, posix_ipc.ExistentialError):
            if os.lstat(file).st_uid != os.geteuid():
                return None
            posix_ipc.unlink_semaphore(name)
        bell = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
    except (posix_ipc.PermissionsError, posix_ipc.ExistentialError):
        return None
    except (posix_ipc.Error, OSError) as error:
        raise LedgerError(f"the doorbell {name} cannot be made: {error}") from error
    os.chmod(file, 0o600)
    return bell


class LogReader:
    """Reads whole transactions, in order, from ``from_sequence`` on.

    Args:
        ledger: name of the ledger.
        from_sequence: the first record to deliver; it must still be there.
        name: shown to whoever lists the readers.
        worker: the writer keeps the log until a worker has read it, and wakes it for the kinds of ``kind_mask``
            (bit ``k`` for kind ``k``). Other readers are nobody's business and may be overrun.

    Raises:
        LedgerNotFound, Overrun, TooManyReaders
        LogCorrupt: the segment where the record would be has a damaged header.
    """

    def __init__(
        self, ledger: str, *, from_sequence: int = 1, name: str = "", worker: bool = False, kind_mask: int = 0
    ) -> None:
        self.ledger = ledger
        self.cursor = from_sequence
        """Sequence of the next record."""
        self._release, self._acquire = make_fence()
        self._control = Control.open(ledger)
        self._current = self._control.words
        self._epoch = self._size = 0
        """Of the segment that is being read."""
        self._line: int | None = None
        self._bell: posix_ipc.Semaphore | None = None
        self._segment: MappedSegment | None = None
        self._at = Position(HEADER_BYTES, 0, 0)
        self._next_look = 0.0
        try:
            if worker:
                self._line = self._control.claim(name, mask=kind_mask, worker=True, cursor=from_sequence)
                self._bell = _new_bell(bell_name(ledger, self._line))
            self._seek(from_sequence)
        except BaseException:
            self.close()
            raise

    def _seek(self, sequence: int) -> None:
        current = self._announced()
        segment, oldest = locate(self.ledger, segments_of(self.ledger), sequence)
        if segment is None:
            if (damage := damaged_beginning(self.ledger, current)) is not None:
                raise damage
            if oldest:
                raise Overrun(self.ledger, sequence, oldest)
            if current[0]:  # says why it cannot be read
                MappedSegment(self.ledger, *current, self._control.identity).close()
            raise LedgerNotFound(f"ledger {self.ledger!r} has no log segment")
        self._enter(segment)  # what stands before the sequence in it is read, checked and left out by the first poll
        self.cursor = sequence

    def _announced(self) -> tuple[int, int]:
        """The current segment, whose header is seen by whoever looks at it after this."""
        current = self._control.current
        self._release()
        self._acquire()
        return current

    def _enter(self, segment: MappedSegment) -> None:
        if self._segment is not None:
            self._segment.close()
        self._segment = segment
        self._epoch = segment.header.epoch
        self._size = len(segment.buffer)
        self._at = Position(HEADER_BYTES, segment.header.crc_seed, segment.header.base_sequence)

    def poll(self, limit: int = 1 << 20) -> list[Record]:
        """The records published since, in whole transactions, about ``limit`` at most.

        Raises:
            Overrun: the reader was too slow, what it wants is gone.
            LogCorrupt: published records fail their checksum.
        """
        segment = self._segment
        assert segment is not None
        tail = segment.words[TAIL]
        if tail <= self._at.offset:  # less: what a dead writer had written beyond its hint was read
            following = segment.words[NEXT]
            if not following:
                # The usual case first: the same epoch goes on, and nothing stands where the next record will.
                offset = self._at.offset
                if self._current[CURRENT] >> 32 == self._epoch:
                    if offset < self._size and not segment.words[offset >> 3]:
                        return []
                return self._at_the_end(segment, limit)
            self._release()
            self._acquire()
            tail = segment.words[TAIL]
            if tail == self._at.offset:
                self._enter_next(segment, following)
                return self.poll(limit)
        self._release()
        self._acquire()
        return self._read(segment, tail, limit)

    def _read(self, segment: MappedSegment, tail: int, limit: int) -> list[Record]:
        at = self._at
        records, damaged = at.read(segment.buffer, tail, self.cursor, limit)
        if damaged is not None and not records:
            raise LogCorrupt(segment.name, damaged, f"a record after {at.sequence - 1} is damaged")
        self._advance()
        return records

    def _at_the_end(self, segment: MappedSegment, limit: int) -> list[Record]:
        """Nothing more was published here; but the writer may have died, and another one may go on elsewhere."""
        if self._control.current[0] != segment.header.epoch:
            return self._cross(segment, limit)
        offset = self._at.offset
        if offset < len(segment.buffer) and segment.words[offset >> 3] == self._at.sequence:
            # Nearly always the writer is just about to publish: asking the kernel each time would cost 10 µs a record.
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + _LOOK_EVERY_S
                if not self._control.writer_alive():
                    return self._read_to_the_cut(segment, limit)
        return []

    def _read_to_the_cut(self, segment: MappedSegment, limit: int) -> list[Record]:
        """Whole transactions beyond the hint: their writer died before it could move it. They count."""
        self._release()  # that it is dead, or succeeded, was read before what it wrote
        self._acquire()
        records, _ = self._at.read(segment.buffer, len(segment.buffer), self.cursor, limit)
        self._advance()
        return records

    def _cross(self, segment: MappedSegment, limit: int) -> list[Record]:
        """Go on to the segment that a later writer began, after what counts of this one."""
        following = next_segment(self.ledger, segment.header, self._announced())
        if following is None:
            return []
        base = following.header.base_sequence
        records: list[Record] = []
        if self._at.sequence < base:
            records = self._read_to_the_cut(segment, limit)
        reached = self._at.sequence
        if reached == base:
            self._enter(following)
            return records or self.poll(limit)
        following.close()
        if records:  # there are more
            return records
        if reached < base:
            raise Overrun(self.ledger, reached, base)
        raise LogCorrupt(segment.name, self._at.offset, f"event {reached} follows, the next writer began at {base}")

    def _advance(self) -> None:
        self.cursor = max(self.cursor, self._at.sequence)
        if self._line is not None:
            self._control.words[Control.line(self._line) + CURSOR] = self.cursor

    def _enter_next(self, segment: MappedSegment, index: int) -> None:
        if index <= segment.header.number:
            raise LogCorrupt(segment.name, 8 * NEXT, f"segment {index} cannot follow segment {segment.header.number}")
        try:
            self._enter(MappedSegment(self.ledger, segment.header.epoch, index))
        except LedgerNotFound:
            _, oldest = locate(self.ledger, segments_of(self.ledger), 0)
            raise Overrun(self.ledger, self._at.sequence, oldest) from None

    def wait(self, timeout: float) -> list[Record]:
        """Records as soon as there are some, or none after ``timeout`` seconds.

        A worker spins a little and then sleeps until the writer wakes it; other readers sleep 2 ms at a time.
        """
        for _ in range(SPINS):
            if records := self.poll():
                return records
        if self._line is not None and self._bell is not None:
            parked = Control.line(self._line) + PARKED
            self._control.words[parked] = 1
            self._release()
            self._acquire()
            records = self.poll()
            if not records:
                with contextlib.suppress(posix_ipc.BusyError, posix_ipc.SignalError):
                    self._bell.acquire(timeout)
                records = self.poll()
            self._control.words[parked] = 0
            return records
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            time.sleep(min(_NAP_S, timeout))
            if records := self.poll():
                return records
        return []

    @property
    def identity(self) -> int:
        """Random number of the ledger (:mod:`ipc.ownership`)."""
        return self._control.identity

    @property
    def schema_hash(self) -> int:
        """What the records mean."""
        return self._control.schema_hash

    def writer_alive(self) -> bool:
        """Whether the process that writes this log runs."""
        return self._control.writer_alive()

    def exists(self) -> bool:
        """Whether the ledger is still there under its name."""
        return self._control.exists()

    @property
    def segment_bytes(self) -> int:
        """Size of the segment that is being read."""
        assert self._segment is not None
        return self._segment.header.capacity

    def close(self) -> None:
        """Stop reading; the reader's line and doorbell go."""
        if self._line is not None:
            self._control.give_back(self._line)
            self._line = None
        if self._bell is not None:
            with contextlib.suppress(posix_ipc.ExistentialError):
                self._bell.unlink()
            self._bell.close()
            self._bell = None
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._control.close()
