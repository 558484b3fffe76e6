"""A ledger in shared memory as a source: a living one, or the segments of a dead one.

It is read as an observer: no reader line, no lock, nothing that the engine could notice. What was asked for in this
process is kept in checkpoints.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator

import zstandard

from ipc import (
    Control,
    LedgerError,
    LogCorrupt,
    LogReader,
    Overrun,
    Record,
    snapshots,
)
from ipc.names import SHM
from ipc.ownership import segments_of
from ipc.segment import MappedSegment, locate
from kvledger.debugger.source.source import Source, SourceError, Tail
from kvledger.recordings.postings import Kind
from statemachine.errors import Contradiction
from statemachine.records.replay import Replay
from statemachine.records.snapshot import SnapshotError, restore, snapshot
from statemachine.records.upcast import UnknownSchema, digests_comparable, upcaster
from statemachine.state.state import State

_BATCH = 4096
_CHECKPOINT_EVERY = 10_000
_MOST_CHECKPOINTS = 64


class LedgerSource(Source):
    """A ledger in shared memory, living or dead."""

    def __init__(self, name: str, progress: Callable[[int, int], None]) -> None:
        super().__init__(name)
        self._progress = progress
        self._checkpoints: dict[int, bytes] = {}
        """By sequence, ascending: compressed states that this process has passed."""
        self._spacing = _CHECKPOINT_EVERY
        self._contradiction: Contradiction | None = None
        self._scanned = 0
        """Every event up to here has a state."""
        control = Control.open(name)
        schema = control.schema_hash
        control.close()
        try:
            self._upcast = upcaster(schema)
            self.digests_comparable = digests_comparable(schema)
        except UnknownSchema as error:
            raise SourceError(f"ledger {name!r}: {error}; read it with the kvledger that writes it") from None

    @property
    def first(self) -> int:
        """See :class:`Source`, like the rest."""
        _, oldest = locate(self.name, segments_of(self.name), 0)
        if not oldest:
            raise SourceError(f"ledger {self.name!r} has no log segment in {SHM}")
        return oldest

    @property
    def last(self) -> int:
        newest, _ = locate(self.name, segments_of(self.name), 1 << 63)
        if newest is None:
            raise SourceError(f"ledger {self.name!r} has no log segment in {SHM}")
        start = newest.header.base_sequence
        newest.close()
        last = start - 1
        for records in self.records(start):
            last = records[-1].sequence
        return last

    def records(self, start: int | None = None) -> Iterator[list[Record]]:
        reader = self._oldest() if start is None else LogReader(self.name, from_sequence=max(start, 1))
        try:
            while records := self._poll(reader):
                yield records
        finally:
            reader.close()

    def _oldest(self) -> LogReader:
        """A reader at the first event that is still there; the engine may drop segments meanwhile."""
        start = self.first
        while True:
            try:
                return LogReader(self.name, from_sequence=start)
            except Overrun as error:
                start = error.available

    def _poll(self, reader: LogReader) -> list[Record]:
        try:
            return self._upcast(reader.poll(_BATCH))
        except LedgerError as error:
            self.damage = str(error)
            self.damaged_at = error.offset if isinstance(error, LogCorrupt) else None
            return []

    @property
    def last_state(self) -> int:
        self._scan()
        return self.last if self._contradiction is None else self._contradiction.sequence - 1

    @property
    def contradiction(self) -> str:
        self._scan()
        return str(self._contradiction or "")

    def _scan(self) -> None:
        last = self.last
        if self._contradiction is None and self._scanned < last:
            try:
                self.at(last)
            except Contradiction as error:
                self._contradiction = error

    def at(self, sequence: int) -> State:
        if not self.first <= sequence <= self.last:
            raise SourceError(f"ledger {self.name!r} holds the events {self.first} to {self.last}, not {sequence}")
        if self._contradiction is not None and sequence >= self._contradiction.sequence:
            raise self._contradiction
        base, state = self._nearest(sequence)
        replay = Replay(state, compare=False)
        if sequence > base:
            self._advance(replay, base, sequence)
        return replay.state

    def anchor(self, sequence: int) -> int:
        known = [*self._checkpoints, *snapshots.sequences(self.name), self.first - 1]
        return max(known_one for known_one in known if known_one <= max(sequence, self.first - 1))

    def starts(self) -> list[int]:
        bases = []
        for epoch, index in segments_of(self.name):
            with contextlib.suppress(LedgerError):  # being prepared, or dropped since we looked
                segment = MappedSegment(self.name, epoch, index)
                bases.append(segment.header.base_sequence)
                segment.close()
        last = self.last
        return sorted({self.first, *(base for base in bases if self.first <= base <= last)})

    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        last = self.last
        cuts = sorted({*self._checkpoints, *snapshots.sequences(self.name)})
        starts = [self.first, *(cut + 1 for cut in cuts if self.first <= cut < last)]
        return list(zip(starts, [*(start - 1 for start in starts[1:]), last]))

    def _advance(self, replay: Replay, base: int, sequence: int) -> None:
        for records in self.records(base + 1):
            wanted = records[: sequence - records[0].sequence + 1]
            replay.feed(wanted)
            reached = wanted[-1].sequence
            self._scanned = max(self._scanned, reached)
            if reached >= sequence:
                return
            if reached - max((seen for seen in self._checkpoints if seen <= reached), default=base) >= self._spacing:
                self._keep(reached, replay.state)
                self._progress(reached - base, sequence - base)
        raise SourceError(f"ledger {self.name!r} ends before event {sequence}: {self.damage or 'it was dropped'}")

    def _keep(self, sequence: int, state: State) -> None:
        """Remember a state. When there are too many, every other one goes: what is kept stays bounded."""
        self._checkpoints[sequence] = zstandard.ZstdCompressor(level=1).compress(snapshot(state))
        self._checkpoints = dict(sorted(self._checkpoints.items()))
        if len(self._checkpoints) > _MOST_CHECKPOINTS:
            for old in list(self._checkpoints)[::2]:
                del self._checkpoints[old]
            self._spacing *= 2

    def _nearest(self, sequence: int) -> tuple[int, State | None]:
        """The newest state known at or before ``sequence``, and after which event it is."""
        passed = list(self._checkpoints)
        number = bisect.bisect_right(passed, sequence)
        base = passed[number - 1] if number else 0
        found = snapshots.newest(self.name, at_or_before=sequence)
        if found is not None and found[0] > base:
            try:
                return found[0], restore(found[1])
            except SnapshotError:
                pass  # of another version: replay from further back
        if base:
            return base, restore(zstandard.ZstdDecompressor().decompress(self._checkpoints[base]), expect_sound=False)
        first = self.first
        if first > 1:
            usable = self._usable(first)
            known = f"event {usable[0]} on" if usable else "no event on"
            raise SourceError(
                f"ledger {self.name!r} holds the events from {first} on, and no snapshot of a state before "
                f"event {sequence}: its states are known from {known}"
            )
        return 0, None

    def _usable(self, first: int) -> list[int]:
        """Snapshots that the log goes on from."""
        return [sequence for sequence in snapshots.sequences(self.name) if sequence >= first - 1]

    @property
    def first_state(self) -> int:
        first = self.first
        if first == 1:
            return first
        usable = self._usable(first)
        if not usable or usable[0] >= self.last:
            raise SourceError(
                f"ledger {self.name!r} holds the events from {first} on, and no snapshot that they follow: "
                "there is no state to show"
            )
        return usable[0] + 1

    def before(self, sequence: int) -> State | None:
        if sequence == self.first > 1:
            base, state = self._nearest(sequence - 1)
            if base == sequence - 1:
                return state
        return super().before(sequence)

    def tail(self, start: int | None = None) -> Tail:
        reader = LogReader(self.name, from_sequence=self.last + 1 if start is None else start)

        def read(timeout: float) -> list[Record]:
            return self._upcast(reader.wait(timeout) if timeout else reader.poll())

        return Tail(read, reader.writer_alive, reader.close)

    def close(self) -> None:
        self._checkpoints = {}
