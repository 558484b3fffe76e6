"""The one writer of a log.

A transaction is ``stage``d and then ``publish``ed. Staging makes room (or refuses) and writes the bodies, which nobody
reads yet; publishing is each record's CRC (its commit word), then a fence, then the tail hint. A reader that sees the
hint move checks the CRC chain anyway. What is staged and never published is overwritten by the next transaction.

The next segment is prepared ahead of time by a thread (reserving 16 MiB takes 4 to 8 ms and does not hold the
interpreter lock), and old ones are put away by it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import posix_ipc
from crc32c import crc32c

from ipc import memory, segment, snapshots
from ipc.background import Background, Task
from ipc.control import MASK, PARKED, Control
from ipc.errors import LedgerError, SharedMemoryFull, TransactionTooLarge
from ipc.fence import make_fence
from ipc.names import bell_name, control_name, segment_name
from ipc.ownership import remove_object, remove_objects, segments_of
from ipc.record import CALL_BEGIN, CRC_OFFSET, LINE, LINE_BYTES, TXN_BEGIN, TXN_END
from ipc.segment import HEADER_BYTES, NEXT, TAIL, Header

LEAST_SEGMENT_BYTES = 64 << 10
"""Smallest segment: a transaction takes a quarter of one at most, and the first event has to fit."""
_RESERVED = 16
"""This part of a segment (one sixteenth) is kept while there is no room for the next one."""
_UNCOMMITTED: Final = bytes(LINE_BYTES - CRC_OFFSET)
"""In the place of a commit word, until the record is published."""
_log = logging.getLogger(__name__)

_ONE_CALL: Final[frozenset[int]] = frozenset()
Encoded = tuple[int, int, bytes, bytes, bytes]
"""``(kind, subject, args, head, tail)``: the payload is head + tail, in two parts so that a large one is not copied."""


class LogWriter:
    """Appends transactions to a ledger's log. One thread of one process."""

    def __init__(
        self,
        control: Control,
        *,
        config_hash: int,
        segment_bytes: int,
        retain_bytes: int | None,
        epoch: int,
        base_sequence: int,
        kept: list[tuple[int, int, int, int]] | None = None,
    ) -> None:
        if segment_bytes < LEAST_SEGMENT_BYTES or segment_bytes % 4096:
            raise LedgerError(
                f"segment_bytes must be a multiple of 4096 from {LEAST_SEGMENT_BYTES}, not {segment_bytes}"
            )
        self.ledger = control.ledger
        self.max_transaction_bytes = (segment_bytes - HEADER_BYTES) // 4
        """The largest transaction, headers of its records included."""
        self.next_sequence = base_sequence
        """Sequence number of the next record."""
        self._control = control
        self._segment_bytes = segment_bytes
        self._retain_bytes = retain_bytes
        self._retain_ns = 0
        self._next_look_ns = 0
        self._config_hash = config_hash
        self._epoch = epoch
        self._index = 0
        self._crc = 0
        self._kept = kept or []
        """``(epoch, index, base sequence, begun at)`` of all segments. One thread appends, the other removes."""
        self.on_rotation: Callable[[], None] | None = None
        """Called in the writer's own thread after each rotation. If there is one, a segment must also be older than the
        newest snapshot (:mod:`ipc.snapshots`) before it goes; seeing to snapshots is the callee's job."""
        self.on_published: Callable[[], None] | None = None
        """Called in the thread that appends, after each transaction that everybody can see."""
        self.refused_segments = 0
        """How often in a row the next segment could not be had; 0: it is ready, or being prepared."""
        self._release, self._acquire = make_fence()
        self._staged: tuple[list[tuple[int, int]], int, int, int, int] = [], HEADER_BYTES, 0, base_sequence, 0
        self._hold: Callable[[], int] | None = None
        self._needed_from = self._kept[0][2] if self._kept else base_sequence
        """What :meth:`hold` said at the last rotation; it only grows. Nothing that a dead writer left goes before that:
        it is not known yet who needs it."""
        self._bells: dict[int, posix_ipc.Semaphore] = {}
        self._listeners: list[tuple[int, int, int]] = []
        self._helper = Background("kvledger-segment")
        self._map, self._buffer, self._words, self._words32 = self._begin_segment(
            segment.create(self.ledger, epoch, 0, segment_bytes, control.identity)
        )
        control.begin_writing()
        self._offset = HEADER_BYTES
        self._limit = segment_bytes - segment_bytes // _RESERVED
        """Bytes of the segment up to which room is never asked for: the reserve begins behind them."""
        self._prepared = self._prepare()

    @classmethod
    def create(
        cls,
        ledger: str,
        *,
        schema_hash: int,
        config_hash: int = 0,
        segment_bytes: int = 16 << 20,
        retain_bytes: int | None = 256 << 20,
    ) -> LogWriter:
        """Create a log, with this process as its writer.

        Args:
            schema_hash: what the records mean; readers compare it.
            segment_bytes: size of a segment; a transaction may take a quarter of it.
            retain_bytes: sealed segments beyond this much go once every worker has read them; ``None`` keeps all.

        Raises:
            LedgerExists, SharedMemoryFull, InvalidName
        """
        control = Control.create(ledger, schema_hash)
        try:
            return cls(
                control,
                config_hash=config_hash,
                segment_bytes=segment_bytes,
                retain_bytes=retain_bytes,
                epoch=1,
                base_sequence=1,
            )
        except BaseException:
            remove_object(control_name(ledger), control.identity)
            control.close()
            raise

    @classmethod
    def resume(
        cls,
        control: Control,
        last_sequence: int,
        *,
        epoch: int,
        config_hash: int = 0,
        segment_bytes: int = 16 << 20,
        retain_bytes: int | None = 256 << 20,
    ) -> LogWriter:
        """Continue a dead writer's log after event ``last_sequence``, in a segment of a new epoch.

        Args:
            control: of the ledger, locked by this process. It is the writer's from now on.
            epoch: see :func:`next_epoch`.

        Raises:
            SharedMemoryFull: nothing has changed.
        """
        ledger = control.ledger
        kept = []
        for place in segments_of(ledger):
            if segment.is_blank(ledger, *place):  # prepared by the dead writer, and never used
                remove_object(segment_name(ledger, *place), control.identity)
                continue
            with contextlib.suppress(LedgerError):
                mapped = segment.MappedSegment(ledger, *place)
                kept.append((*place, mapped.header.base_sequence, mapped.header.created_ns))
                mapped.close()
        return cls(
            control,
            config_hash=config_hash,
            segment_bytes=segment_bytes,
            retain_bytes=retain_bytes,
            epoch=epoch,
            base_sequence=last_sequence + 1,
            kept=kept,
        )

    def reserve(self, size: int, *, giving_back: bool = False) -> None:
        """Make sure that the next transaction fits if its records, with their lines and padding, have ``size`` bytes.

        Raises:
            TransactionTooLarge, SharedMemoryFull: there is no room.
        """
        if self._offset + size > self._limit or size > self.max_transaction_bytes:
            self._make_room(size, giving_back)

    def stage(
        self,
        records: Sequence[Encoded],
        step: int = 0,
        *,
        giving_back: bool = False,
        calls: AbstractSet[int] = _ONE_CALL,
    ) -> None:
        """Write one transaction's ``(kind, subject, args, head, tail)`` records where nobody reads yet.

        While there is no room for the next segment, the end of this one is kept for transactions that give something
        back.

        Args:
            calls: indexes of the records with which the second and every further call begins.

        Raises:
            TransactionTooLarge, SharedMemoryFull: there is no room; nothing was written.
        """
        total = 0
        for record in records:
            total += LINE_BYTES + (len(record[3]) + len(record[4]) + 63 & ~63)
        if self._offset + total > self._limit or total > self.max_transaction_bytes:
            self._make_room(total, giving_back)
        buffer = self._buffer
        offset, crc, sequence = self._offset, self._crc, self.next_sequence
        now = time.time_ns()
        flags = TXN_BEGIN
        last = sequence + len(records) - 1
        commits = []
        mask = 0
        for kind, subject, args, head, tail in records:
            if sequence == last:
                flags |= TXN_END
            size = len(head)
            line = LINE.pack(sequence, now, kind, flags, 0, step, subject, size + len(tail), args)
            crc = crc32c(line + head, crc)  # a call costs more than joining, and so does a copy into shared memory
            buffer[offset : offset + LINE_BYTES + size] = line + _UNCOMMITTED + head
            offset += LINE_BYTES
            word = (offset >> 2) - 1
            offset += size
            if tail:
                crc = crc32c(tail, crc)
                buffer[offset : offset + len(tail)] = tail
                offset += len(tail)
            offset = offset + 63 & ~63
            commits.append((word, crc))
            sequence += 1
            flags = CALL_BEGIN if calls and len(commits) in calls else 0
            mask |= 1 << kind
        self._staged = commits, offset, crc, sequence, mask

    def publish(self) -> None:
        """Let everybody see what was staged."""
        commits, offset, crc, sequence, mask = self._staged
        words32 = self._words32
        for word, value in commits:
            words32[word] = value
        self._release()  # who sees the hint sees all that it covers, commit words included
        self._acquire()
        self._words[TAIL] = offset
        self._offset, self._crc, self.next_sequence = offset, crc, sequence
        if self._listeners:
            self._ring(mask)
        if self.on_published is not None:
            self.on_published()

    def append(self, records: Sequence[tuple[int, int, bytes, bytes]], step: int = 0) -> None:
        """Publish ``(kind, subject, args, payload)`` records as one transaction. Raises: see :meth:`stage`."""
        self.stage([(*record, b"") for record in records], step)
        self.publish()

    def _make_room(self, size: int, giving_back: bool) -> None:
        if size > self.max_transaction_bytes:
            raise TransactionTooLarge(
                f"a transaction of {size:,} bytes does not fit: ledger {self.ledger!r} takes up to "
                f"{self.max_transaction_bytes:,}; make segment_bytes larger"
            )
        fits = self._offset + size <= self._segment_bytes
        if fits and giving_back:
            return
        prepared = self._next_segment()
        if fits:
            self._limit = self._segment_bytes  # the next one is there: nothing has to be kept
        else:
            self._rotate(prepared)

    def listen(self) -> None:
        """Look for workers that want to be woken. To be called when workers came or went."""
        for bell in self._bells.values():  # a line's next reader has another doorbell
            bell.close()
        self._bells.clear()
        self._listeners = []
        for reader in self._control.readers():
            if reader.worker and reader.alive:
                base = Control.line(reader.line)
                self._listeners.append((reader.line, base + PARKED, base + MASK))

    def _ring(self, mask: int) -> None:
        # Between the hint and the parked words: the reader writes one and reads the other in the opposite order.
        self._release()
        self._acquire()
        words = self._control.words
        for line, parked, wanted in self._listeners:
            if words[parked] and words[wanted] & mask:
                words[parked] = 0
                bell = self._bells.get(line)
                if bell is None:
                    try:
                        bell = self._bells[line] = posix_ipc.Semaphore(bell_name(self.ledger, line))
                    except (posix_ipc.Error, OSError):
                        continue  # the worker left, or waits for its time-out
                bell.release()

    def hold(self, oldest: Callable[[], int]) -> None:
        """Keep everything from the sequence on that ``oldest`` returns, for workers that are yet to come."""
        self._hold = oldest

    def room(self) -> int:
        """Bytes that there are for this log, what it has included. Waits until the next segment is reserved."""
        has_next = self._prepared.exception() is None
        return self.log_bytes + self._segment_bytes * has_next + memory.free_bytes()

    def keep(self, retain_bytes: int) -> None:
        """Keep so much of the log from now on."""
        self._retain_bytes = retain_bytes

    def keep_for(self, seconds: float) -> None:
        """Keep no event for longer than this from now on, as far as nobody needs it: see :meth:`look_at_age`."""
        self._retain_ns = int(seconds * 1e9)

    def look_at_age(self) -> None:
        """Seal this segment after a quarter of the time of :meth:`keep_for`, and drop others after half of it.

        The rest is for those who still have to read it, and for the snapshot that has to cover it. Call it often.
        """
        if not self._retain_ns or (now := time.time_ns()) < self._next_look_ns:
            return
        self._next_look_ns = now + self._retain_ns // 8
        if self._offset > HEADER_BYTES and now - self._kept[-1][3] > self._retain_ns // 4:
            with contextlib.suppress(SharedMemoryFull):  # counted and logged where it is prepared; tried again
                self._rotate(self._next_segment())
                return
        self._helper.submit(self._drop_what_is_due)

    @property
    def segment_bytes(self) -> int:
        """Size of a segment."""
        return self._segment_bytes

    def _prepare(self) -> Task[mmap.mmap]:
        return self._helper.submit(self._reserve_segment, self._index + 1)

    def _reserve_segment(self, index: int) -> mmap.mmap:
        """The segment after the current one, in the writer's thread, one ahead of need.

        Where there is no room, segments that nobody needs go, even below the limit.
        """
        identity = self._control.identity
        try:
            map = segment.create(self.ledger, self._epoch, index, self._segment_bytes, identity)
        except SharedMemoryFull as error:
            if self._retain_bytes is not None:
                self._drop(0)
            try:
                map = segment.create(self.ledger, self._epoch, index, self._segment_bytes, identity)
            except SharedMemoryFull:
                self.refused_segments += 1
                if self.refused_segments == 1:
                    _log.warning("ledger %s has no room for its next segment: %s", self.ledger, error)
                    if self.on_rotation is not None:
                        self.on_rotation()
                raise
        self.refused_segments = 0
        return map

    def _begin_segment(self, map: mmap.mmap) -> tuple[mmap.mmap, memoryview[int], memoryview[int], memoryview[int]]:
        buffer, now = memoryview(map), time.time_ns()
        segment.write_header(
            buffer,
            Header(
                self._control.schema_hash,
                self._epoch,
                self._index,
                self.next_sequence,
                self._crc,
                self._segment_bytes,
                self._config_hash,
                now,
                self._control.owner,
            ),
        )
        self._kept.append((self._epoch, self._index, self.next_sequence, now))
        self._release()
        self._acquire()
        self._control.current = self._epoch, self._index
        return map, buffer, buffer.cast("Q"), buffer.cast("I")

    def _next_segment(self) -> mmap.mmap:
        try:
            return self._prepared.result()
        except Exception:
            self._prepared = self._prepare()  # room may have come back since, or whatever it was
        try:
            return self._prepared.result()
        except LedgerError:
            raise
        except Exception as error:
            raise LedgerError(f"ledger {self.ledger!r} cannot prepare its next segment: {error}") from error

    def _rotate(self, prepared: mmap.mmap) -> None:
        self._index += 1
        old = self._map, self._buffer, self._words, self._words32
        self._map, self._buffer, self._words, self._words32 = self._begin_segment(prepared)
        self._offset = HEADER_BYTES
        self._limit = self._segment_bytes - self._segment_bytes // _RESERVED
        self._release()
        self._acquire()
        old[2][NEXT] = self._index  # seals it; readers go on to the next one
        for view in old[:0:-1]:
            view.release()
        self._needed_from = self.next_sequence if self._hold is None else self._hold()
        self._prepared = self._prepare()
        self._helper.submit(self._tidy, old[0])

    def _tidy(self, map: mmap.mmap) -> None:
        """After a rotation, in the writer's thread: unmapping and removing take milliseconds the engine has not."""
        try:
            map.close()
            if self.on_rotation is not None:
                self.on_rotation()
            self._drop_what_is_due()
        except Exception:  # nobody asks what became of it
            _log.exception("ledger %s: what a sealed segment leaves was not put away", self.ledger)

    def _drop_what_is_due(self) -> None:
        if self._retain_bytes is not None or self._retain_ns:
            self._drop(1 << 63 if self._retain_bytes is None else self._retain_bytes)

    def _drop(self, limit: int) -> None:
        """Remove the oldest segments that nobody needs any more while there are too many bytes, or they are too old."""
        if not self._is_over(limit):
            return
        passed = self._needed_from
        for reader in self._control.readers():
            if reader.worker and reader.alive:
                passed = min(passed, reader.cursor)
        if self.on_rotation is not None:
            passed = min(passed, snapshots.newest_sequence(self.ledger) + 1)
        while self._is_over(limit) and self._kept[1][2] <= passed:
            epoch, index, *_ = self._kept.pop(0)
            remove_object(segment_name(self.ledger, epoch, index), self._control.identity)

    def _is_over(self, limit: int) -> bool:
        """Whether the oldest of several segments should go: there is too much, or half of its time is over."""
        return len(self._kept) > 1 and (
            self.log_bytes > limit or 0 < self._retain_ns < 2 * (time.time_ns() - self._kept[0][3])
        )

    @property
    def log_bytes(self) -> int:
        """Size of the segments that exist, without the one that is prepared."""
        return len(self._kept) * self._segment_bytes

    def backlogs(self) -> dict[str, int]:
        """By name of each living worker: how many bytes of sealed segments it has not read to their end."""
        kept = self._kept.copy()
        return {
            name: sum(base > cursor for _, _, base, _ in kept) * self._segment_bytes
            for name, cursor in self._control.worker_cursors().items()
        }

    @property
    def rotations(self) -> int:
        """How many segments have been sealed."""
        return self._index

    def disown(self) -> None:
        """This process is a fork of the writer: the lock is not its own."""
        self._control.disown()

    def close(self, *, unlink: bool = False) -> None:
        """Give up the ledger; with ``unlink`` remove everything that belongs to it."""
        self._helper.close()
        # asking for an exception, not raising it here, which would tie it to what is being handled, and its memory
        prepared = self._prepared.result() if self._prepared.exception() is None else None
        if prepared is not None and prepared is not self._map:  # the same: a rotation was interrupted
            prepared.close()
            if not unlink:
                remove_object(segment_name(self.ledger, self._epoch, self._index + 1), self._control.identity)
        for bell in self._bells.values():
            bell.close()
        for view in (self._words32, self._words, self._buffer):
            view.release()
        with contextlib.suppress(BufferError):  # a rotation was interrupted: views of both segments are about
            self._map.close()
        if unlink:
            remove_objects(self.ledger, self._control.identity)
        self._control.close()


def segment_bytes_for(transaction_bytes: int) -> int:
    """The smallest segment that takes such a transaction."""
    size = HEADER_BYTES + 4 * transaction_bytes
    return max(size + -size % 4096, LEAST_SEGMENT_BYTES)


def next_epoch(control: Control) -> int:
    """The epoch of a writer that takes the ledger over. One that died while it began counts too."""
    return max([control.current[0], *(epoch for epoch, _ in segments_of(control.ledger))]) + 1
