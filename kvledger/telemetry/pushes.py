"""The metrics of a prefill instance's pushes, from its log of pushes and from who reads that.

The log of pushes is no part of the ledger's own (:mod:`workers.handoff.pushes`), begins with each sender, and goes
with it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

from ipc import Control, LedgerError, LogReader, Overrun
from kvledger.handoff.peer import read_from_the_oldest
from kvledger.telemetry.derivation import Histogram, Sample
from kvledger.telemetry.table import BY_NAME, PUSH_OUTCOMES, value_of
from kvledger.text import printable
from statemachine.events import Outcome
from statemachine.records.codec import CodecError
from workers.handoff.pushes import SCHEMA_HASH, PushFinished, PushStarted, fact_of, log_name
from workers.pools.layout import PoolLayout

_log = logging.getLogger(__name__)
_PUSHER = "pusher "
"""What the readers of pushers are called, before their rank."""


class PushMetrics:
    """What was pushed since it began to look. Says nothing before there is a sender."""

    def __init__(self, ledger: str) -> None:
        self._name = log_name(ledger)
        self._reader: LogReader | None = None
        self._control: Control | None = None
        self._seen = False
        self._under_way: dict[int, tuple[int, int]] = {}
        """By push: when it was ordered, in ns, and its bytes."""
        self._ended: Counter[str] = Counter()
        self._bytes = 0
        self.histogram = Histogram(BY_NAME["kvledger_push_seconds"].buckets)

    @property
    def known(self) -> bool:
        """Whether there is a sender, or was one."""
        return self._seen

    def look(self) -> None:
        """Read on. A sender that is gone may be followed by another."""
        if self._reader is None and not self._attach():
            return
        reader = self._reader
        assert reader is not None
        there = reader.exists()  # before the last records are read
        try:
            for record in reader.poll():
                self._count(fact_of(record), record.time_ns)
        except Overrun:
            _log.warning("pushes of %s were gone before they were read", self._name)
            there = False
        except (LedgerError, CodecError) as error:
            _log.error("pushes of %s cannot be followed: %s", self._name, printable(str(error)))
            there = False
        if not there:
            self.close()

    def _attach(self) -> bool:
        try:
            reader = read_from_the_oldest(self._name, "metrics")
        except LedgerError:
            return False
        if reader.schema_hash != SCHEMA_HASH:
            reader.close()
            return False
        try:
            self._control = Control.open(self._name)
        except LedgerError:
            reader.close()
            return False
        self._reader = reader
        self._seen = True
        return True

    def _count(self, fact: PushStarted | PushFinished, now_ns: int) -> None:
        if isinstance(fact, PushStarted):
            self._under_way[fact.push] = now_ns, len(fact.targets) * _block_bytes(fact.layout)
            return
        since, size = self._under_way.pop(fact.push, (0, 0))
        outcome = Outcome(fact.outcome)
        self._ended[value_of(outcome)] += 1
        if outcome == Outcome.DONE:
            self._bytes += size
            if since:
                self.histogram.observe(max(now_ns - since, 0) / 1e9)

    def samples(self) -> Iterator[Sample]:
        """Totals, and what is under way now."""
        if not self._seen:
            return
        for outcome in PUSH_OUTCOMES:
            yield Sample("kvledger_pushes_total", (outcome,), self._ended[outcome])
        yield Sample("kvledger_push_bytes_total", (), self._bytes)
        yield Sample("kvledger_pushes_in_flight", (), len(self._under_way))
        if self._control is None or self._reader is None:
            return
        lines = [line for line in self._control.readers() if line.worker and line.alive]
        yield Sample("kvledger_messagers", (), len(lines))
        for line in lines:
            lag = max(self._reader.cursor - line.cursor, 0)
            yield Sample("kvledger_messager_lag_records", (line.name.removeprefix(_PUSHER),), lag)

    def close(self) -> None:
        """Stop following; what was under way has no end that could be seen."""
        self._under_way.clear()
        if self._reader is not None:
            self._reader.close()
        if self._control is not None:
            self._control.close()
        self._reader = self._control = None


def _block_bytes(layout: str) -> int:
    """Bytes of one block over all layers and ranks."""
    try:
        pools = PoolLayout.parse(layout)
    except ValueError:
        return 0
    return pools.ranks * pools.layers * pools.block_bytes
