"""Keeps the log from growing for ever: sees to an auditor that writes snapshots, and drops nothing they do not cover.

A segment may go only when a snapshot is newer than it, so a ledger with a limit needs somebody who writes snapshots.
That is :mod:`workers.followers.auditor`, a process of its own, started when the log has reached half of its limit (most
short-lived managers never get there). All this runs in the log writer's thread, once per rotation; the engine's path
knows nothing of it. If the auditor cannot keep up, or does not stay alive, the log exceeds its limit rather than lose
what no snapshot covers; :meth:`Retention.stats` shows it.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time

from ipc import LogWriter
from kvledger.manager.notices import log_notice
from kvledger.text import printable
from workers.followers import auditor
from workers.processes.programs import environment, python

_BACK_OFF_S = 1.0
_LONGEST_BACK_OFF_S = 60.0
_STOP_S = 5.0
_FAR_OVER = 1.25
"""Some segments above the limit are nothing to speak of: snapshots take a moment."""
_TIGHT_SNAPSHOTS = 4
"""So many per segment where there is little room."""
_log = logging.getLogger(__name__)


class Retention:
    """The auditor of one manager; from now on the log keeps what no snapshot covers."""

    def __init__(self, writer: LogWriter, limit: int | None, seconds: float | None = None) -> None:
        self._writer = writer
        self._ledger = writer.ledger
        self._limit = limit if limit is None else min(limit, max(writer.room() // 2, writer.segment_bytes))
        self._seconds = seconds
        self._is_tight = self._limit != limit
        """Half of the room is less than the log was allowed to take: snapshots come sooner, and more often."""
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0
        self._failures = 0
        self._verdict = ""
        self._over = False
        """The log is far over its limit, and that was said."""
        self._stopped = False
        self._lock = threading.RLock()
        writer.on_rotation = self._rotated
        if self._is_tight and self._limit is not None:
            writer.keep(self._limit)
            log_notice(logging.INFO, "log_limit_follows_room", ledger=self._ledger, log_limit_bytes=self._limit)
            self._rotated()
        if seconds is not None:
            writer.keep_for(seconds)
            self._rotated()

    def _rotated(self) -> None:
        """In the log writer's thread: start the auditor where it is needed, and again where it died."""
        with self._lock:
            if (self._limit is None and self._seconds is None) or self._stopped:
                return
            if self._limit is not None:
                self._look_at_size(self._limit)
            if self._verdict:
                return
            if self._process is None:
                found = auditor.progress(self._ledger)
                if found is not None and found.alive:
                    return  # started by somebody else, or by the engine before this one
                filled = self._limit is not None and 2 * self._writer.log_bytes >= self._limit
                if filled or self._seconds is not None or self._writer.refused_segments:
                    self._start()
            elif self._process.poll() is not None:
                self._died(self._process.returncode)

    def _look_at_size(self, limit: int) -> None:
        size = self._writer.log_bytes
        over = size > _FAR_OVER * limit
        if over and not self._over:
            log_notice(logging.WARNING, "log_over_limit", ledger=self._ledger, log_bytes=size, log_limit_bytes=limit)
        self._over = over

    def _died(self, code: int) -> None:
        found = auditor.progress(self._ledger)
        if code == 1 and found is not None and found.verdict is not None:
            self._verdict = found.verdict.reason
            _log.error("ledger %s fails its audit: %s", self._ledger, printable(self._verdict))
            return
        now = time.monotonic()
        if not self._next_start:
            self._failures += 1
            pause = min(_BACK_OFF_S * 2 ** (self._failures - 1), _LONGEST_BACK_OFF_S)
            self._next_start = now + pause
            _log.warning("the auditor of ledger %s ended with status %d; next one in %g s", self._ledger, code, pause)
        elif now >= self._next_start:
            self._start()

    def _start(self) -> None:
        self._next_start = 0.0
        try:
            # exec, never fork: an inherited descriptor would keep the engine's lock; see the supervisor on sessions
            often = [f"{self._writer.segment_bytes // (_TIGHT_SNAPSHOTS if self._is_tight else 1)}"]
            often += [] if self._seconds is None else [f"{self._seconds / 8}"]
            self._process = subprocess.Popen(
                python("-m", "workers.followers.auditor", self._ledger, *often),
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            _log.warning("the auditor of ledger %s cannot be started: %s", self._ledger, printable(str(error)))

    @property
    def pid(self) -> int:
        """Process id of the auditor; 0: it was not needed yet."""
        return self._process.pid if self._process is not None else 0

    def stats(self) -> dict[str, int]:
        """Size of the log, and how far the auditor and its snapshots are (event sequences; 0: not at all)."""
        found = auditor.progress(self._ledger)
        return {
            "log_bytes": self._writer.log_bytes,
            "log_limit_bytes": self._limit or 0,
            "log_refused_segments": self._writer.refused_segments,
            "audited_events": found.audited if found is not None else 0,
            "snapshot_events": found.snapshot if found is not None else 0,
            "audit_broken_at": found.verdict.event if found is not None and found.verdict is not None else 0,
        }

    def stop(self) -> None:
        """Stop the auditor: politely, then not."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
