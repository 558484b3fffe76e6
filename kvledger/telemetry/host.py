"""One exporter for many ledgers of this machine: those that are there, and those that come."""

from __future__ import annotations

import logging
import time
from fnmatch import fnmatchcase

from ipc import LedgerError
from ipc.ownership import ledger_names
from kvledger.telemetry.collectors import Picture
from kvledger.telemetry.exporter import Exporter
from kvledger.text import printable

_LOOK_S = 2.0
"""Between two looks for ledgers that have come."""
_log = logging.getLogger(__name__)


class HostExporter:
    """Follows each ledger of this user whose name fits a pattern (``chat-*``), from when it comes until it is gone.

    A ledger that cannot be followed (another version, damage) is named in the log once, and the others go on.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._exporters: dict[str, Exporter] = {}
        self._refused: dict[str, str] = {}
        self._next_look = 0.0

    def step(self, timeout: float) -> int:
        """Read what all of them have logged; sleeps so many seconds where nothing was. Returns the number of events."""
        if time.monotonic() >= self._next_look:
            self._look()
        read = 0
        for name, exporter in list(self._exporters.items()):
            try:
                events = exporter.step()
                if not events and not exporter.follower.reader.exists():
                    self._leave(name)
            except LedgerError as error:
                self._refuse(name, error)
                self._leave(name)
                continue
            read += events
        if not read:
            time.sleep(timeout)
        return read

    def _look(self) -> None:
        here = [name for name in ledger_names() if fnmatchcase(name, self._pattern)]
        for name in here:
            if name not in self._exporters:
                try:
                    self._exporters[name] = Exporter(name)
                except LedgerError as error:  # it may be gone again, or become readable later
                    self._refuse(name, error)
        self._refused = {name: reason for name, reason in self._refused.items() if name in here}
        self._next_look = time.monotonic() + _LOOK_S

    def _refuse(self, name: str, error: LedgerError) -> None:
        if self._refused.get(name) != str(error):
            self._refused[name] = str(error)
            _log.warning("ledger=%s is not followed: %s", name, printable(str(error)))

    def _leave(self, name: str) -> None:
        self._exporters.pop(name).close()

    def pictures(self) -> list[Picture]:
        """The metrics of each as of its last picture; may be called from any thread."""
        return [exporter.picture() for exporter in list(self._exporters.values())]

    def close(self) -> None:
        """Stop following."""
        for name in list(self._exporters):
            self._leave(name)
