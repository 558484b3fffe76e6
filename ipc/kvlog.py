"""``.kvlog`` files: a log as one self-contained file, read through the same interface as the live one.

A 64-byte header, then the records exactly as in a segment, their CRC chain starting from the header's seed.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from crc32c import crc32c

from ipc.errors import LedgerError, LogCorrupt
from ipc.record import LINE, Position, Record, record_bytes

_MAGIC = b"KVLOG\x00\x01\n"
_HEADER = struct.Struct("<8sQQI")
_HEADER_BYTES = 64


class KvlogWriter:
    """Writes records to a new file, mode 0600 (they contain users' prompts).

    Raises:
        LedgerError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path, *, schema_hash: int, base_sequence: int = 1) -> None:
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        except OSError as error:
            raise LedgerError(f"cannot record to {path}: {error.strerror}") from error
        self._crc = 0
        header = _HEADER.pack(_MAGIC, schema_hash, base_sequence, 0)
        self._file.write((header + crc32c(header).to_bytes(4, "little")).ljust(_HEADER_BYTES, b"\0"))

    def write(self, records: Iterable[Record]) -> None:
        """Append records, as a reader delivered them."""
        for record in records:
            line = LINE.pack(
                record.sequence,
                record.time_ns,
                record.kind,
                record.flags,
                0,
                record.step,
                record.subject,
                len(record.payload),
                record.args,
            )
            self._crc = crc32c(record.payload, crc32c(line, self._crc))
            body = line + self._crc.to_bytes(4, "little") + record.payload
            self._file.write(body.ljust(record_bytes(len(record.payload)), b"\0"))

    def close(self) -> None:
        """Flush to the disk and close."""
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
    """Reads a ``.kvlog`` file. A damaged or cut file is read up to its last whole transaction; see :attr:`damage`.

    Raises:
        LedgerError: the file cannot be read.
        LogCorrupt: it is no ``.kvlog`` file.
    """

    def __init__(self, path: Path, *, from_sequence: int = 1) -> None:
        self.path = path
        self.damage: LogCorrupt | None = None
        """Why reading ended early, once it has."""
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise LedgerError(f"cannot read {path}: {error}") from error
        self._buffer = memoryview(self._map)
        header = bytes(self._buffer[: _HEADER.size])
        crc = int.from_bytes(self._buffer[_HEADER.size : _HEADER.size + 4], "little")
        if len(self._buffer) < _HEADER_BYTES or header[:8] != _MAGIC or crc32c(header) != crc:
            self.close()
            raise LogCorrupt(str(path), 0, "not a .kvlog file, or its header is damaged")
        _, self.schema_hash, base, seed = _HEADER.unpack(header)
        self._at = Position(_HEADER_BYTES, seed, base)
        self.cursor = max(from_sequence, base)
        """Sequence of the next record."""

    def poll(self, limit: int = 1 << 20) -> list[Record]:
        """The next records, in whole transactions, about ``limit`` at most; none at the end."""
        if self.damage is not None:
            return []
        at, end = self._at, len(self._buffer)
        records, damaged = at.read(self._buffer, end, self.cursor, limit)
        if damaged is None and not records and at.offset < end:
            damaged = end
        if damaged is not None:
            reason = f"cut off or damaged here; everything up to record {at.sequence - 1} was read"
            self.damage = LogCorrupt(str(self.path), damaged, reason)
        self.cursor = max(self.cursor, at.sequence)
        return records

    def close(self) -> None:
        """Close the file."""
        self._buffer.release()
        self._map.close()
