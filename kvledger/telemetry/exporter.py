"""The exporter: a process that follows a ledger and shows Prometheus what it derives; the engine pays nothing for it.

The loop derives, and takes a picture of all metrics once per second; a scrape, in the server's thread, only reads the
last picture. So neither waits for the other.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from ipc import Control, LogCorrupt, Overrun
from ipc.names import SHM
from ipc.ownership import log_bytes
from kvledger.telemetry.collectors import Histograms
from kvledger.telemetry.derivation import Derivation, Sample
from kvledger.telemetry.pushes import PushMetrics
from kvledger.text import printable
from statemachine.errors import InvariantViolation
from statemachine.records.codec import CodecError
from workers.followers import auditor
from workers.followers.follow import Follower

_log = logging.getLogger(__name__)
_PICTURE_S = 1.0
_WORKER = "transfer "
"""What the readers of transfer workers are called, before their rank."""


class Picture(NamedTuple):
    """All metrics at one moment."""

    taken_ns: int
    behind_s: float
    samples: list[Sample]
    histograms: Histograms


class Exporter:
    """One exporter; :meth:`step` is the whole loop body, :meth:`picture` what a scrape gets.

    Raises:
        ipc.LedgerNotFound, ipc.Overrun, workers.followers.follow.OtherVersion
    """

    def __init__(self, ledger: str) -> None:
        self.ledger = ledger
        self.follower = Follower(ledger)
        self._control = Control.open(ledger)
        self.derivation = Derivation(self.follower.state, self.follower.sequence)
        self.contradiction = 0
        """The first event that contradicts the state before it; 0: none has."""
        self._pushes = PushMetrics(ledger)
        self._behind_s = 0.0
        self._picture = self._take()

    def step(self, timeout: float = 0.0) -> int:
        """Read what was logged; waits up to ``timeout`` seconds for it. Returns the number of events.

        Raises:
            ipc.Overrun: it was overrun, and there is no snapshot to go on from.
        """
        read = self._read(timeout)
        if time.time_ns() - self._picture.taken_ns > _PICTURE_S * 1e9:
            self._picture = self._take()
        return read

    def _read(self, timeout: float) -> int:
        if self.contradiction:
            time.sleep(timeout)
            return 0
        try:
            records = self.follower.poll(timeout)
        except Overrun:
            self._resynchronise()
            return 0
        except LogCorrupt as error:
            self._stop_reading(str(error))
            return 0
        self._behind_s = max(time.time_ns() - records[-1].time_ns, 0) / 1e9 if records else 0.0
        try:
            self.derivation.feed(records)
        except (InvariantViolation, CodecError) as error:
            self._stop_reading(str(error))
        return len(records)

    def _resynchronise(self) -> None:
        """What is gone was not counted; histograms and totals go on from where they were."""
        skipped = self.follower.resynchronise()
        self.derivation.go_on(self.follower.state, skipped.last)
        self.derivation.totals["kvledger_skipped_events_total", ()] += skipped.last - skipped.first + 1
        _log.warning("ledger=%s events=%d..%d were gone before they were read", self.ledger, *skipped)

    def _stop_reading(self, reason: str) -> None:
        self.contradiction = self.derivation.sequence + 1
        _log.error("ledger=%s event=%d metrics stop here: %s", self.ledger, self.contradiction, printable(reason))

    def picture(self) -> tuple[str, list[Sample], Histograms]:
        """The ledger's name, and its metrics as of the last picture; may be called from any thread."""
        taken_ns, behind_s, samples, histograms = self._picture
        age_s = (time.time_ns() - taken_ns) / 1e9
        lag_s = behind_s if age_s < 2 * _PICTURE_S else behind_s + age_s  # the loop is busy, or dead
        return self.ledger, [*samples, Sample("kvledger_exporter_lag_seconds", (), lag_s)], histograms

    def _take(self) -> Picture:
        now = time.time_ns()
        self._pushes.look()
        samples = [*self.derivation.samples(now), *self._surroundings(), *self._pushes.samples()]
        histograms = copy.deepcopy(self.derivation.histograms)
        if self._pushes.known:
            histograms["kvledger_push_seconds", ()] = copy.deepcopy(self._pushes.histogram)
        return Picture(now, self._behind_s, samples, histograms)

    def _surroundings(self) -> Iterator[Sample]:
        """What does not stand in the log."""
        free, size = _shared_memory()
        for name, value in {
            "kvledger_writer_up": self._control.writer_alive(),
            "kvledger_log_bytes": log_bytes(self.ledger),
            "kvledger_shared_memory_free_bytes": free,
            "kvledger_shared_memory_size_bytes": size,
            "kvledger_exporter_sequence": self.derivation.sequence,
            "kvledger_contradiction_event": self.contradiction,
        }.items():
            yield Sample(name, (), value)
        for reader in self._control.readers():
            rank = reader.name.removeprefix(_WORKER)
            if reader.worker and reader.alive and rank.isdecimal():
                lag = max(self.derivation.sequence + 1 - reader.cursor, 0)
                yield Sample("kvledger_worker_lag_events", (rank,), lag)
        audit = auditor.progress(self.ledger)
        if audit is not None:
            yield Sample("kvledger_auditor_up", (), audit.alive)
            yield Sample("kvledger_auditor_lag_events", (), max(self.derivation.sequence - audit.audited, 0))
            yield Sample("kvledger_audit_broken_event", (), audit.verdict.event if audit.verdict is not None else 0)

    def close(self) -> None:
        """Stop following."""
        self._pushes.close()
        self._control.close()
        self.follower.close()


def _shared_memory() -> tuple[int, int]:
    found = os.statvfs(SHM)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
