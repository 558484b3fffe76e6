"""The recorder: writes a ledger's log to self-contained ``.kvlog`` files while it grows.

The first file begins as far back as the log reaches; each file after a rotation (``FILE.0001.kvlog``, ...) begins with
a snapshot that the recorder gets by replaying along. It writes whole transactions only, so a file that a crash has cut
off is read up to its last good one. A ledger that is broken is still recorded to its end: then the log matters most.
"""

from __future__ import annotations

import time
from pathlib import Path

from ipc import KvlogWriter, Overrun, Record, record_bytes
from statemachine.records import codec
from statemachine.records.snapshot import snapshot
from workers.followers.follow import Follower, Skipped

_CHUNK_BYTES = 256 << 10
_CHUNK_S = 1.0


class Recorder:
    """One recording; :meth:`step` is the whole loop body.

    Args:
        ledger: its name.
        path: of the first file; none of the files may exist.
        rotate_bytes: begin another file when one has this size on the disk.
        rotate_s: begin another file after so many seconds.

    Raises:
        ipc.LedgerNotFound, ipc.LedgerError
    """

    def __init__(
        self, ledger: str, path: Path, *, rotate_bytes: int | None = None, rotate_s: float | None = None
    ) -> None:
        self.path = path
        self.files: list[Path] = []
        """The files written so far."""
        self.events = 0
        """Events recorded."""
        self.skipped: list[Skipped] = []
        """Events that were gone before they could be recorded; a new file begins after each gap."""
        self.broken = ""
        """Why the log cannot be replayed any more; it is recorded all the same, into one file."""
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._waiting: list[Record] = []
        self._waiting_bytes = 0
        self._written_at = time.monotonic()
        self.follower = Follower(ledger, oldest=True)
        try:
            self._writer = self._begin_file()
        except BaseException:
            self.follower.close()
            raise

    def _begin_file(self) -> KvlogWriter:
        number = len(self.files)
        path = self.path if not number else self.path.with_suffix(f".{number:04}{self.path.suffix}")
        state = self.follower.state
        writer = KvlogWriter(
            path,
            schema_hash=codec.SCHEMA_HASH,
            base_sequence=self.follower.sequence + 1,
            snapshot=b"" if state is None else snapshot(state),
        )
        self.files.append(path)
        self._begun = time.monotonic()
        return writer

    def step(self, timeout: float = 0.0) -> int:
        """Record what was logged; waits up to ``timeout`` seconds for it. Returns the number of events.

        Raises:
            ipc.Overrun: it was overrun, and there is no snapshot to go on from.
            ipc.LogCorrupt
            OSError: the disk is full; the files can be read up to their last whole transaction.
        """
        try:
            records = self.follower.poll(timeout)
        except Overrun:
            self.flush()
            self.skipped.append(self.follower.resynchronise())
            self.broken = ""
            self._next_file()
            return 0
        self._take(records)
        # Few events at a time make chunks that compress badly: they wait a little for company.
        if self._waiting_bytes >= _CHUNK_BYTES or time.monotonic() - self._written_at >= _CHUNK_S:
            self.flush()
            if self._is_full():
                self._next_file()
        return len(records)

    def _take(self, records: list[Record]) -> None:
        self._waiting += records
        self._waiting_bytes += sum(record_bytes(len(record.payload)) for record in records)
        self.events += len(records)
        if records and not self.broken:
            try:
                self.follower.apply(records)
            except Exception as error:  # whatever it is: recording goes on
                reason = (str(error).splitlines() or [""])[0]
                self.broken = f"event {self.follower.sequence + 1}: {type(error).__name__}: {reason}"

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._written_at = time.monotonic()
        if self._waiting:
            self._writer.write(self._waiting)
            self._waiting = []
            self._waiting_bytes = 0

    def _is_full(self) -> bool:
        if self.broken or self._writer.next_sequence == self._writer.base_sequence:
            return False
        if self._rotate_bytes is not None and self._writer.size >= self._rotate_bytes:
            return True
        return self._rotate_s is not None and time.monotonic() - self._begun >= self._rotate_s

    def _next_file(self) -> None:
        self._writer.close()
        self._writer = self._begin_file()

    def close(self) -> None:
        """Write what waits, flush to the disk, and leave."""
        try:
            self.flush()
        finally:
            self._writer.close()
            self.follower.close()
