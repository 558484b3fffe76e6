"""The log in shared memory: one writer, any number of readers, no locks between them.

Rules:

* Bytes, sequence numbers and cursors are all that is known here; what a record means is its users' business.
* One process writes a ledger: the one that holds ``flock`` on its control segment. The kernel takes the lock back.
* Segments are append-only and never used again. A reader copies first and believes afterwards: order comes from a
  fence, proof from the CRC chain. It sees whole transactions, also after ``kill -9`` in the middle of one.
* No reader slows the writer, or waits for it: who comes too late gets :class:`Overrun`, who parks is rung up.
* Space is reserved before it is touched: a full ``/dev/shm`` is an error, never a SIGBUS.

::

    LogWriter ── stage ─► bodies ── publish ─► CRC words, fence, tail hint, doorbells
        │                                          │
    Control: lock · current segment · 128 lines ◄──┴── LogReader: cursor, kind mask, parked
        │                                          │
    segments (sealed ones go when retention says so)      kvlog: the same records as a file
    snapshots (a state after a sequence)                  recovery: where a dead writer's log ends

Words: ``docs/glossary.md``.
"""

from ipc.control import Control
from ipc.errors import (
    InvalidName,
    LedgerError,
    LedgerExists,
    LedgerNotFound,
    LogCorrupt,
    NotPrivate,
    Overrun,
    SharedMemoryFull,
    TooManyFiles,
    TooManyReaders,
    TransactionTooLarge,
    WriterAlive,
)
from ipc.kvlog import KvlogReader, KvlogWriter
from ipc.reader import LogReader
from ipc.record import Record, record_bytes
from ipc.writer import LogWriter

__all__ = [
    "Control",
    "InvalidName",
    "KvlogReader",
    "KvlogWriter",
    "LedgerError",
    "LedgerExists",
    "LedgerNotFound",
    "LogCorrupt",
    "LogReader",
    "LogWriter",
    "NotPrivate",
    "Overrun",
    "Record",
    "SharedMemoryFull",
    "TooManyFiles",
    "TooManyReaders",
    "TransactionTooLarge",
    "WriterAlive",
    "record_bytes",
]
