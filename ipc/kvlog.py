"""``.kvlog`` files: a log as one self-contained file, compressed, read through the same interface as the live one.

::

    file header, 64 B   magic | version u32, 0 u32 | schema hash u64 | first sequence u64 | header crc u32
                        | version of kvledger that wrote it 24 B | its crc u32
    chunks              kind u32, raw bytes u32 | stored bytes u32, crc chain before u32 | first sequence u64
                        | crc of the stored bytes u32, header crc u32 | one zstd frame

A chunk holds whole transactions exactly as they stand in a segment, their CRC chain going on from chunk to chunk. A
file that does not begin with the first event of its ledger opens with a chunk that holds a snapshot of the state. One
that was closed ends with the header of a chunk of no bytes, the *end mark*; where it is missing, the file was cut
between two chunks, or its writer still writes or was killed. (Version 2 had no end mark.)
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import zstandard
from crc32c import crc32c

from ipc.errors import LedgerError, LogCorrupt
from ipc.record import LINE, TXN_END, Position, Record, record_bytes

_MAGIC = b"KVLOG\x00\x02\n"
_HEADER = struct.Struct("<8sIIQQ")
_HEADER_BYTES = 64
_PROGRAM_BYTES = _HEADER_BYTES - _HEADER.size - 8
_VERSION = 3
_ENDS_WITH_A_MARK = 3
"""Files of this version and later ones."""
_CHUNK = struct.Struct("<IIIIQI")
_CHUNK_BYTES = _CHUNK.size + 4
_RECORDS, _SNAPSHOT, _END = 1, 2, 3
_CHUNK_RAW_BYTES = 256 << 10
_PIECE_BYTES = 1 << 20
"""So much is searched at a time for a chunk that is intact."""
_LARGEST_RATIO = 256
_LARGE_BYTES = 96 << 20
"""A frame that claims to unpack to more than both of these (times its size, and bytes) is not one of ours."""


def _program() -> str:
    """The version of kvledger that runs."""
    try:
        return version("kvledger")
    except PackageNotFoundError:
        return ""


class Place(NamedTuple):
    """A chunk boundary of a file: reading can begin there."""

    offset: int
    sequence: int
    crc: int


class _Head(NamedTuple):
    """What the intact header of a chunk says."""

    kind: int
    raw_bytes: int
    stored_bytes: int
    chain: int
    sequence: int
    crc: int
    body: int
    """Where its frame begins."""

    @property
    def end(self) -> int:
        """Where the next chunk begins."""
        return self.body + self.stored_bytes


class _Chunk(NamedTuple):
    """A chunk of a file whose own bytes are intact."""

    kind: int
    sequence: int
    chain: int
    """The CRC chain before it."""
    raw: bytes
    end: int
    """Where the next one begins."""


class KvlogWriter:
    """Writes records to a new file, mode 0600 (they contain users' prompts).

    Args:
        base_sequence: of the first record that will be written.
        snapshot: the state before that record, for a file that does not begin at the beginning.

    Raises:
        LedgerError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path, *, schema_hash: int, base_sequence: int = 1, snapshot: bytes = b"") -> None:
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
            os.fchmod(self._file.fileno(), 0o600)  # whatever the umask is
        except FileExistsError:
            raise LedgerError(f"{path} exists: remove it, or choose another name") from None
        except OSError as error:
            raise LedgerError(f"cannot write {path}: {error.strerror}") from error
        self.path = path
        self.base_sequence = base_sequence
        self.next_sequence = base_sequence
        self.ended = True
        """Whether what is written will be all when it is closed: only then the end mark follows."""
        self._crc = 0
        self._compressor = zstandard.ZstdCompressor(level=3)
        header = _HEADER.pack(_MAGIC, _VERSION, 0, schema_hash, base_sequence)
        program = _program().encode()[:_PROGRAM_BYTES].ljust(_PROGRAM_BYTES, b"\0")
        for part in (header, program):
            self._file.write(part + crc32c(part).to_bytes(4, "little"))
        if snapshot:
            self._chunk(_SNAPSHOT, snapshot, 0)

    def write(self, records: Sequence[Record]) -> None:
        """Append whole transactions, as a reader delivered them, and hand them to the operating system."""
        ended, self.ended = self.ended, False
        lines: list[bytes] = []
        size = 0
        seed = self._crc
        for record in records:
            payload = record.payload
            line = LINE.pack(
                record.sequence,
                record.time_ns,
                record.kind,
                record.flags,
                0,
                record.step,
                record.subject,
                len(payload),
                record.args,
            )
            self._crc = crc32c(payload, crc32c(line, self._crc))
            body = line + self._crc.to_bytes(4, "little") + payload
            lines.append(body.ljust(record_bytes(len(payload)), b"\0"))
            size += len(lines[-1])
            if size >= _CHUNK_RAW_BYTES and record.flags & TXN_END:
                self._chunk(_RECORDS, b"".join(lines), seed)
                self.next_sequence = record.sequence + 1
                lines, size, seed = [], 0, self._crc
        if lines:
            self._chunk(_RECORDS, b"".join(lines), seed)
            self.next_sequence = records[-1].sequence + 1
        self._file.flush()
        self.ended = ended

    def _chunk(self, kind: int, raw: bytes, seed: int) -> None:
        stored = self._compressor.compress(raw) if raw else b""
        header = _CHUNK.pack(kind, len(raw), len(stored), seed, self.next_sequence, crc32c(stored))
        self._file.write(header + crc32c(header).to_bytes(4, "little") + stored)

    @property
    def size(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            if self.ended:
                self._chunk(_END, b"", self._crc)
                self.ended = False
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class KvlogReader:
    """Reads a ``.kvlog`` file, up to the first transaction that is damaged or cut off; see :attr:`damage`.

    What is intact behind that can be read after :meth:`resume`; the events in between are missing.

    Raises:
        LedgerError: the file cannot be read.
        LogCorrupt: it is no ``.kvlog`` file of this version.
    """

    def __init__(self, path: Path, *, from_sequence: int = 1) -> None:
        self.path = path
        self.damage: LogCorrupt | None = None
        """Why reading ended early, once it has."""
        self._told = False
        """Whether somebody was given no records because of it."""
        self._goes_on: Place | None = None
        """The next intact chunk behind it."""
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is not waited for
        except OSError as error:
            raise LedgerError(f"cannot read {path}: {error.strerror}") from error
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise LedgerError(f"cannot read {path}: not a file")
        self._size = status.st_size
        self._unpacker = zstandard.ZstdDecompressor()
        head = self._read(0, _HEADER_BYTES)
        header = head[: _HEADER.size]
        crc = int.from_bytes(head[_HEADER.size : _HEADER.size + 4], "little")
        if len(head) < _HEADER_BYTES or header[:8] != _MAGIC or crc32c(header) != crc:
            self.close()
            raise LogCorrupt(str(path), 0, "not a .kvlog file of this version, or its header is damaged")
        self.schema_hash: int
        self.base_sequence: int
        _, number, _, self.schema_hash, self.base_sequence = _HEADER.unpack(header)
        program = head[_HEADER.size + 4 :]
        intact = crc32c(program[:-4]) == int.from_bytes(program[-4:], "little")
        self.program = program[:-4].rstrip(b"\0").decode(errors="replace") if intact else ""
        """Version of kvledger that wrote the file; empty if it does not say."""
        self.ended = number < _ENDS_WITH_A_MARK or self._leave_out_the_mark()
        """False: the end mark is missing; the file was cut, or its writer still writes or was killed."""
        self.place = Place(_HEADER_BYTES, self.base_sequence, 0)
        """Where the next chunk begins."""
        self.snapshot = b""
        """The state before the first record, in a file that does not begin with the first event of its ledger."""
        self.cursor = max(from_sequence, self.base_sequence)
        """Sequence of the next record."""
        self.unpacked = 0
        """Bytes of all the chunks that were read so far, as they were before they were compressed."""
        if self.base_sequence > 1:
            chunk = self._read_chunk()
            if chunk is None or chunk[0] != _SNAPSHOT:
                self.close()
                raise LogCorrupt(str(path), _HEADER_BYTES, "the snapshot that this file begins with is damaged")
            self.snapshot = chunk[1]

    def _leave_out_the_mark(self) -> bool:
        """Whether the file ends with an end mark, which is then not read as a chunk."""
        mark = self._read(self._size - _CHUNK_BYTES, _CHUNK_BYTES)
        header = mark[:-4]
        if len(mark) < _CHUNK_BYTES or crc32c(header) != int.from_bytes(mark[-4:], "little"):
            return False
        if _CHUNK.unpack(header)[0] != _END:
            return False
        self._size -= _CHUNK_BYTES
        return True

    def go_to(self, place: Place) -> None:
        """Continue reading at a chunk boundary that :attr:`place` has named before."""
        self.place = place
        self.cursor = place.sequence
        self.damage = None
        self._told = False

    def resume(self) -> bool:
        """Go on behind what ended the reading; ``False``: nothing intact is there."""
        if self.damage is None or self._goes_on is None:
            return False
        self.go_to(self._goes_on)
        return True

    def unpack(self, start: int, stop: int) -> bytes:
        """What the chunks between two offsets hold, unpacked, as one piece. :attr:`place` stays where it is.

        Raises:
            LogCorrupt: a chunk is damaged, or none begins there.
        """
        parts = []
        while start < stop:
            chunk = self._chunk_at(start)
            if chunk is None:
                raise LogCorrupt(str(self.path), start, "damaged since it was read the last time")
            start, raw = chunk.end, chunk.raw
            parts.append(raw)
        return b"".join(parts)

    def poll(self, limit: int = 1 << 20) -> list[Record]:
        """The next records, about ``limit`` at most (whole chunks, of 256 KiB or so); none at the end.

        Raises:
            LogCorrupt: this was called again after :attr:`damage` had ended the reading. Who needs more than there is
                does not wait for it for ever.
        """
        if self.damage is not None and self._told:
            raise self.damage
        found: list[Record] = []
        while self.damage is None and self.place.offset < self._size and len(found) < limit:
            at = self.place
            chunk = self._read_chunk()
            if chunk is None or chunk[0] != _RECORDS:
                self._end_here(at.offset)
                break
            position = Position(0, at.crc, at.sequence)
            records, damaged = position.read(memoryview(chunk[1]), len(chunk[1]), self.cursor, len(chunk[1]))
            found += records
            self.cursor = max(self.cursor, position.sequence)
            self.place = Place(self.place.offset, position.sequence, position.crc)
            if damaged is not None or position.offset != len(chunk[1]):
                self._end_here(at.offset)
        self._told = self.damage is not None and not found
        return found

    def seek_damage(self) -> LogCorrupt | None:
        """Read on to the end of the file, whatever is in it; what ended the reading early, if anything did."""
        self.cursor = 1 << 63  # nobody wants the records
        while self.damage is None and self.place.offset < self._size:
            self.poll(1)
        return self.damage

    def _read_chunk(self) -> tuple[int, bytes] | None:
        """Kind and content of the chunk at :attr:`place`, which then names the next one; ``None``: damaged."""
        offset, sequence, chain = self.place
        chunk = self._chunk_at(offset)
        if chunk is None or (chunk.sequence, chunk.chain) != (sequence, chain):
            return None
        self.place = Place(chunk.end, sequence, chain)
        self.unpacked += len(chunk.raw)
        return chunk.kind, chunk.raw

    def _head_at(self, offset: int) -> _Head | None:
        """The header of the chunk that begins there; ``None``: it is damaged, or none begins there."""
        head = self._read(offset, _CHUNK_BYTES)
        header = head[:-4]
        if len(head) != _CHUNK_BYTES or crc32c(header) != int.from_bytes(head[-4:], "little"):
            return None
        return _Head._make((*_CHUNK.unpack(header), offset + _CHUNK_BYTES))

    def _chunk_at(self, offset: int) -> _Chunk | None:
        """The chunk that begins there; ``None``: it is damaged."""
        head = self._head_at(offset)
        if head is None or head.raw_bytes > max(_LARGE_BYTES, _LARGEST_RATIO * head.stored_bytes):
            return None
        stored = self._read(head.body, head.stored_bytes)
        if len(stored) != head.stored_bytes or crc32c(stored) != head.crc:
            return None
        try:
            if zstandard.frame_content_size(stored) != head.raw_bytes:
                return None
            return _Chunk(head.kind, head.sequence, head.chain, self._unpacker.decompress(stored), head.end)
        except zstandard.ZstdError:
            return None

    def _next_intact(self, offset: int) -> Place | None:
        """The first intact chunk of later events, from a damaged one on. Reads each byte of the file once or twice."""
        while offset < self._size:
            head = self._head_at(offset)
            if head is None:
                found = self._find_head(offset + 1)
                if found is None:
                    return None
                offset = found
            elif head.kind == _RECORDS and head.sequence > self.place.sequence and self._chunk_at(offset) is not None:
                return Place(offset, head.sequence, head.chain)
            else:  # the header proves itself: the next chunk begins behind all of this one
                offset = head.end
        return None

    def _find_head(self, offset: int) -> int | None:
        """Where the next intact header stands: right before the magic of its frame."""
        while offset < self._size:
            piece = self._read(offset, _PIECE_BYTES + _CHUNK_BYTES + len(zstandard.FRAME_HEADER))
            at = piece.find(zstandard.FRAME_HEADER, _CHUNK_BYTES)
            while at >= 0:
                if self._head_at(offset + at - _CHUNK_BYTES) is not None:
                    return offset + at - _CHUNK_BYTES
                at = piece.find(zstandard.FRAME_HEADER, at + 1)
            offset += _PIECE_BYTES
        return None

    def _read(self, offset: int, count: int) -> bytes:
        """Bytes of the file, fewer at its end. Not mapped: what was read would count as this process's memory."""
        if not 0 <= offset < self._size:
            return b""
        try:
            return os.pread(self._file, min(count, self._size - offset), offset)
        except OSError as error:
            raise LedgerError(f"cannot read {self.path}: {error}") from error

    def _end_here(self, offset: int) -> None:
        first = self.place.sequence
        self._goes_on = self._next_intact(offset)
        if self._goes_on is None:
            lost = f"nothing after event {first - 1} can be read ({self._size - offset:,} bytes)"
        else:
            stop, then = self._goes_on.offset, self._goes_on.sequence
            lost = (
                f"events {first} to {then - 1} cannot be read ({stop - offset:,} bytes), it goes on with event {then}"
            )
        self.damage = LogCorrupt(str(self.path), offset, f"cut off or damaged here: {lost}")

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
