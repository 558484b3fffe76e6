"""One record of the log: a 64-byte line, then its payload padded to 64 bytes.

::

    sequence u64 | time ns u64 | kind u16 | flags u8 | 0 u8 | step u32
    subject u64 | payload bytes u32 | args 24 B | crc32c u32

The CRC covers the line without its own four bytes, then the payload, and starts from the CRC of the record before:
a record proves all that came before it in its segment. It is the last word written, so it is the commit word.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from crc32c import crc32c

LINE_BYTES: Final = 64
CRC_OFFSET: Final = 60
LINE = struct.Struct("<QQHBBIQI24s")
_COMMITTED_LINE = struct.Struct("<QQHBBIQI24sI")
TXN_BEGIN: Final = 1
TXN_END: Final = 2
CALL_BEGIN: Final = 4
"""On the first record of every further call where one transaction holds the records of several calls."""


class Record(NamedTuple):
    """A record as a reader gets it. ``args`` has 24 bytes; what they and the payload mean is the codec's business."""

    sequence: int
    time_ns: int
    kind: int
    flags: int
    step: int
    subject: int
    args: bytes
    payload: bytes


def record_bytes(payload_bytes: int) -> int:
    """Room that a record with such a payload takes in the log."""
    return LINE_BYTES + (payload_bytes + 63 & ~63)


class Position:
    """Where the next record of a log starts: ``offset`` in the data, the CRC before it, its sequence number."""

    def __init__(self, offset: int, crc: int, sequence: int) -> None:
        self.offset = offset
        self.crc = crc
        self.sequence = sequence

    def read(self, data: memoryview, stop: int, wanted: int, limit: int) -> tuple[list[Record], int | None]:
        """Whole transactions up to the byte ``stop``, about ``limit`` records; those before ``wanted`` are left out.

        Moves behind the last one. Returns the records, and the offset of a damaged or missing one, if there is one.
        """
        offset, crc, expected = self.offset, self.crc, self.sequence
        records: list[Record] = []
        complete = 0
        unpack, new, end = _COMMITTED_LINE.unpack_from, tuple.__new__, len(data)
        while offset < stop:
            body = offset + LINE_BYTES
            if body > end:
                break
            sequence, time_ns, kind, flags, _, step, subject, size, args, committed = unpack(data, offset)
            after = body + size
            if after > end or sequence != expected:
                break
            crc = crc32c(data[offset : body - 4], crc)
            payload = b""
            if size:
                payload = bytes(data[body:after])
                crc = crc32c(payload, crc)
            if crc != committed:
                break
            offset = body + (size + 63 & ~63)
            expected += 1
            if sequence >= wanted:
                records.append(new(Record, (sequence, time_ns, kind, flags, step, subject, args, payload)))
            if flags & TXN_END:
                complete = len(records)
                self.offset, self.crc, self.sequence = offset, crc, expected
                if complete >= limit:
                    break
        del records[complete:]
        intact = offset >= stop or complete >= limit  # left by the condition or by the limit, not by a bad record
        return records, None if intact else offset
