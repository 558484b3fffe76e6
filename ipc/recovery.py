"""Where a dead writer's log ends, and reading it up to there.

The writer may have died anywhere: between two transactions, in the middle of a body, between two commit words, or after
the last of them but before the tail hint. What is whole and valid counts; the rest was never delivered to anybody and
is cut off. Nothing is ever written to a dead writer's segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

from crc32c import crc32c

from ipc.errors import LogCorrupt, Overrun
from ipc.ownership import segments_of
from ipc.record import CRC_OFFSET, LINE, LINE_BYTES, Position, Record
from ipc.segment import HEADER_BYTES, TAIL, MappedSegment, is_blank


class Slot(Enum):
    """What stands where the next record would begin."""

    ZERO = "all zero, or the end of the segment"
    EXPECTED = "the expected sequence, and a checksum that is wrong"
    OTHER = "another sequence"


class Decision(Enum):
    """What the end of a segment comes to."""

    CLEAN = "it ends with a whole transaction"
    UNFINISHED = "its last transaction is not complete: cut off after the one before"
    TORN = "a record was written, but not committed: cut off after the last whole transaction"
    TORN_BODY = "the body of a record was not written to its end: cut off after the last whole transaction"
    CORRUPT = "a damaged record is followed by intact ones, or was published: stop"
    UNUSABLE = "the header is damaged: only a snapshot from after this segment helps"


TABLE: dict[tuple[Slot, bool], Decision] = {
    # slot, inside a transaction?
    (Slot.ZERO, False): Decision.CLEAN,
    (Slot.ZERO, True): Decision.UNFINISHED,
    (Slot.EXPECTED, False): Decision.TORN,
    (Slot.EXPECTED, True): Decision.TORN,
    (Slot.OTHER, False): Decision.TORN_BODY,
    (Slot.OTHER, True): Decision.TORN_BODY,
}
"""The decision where the segment's header is sound and no intact record follows the end."""


class End(NamedTuple):
    """How a segment ends."""

    decision: Decision
    sequence: int
    """Of the first record that does not count."""
    offset: int
    """Of the byte after the last whole transaction."""
    bad: int
    """Where the record begins that is missing or damaged."""
    again: int
    """With ``CORRUPT``: where intact records go on; else 0."""


def examine(segment: MappedSegment) -> End:
    """Classify the end of a segment whose writer is dead."""
    data = segment.buffer
    at = Position(HEADER_BYTES, segment.header.crc_seed, segment.header.base_sequence)
    at.read(data, len(data), 1 << 64, 1)  # delivers nothing, and stops behind the last whole transaction
    return _classify(data, segment.words[TAIL], at)


def _classify(data: memoryview, hint: int, end: Position) -> End:
    """``end``: behind the last whole transaction."""
    bad, sequence, crc = end.offset, end.sequence, end.crc
    while (step := _intact(data, bad, sequence, crc)) is not None:
        bad, crc = step
        sequence += 1
    published = hint if HEADER_BYTES <= hint <= len(data) else 0
    line = bytes(data[bad : bad + LINE_BYTES])
    if not any(line):
        slot = Slot.ZERO
    else:
        slot = Slot.EXPECTED if int.from_bytes(line[:8], "little") == sequence else Slot.OTHER
    decision, again = TABLE[slot, bad != end.offset], 0
    if found := _intact_again(data, bad, sequence, crc, published):
        decision, again = Decision.CORRUPT, found
    elif end.offset < published:
        decision, again = Decision.CORRUPT, published
    return End(decision, end.sequence, end.offset, bad, again)


def _intact(data: memoryview, offset: int, sequence: int, seed: int) -> tuple[int, int] | None:
    """Offset and CRC after the record at ``offset``, if it is intact and has that sequence."""
    body = offset + LINE_BYTES
    if body > len(data) or int.from_bytes(data[offset : offset + 8], "little") != sequence:
        return None
    size = LINE.unpack_from(data, offset)[7]
    if body + size > len(data):
        return None
    crc = crc32c(data[body : body + size], crc32c(data[offset : offset + CRC_OFFSET], seed))
    committed = int.from_bytes(data[body - 4 : body], "little")
    return (body + (size + 63 & ~63), crc) if crc == committed else None


def _intact_again(data: memoryview, bad: int, sequence: int, seed: int, published: int) -> int:
    """Offset of an intact record after the damaged one at ``bad``; 0: there is none.

    A record proves itself by its CRC together with the one stored before it, or the one that the damaged record should
    have had. Behind the published part the payload of a record is passed over: it is a user's prompt, and could have
    been made to look like records.
    """
    offset = bad
    while offset + LINE_BYTES <= len(data):
        if offset >= published and not any(data[offset:]):
            return 0
        number = int.from_bytes(data[offset : offset + 8], "little")
        step = LINE_BYTES
        if sequence <= number <= sequence + (offset - bad) // LINE_BYTES:
            size: int = LINE.unpack_from(data, offset)[7]
            after = offset + LINE_BYTES + (size + 63 & ~63)
            if after <= len(data):
                stored = int.from_bytes(data[offset + CRC_OFFSET : offset + LINE_BYTES], "little")
                seeds = [stored]
                if offset == bad:
                    body = offset + LINE_BYTES
                    seeds.append(crc32c(data[body : body + size], crc32c(data[offset : offset + CRC_OFFSET], seed)))
                if any(_intact(data, after, number + 1, each) for each in seeds):
                    return after
                if offset >= published:
                    step = after - offset
        offset += step
    return 0


class Recovered(NamedTuple):
    """What is left of a dead writer's log."""

    last_sequence: int
    """Of the last record that counts."""
    end: End
    """How the last segment ends."""
    capacity: int
    """Bytes of the last segment."""


def recover(ledger: str, from_sequence: int, deliver: Callable[[list[Record]], None]) -> Recovered:
    """Hand on all records from ``from_sequence`` to the end, across segments and epochs; the writer is dead.

    Raises:
        Overrun: the log does not reach back so far.
        LogCorrupt: a damaged record or segment is followed by intact ones, or was published.
    """
    mapped = list(_segments(ledger))
    try:
        return _recover(ledger, from_sequence, deliver, mapped)
    finally:
        for segment in mapped:
            if isinstance(segment, MappedSegment):
                segment.close()


def _segments(ledger: str) -> Iterator[MappedSegment | LogCorrupt]:
    """The log segments, oldest first; for one with a damaged header the error. Blank ones were never used."""
    for epoch, index in segments_of(ledger):
        if not is_blank(ledger, epoch, index):
            try:
                yield MappedSegment(ledger, epoch, index)
            except LogCorrupt as error:
                yield error


def _recover(
    ledger: str,
    from_sequence: int,
    deliver: Callable[[list[Record]], None],
    mapped: list[MappedSegment | LogCorrupt],
) -> Recovered:
    first = -1
    oldest = 0
    for number, segment in enumerate(mapped):
        if isinstance(segment, MappedSegment):
            oldest = oldest or segment.header.base_sequence
            if segment.header.base_sequence <= from_sequence:
                first = number
    if first < 0:
        damaged = mapped[0] if mapped and isinstance(mapped[0], LogCorrupt) else None
        if oldest and damaged is None:
            raise Overrun(ledger, from_sequence, oldest)
        raise damaged or LogCorrupt(f"/{ledger}", 0, "the ledger has no log segment: its writer died while creating it")
    expected = 0
    for number in range(first, len(mapped)):
        segment = mapped[number]
        if isinstance(segment, LogCorrupt):
            raise LogCorrupt(
                segment.segment, 0, "its header is damaged, and there is no snapshot from after it: remove the ledger"
            )
        name, base = segment.name, segment.header.base_sequence
        if expected and base != expected:
            raise LogCorrupt(name, 0, f"it begins with event {base}, the segment before ends before event {expected}")
        end = examine(segment)
        if end.decision is Decision.CORRUPT:
            raise LogCorrupt(
                name, end.bad, f"event {end.sequence} or one after it is damaged, the log goes on at byte {end.again}"
            )
        at = Position(HEADER_BYTES, segment.header.crc_seed, base)
        while at.offset < end.offset:
            records, _ = at.read(segment.buffer, end.offset, from_sequence, 10_000)
            deliver(records)
        expected = end.sequence
        recovered = Recovered(expected - 1, end, segment.header.capacity)
    if expected < from_sequence:
        raise LogCorrupt(name, end.offset, f"event {expected} is the next one, a snapshot is from {from_sequence - 1}")
    return recovered
