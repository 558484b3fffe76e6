"""Snapshots: what a ledger's state was after an event, as objects of their own in shared memory.

``/<ledger>.snapshot.<sequence>`` holds ``magic u64 | sequence u64 | bytes u64 | crc32c u32, header crc u32``, then the
bytes. A follower writes them (the engine never does); they appear under their name only when they are complete, so a
writer that dies half-way leaves nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from crc32c import crc32c

from ipc import memory, ownership
from ipc.errors import LedgerExists, LedgerNotFound, LogCorrupt
from ipc.names import check_name
from ipc.ownership import identity_of, stamped

MAGIC = int.from_bytes(b"kvlsnap1", "little")
_HEADER = struct.Struct("<QQQI")
_HEADER_BYTES = _HEADER.size + 4


def snapshot_name(ledger: str, sequence: int) -> str:
    """Name of the snapshot of the state after event ``sequence``."""
    return f"/{ledger}.snapshot.{sequence}"


def sequences(ledger: str) -> list[int]:
    """The events after which there is a snapshot, ascending."""
    identity = identity_of(ledger)
    found = stamped(re.escape(snapshot_name(check_name(ledger), 0)[1:-1]) + "[0-9]{1,20}")
    return sorted({int(own.name.rpartition(".")[2]) for own in found if own.identity == identity})


def write(ledger: str, sequence: int, data: bytes, identity: int | None = None) -> None:
    """Keep ``data`` as the snapshot after event ``sequence``, in the place of one that is there.

    Args:
        identity: of the ledger whose state it is; default: of the one that is there now.

    Raises:
        ipc.SharedMemoryFull: nothing is left behind.
    """
    header = _HEADER.pack(MAGIC, sequence, len(data), crc32c(data))
    content = header + crc32c(header).to_bytes(4, "little") + data
    name = snapshot_name(ledger, sequence)
    identity = identity_of(ledger) if identity is None else identity
    try:
        memory.create(name, len(content), content, identity=identity).close()
    except LedgerExists:
        remove(ledger, sequence, identity)  # it may be damaged
        memory.create(name, len(content), content, identity=identity).close()


def read(ledger: str, sequence: int) -> bytes:
    """The snapshot after event ``sequence``.

    Raises:
        LedgerNotFound: there is none (any more).
        LogCorrupt: it is damaged.
    """
    with _checked(ledger, sequence) as body:
        return bytes(body)


@contextmanager
def _checked(ledger: str, sequence: int) -> Iterator[memoryview]:
    name = snapshot_name(ledger, sequence)
    map = memory.attach(name, write=False)
    view = memoryview(map)
    body = view[_HEADER_BYTES:]
    try:
        header = bytes(view[: _HEADER.size])
        if len(view) < _HEADER_BYTES or crc32c(header) != int.from_bytes(view[_HEADER.size : _HEADER_BYTES], "little"):
            raise LogCorrupt(name, 0, "this is not a snapshot, or its header is damaged")
        magic, number, size, crc = _HEADER.unpack(header)
        if magic != MAGIC or number != sequence or len(body) != size or crc32c(body) != crc:
            raise LogCorrupt(name, _HEADER_BYTES, "the snapshot is damaged")
        yield body
    finally:
        body.release()
        view.release()
        map.close()


def newest(ledger: str, *, at_or_before: int | None = None) -> tuple[int, bytes] | None:
    """The newest intact snapshot: its sequence and its bytes; ``None``: there is none. Damaged ones are passed over."""
    for sequence in reversed(sequences(ledger)):
        if at_or_before is None or sequence <= at_or_before:
            try:
                return sequence, read(ledger, sequence)
            except (LedgerNotFound, LogCorrupt):
                continue
    return None


def newest_sequence(ledger: str) -> int:
    """The event after which the newest intact snapshot was taken; 0: there is none. Copies nothing."""
    for sequence in reversed(sequences(ledger)):
        try:
            with _checked(ledger, sequence):
                return sequence
        except (LedgerNotFound, LogCorrupt):
            continue
    return 0


def remove(ledger: str, sequence: int, identity: int | None = None) -> None:
    """Remove a snapshot; it may be gone already."""
    name = snapshot_name(ledger, sequence)
    ownership.remove_object(name, identity_of(name) if identity is None else identity)
