"""One log segment: a 4,096-byte header, then records, append-only.

::

    magic u64 | version u16, header size u16, alignment u32 | schema hash u64 | epoch u64 | segment index u64
    base sequence u64 | crc seed u32, capacity u32 | config hash u64 | created ns u64 | writer pid u32, 0 u32
    writer start time u64 | writer's namespace u64 | header crc u32
    at 256: tail hint u64          at 320: next index u64 (0: this segment is still written)
"""

from __future__ import annotations

import mmap
import struct
from typing import Final, NamedTuple

from crc32c import crc32c

from ipc import memory
from ipc.errors import LedgerNotFound, LogCorrupt
from ipc.names import segment_name
from ipc.ownership import segments_of
from ipc.processes import Identity

HEADER_BYTES: Final = 4096
MAGIC = int.from_bytes(b"kvledger", "little")
VERSION = 2
TAIL: Final = 256 // 8
"""Index, in 64-bit words, of the tail hint: the writer's offset after its last transaction."""
NEXT: Final = 320 // 8
_HEADER = struct.Struct("<QHHIQQQQIIQQIIQQ")


class Header(NamedTuple):
    """What a segment says about itself."""

    schema_hash: int
    epoch: int
    number: int
    base_sequence: int
    crc_seed: int
    capacity: int
    config_hash: int
    created_ns: int
    writer: Identity


def write_header(buffer: memoryview, header: Header) -> None:
    """Make a prepared (zeroed) segment a log segment."""
    data = _HEADER.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        64,
        header.schema_hash,
        header.epoch,
        header.number,
        header.base_sequence,
        header.crc_seed,
        header.capacity,
        header.config_hash,
        header.created_ns,
        header.writer.pid,
        0,
        header.writer.started,
        header.writer.namespace,
    )
    buffer[: len(data)] = data
    words = buffer.cast("Q")
    words[TAIL] = HEADER_BYTES
    words[_HEADER.size // 8] = crc32c(data)


def read_header(buffer: memoryview, name: str) -> Header:
    """The header.

    Raises:
        LogCorrupt: it is not one, or of another version.
    """
    if len(buffer) < HEADER_BYTES:
        raise LogCorrupt(name, 0, "too short for a log segment")
    data = bytes(buffer[: _HEADER.size])
    crc = int.from_bytes(buffer[_HEADER.size : _HEADER.size + 4], "little")
    fields = _HEADER.unpack(data)
    if fields[0] != MAGIC or crc32c(data) != crc:
        raise LogCorrupt(name, 0, "this is not a log segment, or its header is damaged")
    if fields[1] != VERSION:
        raise LogCorrupt(name, 0, f"log format {fields[1]}, this program reads {VERSION}")
    return Header._make((*fields[4:12], Identity(fields[12], *fields[14:])))


class MappedSegment:
    """A segment as a reader sees it."""

    def __init__(self, ledger: str, epoch: int, index: int, identity: int | None = None) -> None:
        self.name = segment_name(ledger, epoch, index)
        self._map = memory.attach(self.name, write=False, identity=identity)
        self.buffer = memoryview(self._map)
        try:
            if len(self.buffer) < HEADER_BYTES or len(self.buffer) % 8:
                raise LogCorrupt(self.name, 0, "too short for a log segment")
            self.header = read_header(self.buffer, self.name)
        except LogCorrupt:
            self.close()
            raise
        self.words = self.buffer.cast("Q")

    def close(self) -> None:
        """Unmap it."""
        for view in (getattr(self, "words", None), self.buffer):
            if view is not None:
                view.release()
        self._map.close()


def create(ledger: str, epoch: int, index: int, size: int, identity: int | None = None) -> mmap.mmap:
    """Reserve a segment; it has no header yet. ``identity``: see :func:`ipc.memory.create`.

    Raises:
        ipc.SharedMemoryFull
    """
    map = memory.create(segment_name(ledger, epoch, index), size, identity=identity)
    memory.populate(map)
    return map


def is_blank(ledger: str, epoch: int, index: int) -> bool:
    """Whether no record was ever written into a segment: it was prepared and never used, or it is gone.

    Its writer may have died while it wrote the header, which comes before everything else in it.
    """
    try:
        map = memory.attach(segment_name(ledger, epoch, index), write=False)
    except LedgerNotFound:
        return True
    try:
        if len(map) < HEADER_BYTES:
            return True
        data, crc = map[: _HEADER.size], int.from_bytes(map[_HEADER.size : _HEADER.size + 4], "little")
        return crc32c(data) != crc and not any(map[HEADER_BYTES:])
    finally:
        map.close()


def locate(ledger: str, segments: list[tuple[int, int]], sequence: int) -> tuple[MappedSegment | None, int]:
    """The segment that holds ``sequence`` (the last that starts at or before it), and the oldest sequence there is."""
    oldest = 0
    found: MappedSegment | None = None
    for epoch, index in segments:
        try:
            segment = MappedSegment(ledger, epoch, index)
        except (LogCorrupt, LedgerNotFound):
            continue  # being prepared, or dropped since we looked
        oldest = oldest or segment.header.base_sequence
        if segment.header.base_sequence <= sequence:
            if found is not None:
                found.close()
            found = segment
        else:
            segment.close()
    return found, oldest


def damaged_beginning(ledger: str, current: tuple[int, int]) -> LogCorrupt | None:
    """Why the oldest segment cannot be read, where its header is damaged.

    Args:
        current: the segment that the control segment names; one after it is only being prepared.
    """
    for place in segments_of(ledger):
        try:
            MappedSegment(ledger, *place).close()
        except LedgerNotFound:
            continue  # dropped since we looked
        except LogCorrupt as error:
            return error if place <= current and not is_blank(ledger, *place) else None
        return None
    return None


def next_segment(ledger: str, header: Header, current: tuple[int, int]) -> MappedSegment | None:
    """The segment in use that comes after one, of the same or a later epoch. ``current``: as the control segment says.

    Raises:
        LogCorrupt: its header is damaged.
    """
    for place in segments_of(ledger):
        if place > (header.epoch, header.number):
            try:
                return MappedSegment(ledger, *place)
            except LedgerNotFound:
                continue  # gone
            except LogCorrupt:
                if place <= current and not is_blank(ledger, *place):
                    raise
    return None
