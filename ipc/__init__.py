"""The log in shared memory: one writer, any number of readers, no locks between them.

Knows bytes, sequence numbers and cursors; what a record means is its users' business.
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
