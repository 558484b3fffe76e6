"""What a transfer worker answers, in a log of its own that only it writes."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from ipc import Record

KIND, EPOCH_KIND = 1, 2
SCHEMA_HASH = int.from_bytes(b"kvl.ack2", "little")
_ARGS = struct.Struct("<III")


class Status(IntEnum):
    """How a rank's part of a transfer ended."""

    OK = 0
    FAILED = 1
    CORRUPT = 2


class Acknowledgement(NamedTuple):
    """A rank has ended its part of a transfer: the first ``valid`` blocks are copied, and it will write no more."""

    rank: int
    transfer: int
    valid: int
    status: Status
    error: str

    def record(self) -> tuple[int, int, bytes, bytes]:
        """Encode the answer as ``(kind, subject, args, payload)`` of a record."""
        return KIND, self.transfer, _ARGS.pack(self.rank, self.status, self.valid), self.error.encode()

    @classmethod
    def of(cls, record: Record) -> Acknowledgement:
        """Decode a record of a worker's log. Raises ``ValueError`` for anything else."""
        if record.kind != KIND:
            raise ValueError(f"kind {record.kind} is no acknowledgement")
        rank, status, valid = _ARGS.unpack_from(record.args)
        return cls(rank, record.subject, valid, Status(status), record.payload.decode())


class EpochSeen(NamedTuple):
    """A rank has read the start of an epoch: whatever was ordered before it is executed."""

    rank: int
    epoch: int

    def record(self) -> tuple[int, int, bytes, bytes]:
        """Encode the answer as ``(kind, subject, args, payload)`` of a record."""
        return EPOCH_KIND, self.epoch, _ARGS.pack(self.rank, 0, 0), b""


def answer_of(record: Record) -> Acknowledgement | EpochSeen:
    """Decode a record of a worker's log: the end of a transfer, or an epoch that was seen."""
    if record.kind == EPOCH_KIND:
        return EpochSeen(_ARGS.unpack_from(record.args)[0], record.subject)
    return Acknowledgement.of(record)


def log_name(ledger: str, rank: int, incarnation: int) -> str:
    """Name of the log of one incarnation of a rank's worker."""
    return f"{ledger}.rank{rank}.{incarnation}"


def reader_name(rank: int) -> str:
    """Under which the transfer worker of a rank is registered as a reader of its ledger."""
    return f"transfer {rank}"


def signals_name(ledger: str, rank: int, incarnation: int) -> str:
    """Name of the signals of one incarnation of a rank's worker."""
    return f"/{ledger}.rank{rank}.{incarnation}.signals"
