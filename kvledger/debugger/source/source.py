"""Where a log comes from: a living ledger, the segments of a dead one, or a ``.kvlog`` file, all read the same way.

A ledger is read as an observer: no reader line, no lock, nothing that the engine could notice. A recording answers any
question about its past from its index; a ledger keeps checkpoints of what was asked for in this process.
"""

from __future__ import annotations

import abc
import bisect
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import zstandard

from ipc import (
    Control,
    InvalidName,
    KvlogReader,
    LedgerError,
    LedgerNotFound,
    LogCorrupt,
    LogReader,
    Overrun,
    Record,
    snapshots,
)
from ipc.names import SHM, segments_of
from ipc.record import CALL_BEGIN, TXN_BEGIN, TXN_END
from ipc.segment import MappedSegment, locate
from kvledger.recordings.postings import Kind
from kvledger.recordings.recording import Recording
from statemachine.apply import apply, genesis
from statemachine.errors import Contradiction
from statemachine.events import Event
from statemachine.records import codec
from statemachine.records.replay import MISFITS, Replay, event_of, said
from statemachine.records.snapshot import SnapshotError, restore, snapshot
from statemachine.records.upcast import UnknownSchema, digests_comparable, upcaster
from statemachine.state.state import State

_BATCH = 4096
_CHECKPOINT_EVERY = 10_000
_MOST_CHECKPOINTS = 64


class SourceError(ValueError):
    """What the user named cannot be read, or does not reach as far as asked; one line says what to do."""


class Entry(NamedTuple):
    """One event of a log, and when it was written."""

    sequence: int
    time_ns: int
    """Wall clock, nanoseconds since 1970."""
    step: int
    """The engine's scheduler step."""
    event: Event


class Tail:
    """The end of a log as it grows. ``poll`` never misses an event."""

    def __init__(self, read: Callable[[float], list[Record]], alive: Callable[[], bool], close: Callable[[], None]):
        self._read = read
        self._alive = alive
        self.close = close
        """Stop reading."""

    def poll(self, timeout: float = 0.0) -> list[Entry]:
        """New events, in whole transactions; none after ``timeout`` seconds without any."""
        return [_entry(record) for record in self._read(timeout)]

    @property
    def alive(self) -> bool:
        """Whether somebody still writes the log."""
        return self._alive()


def _followed(tail: Tail) -> Iterator[Entry]:
    try:
        while True:
            alive = tail.alive
            entries = tail.poll(0.25)
            yield from entries
            if not entries and not alive:
                return
    finally:
        tail.close()


class Source(abc.ABC):
    """A log and the states it adds up to. A context manager; not for two threads at once.

    An event that contradicts the state before it has no state, nor has anything after it: see :attr:`contradiction`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        """What the user typed."""
        self.damage = ""
        """Why the log ends early; empty if it does not. Reading may find it later than opening does."""
        self.damaged_at: int | None = None
        """The byte of the file (of a ledger: of its segment) from which on nothing could be read."""
        self.unfinished = False
        """A recording without an end mark: it was cut, or its recorder still writes or was killed."""
        self.digests_comparable = True
        """Whether digests in the log mean what they mean today; not in a log of an earlier version."""

    @property
    @abc.abstractmethod
    def first(self) -> int:
        """Sequence of the oldest event there is."""

    @property
    @abc.abstractmethod
    def last(self) -> int:
        """Sequence of the newest event; of a living ledger: now."""

    @property
    def first_state(self) -> int:
        """The first event whose state, and the state it meets, is known: of a ledger that was cut, a later one.

        Raises:
            SourceError: of a ledger that was cut no state is known.
        """
        return self.first

    @property
    @abc.abstractmethod
    def last_state(self) -> int:
        """Sequence of the last event that has a state: :attr:`last`, unless there is a :attr:`contradiction`."""

    @property
    @abc.abstractmethod
    def contradiction(self) -> str:
        """What is wrong with event ``last_state + 1``; empty if nothing is."""

    def intact(self) -> list[tuple[int, int]]:
        """Stretches of the log, first and last event, ascending, between which events are missing."""
        return [(self.first, self.last)]

    @abc.abstractmethod
    def records(self, start: int | None = None) -> Iterator[list[Record]]:
        """The raw records from event ``start`` on, in batches of whole transactions, up to where events are missing."""

    @abc.abstractmethod
    def at(self, sequence: int) -> State:
        """The state after event ``sequence``; the caller's own copy.

        Raises:
            SourceError: the log does not hold that state.
            Contradiction: that event, or one before it, contradicts the state that it meets.
        """

    @abc.abstractmethod
    def anchor(self, sequence: int) -> int:
        """After which event the nearest state at or before ``sequence`` is kept; replaying goes on from there."""

    @abc.abstractmethod
    def starts(self) -> list[int]:
        """Events from which reading can begin at once, ascending; the first one is :attr:`first`."""

    @abc.abstractmethod
    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        """Stretches of the log, first and last event, ascending, outside of which nothing mentions ``id``."""

    @abc.abstractmethod
    def tail(self, start: int | None = None) -> Tail:
        """Read on from event ``start`` (default: only what comes from now on) as the log grows.

        Raises:
            SourceError: a recording does not grow.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of everything."""

    def entries(self, start: int | None = None, stop: int | None = None) -> Iterator[Entry]:
        """The events from ``start`` to ``stop``, both included, as they stand in the log. Bounded memory.

        Raises:
            SourceError: a record is no event.
        """
        for records in self.records(start):
            for record in records:
                if stop is not None and record.sequence > stop:
                    return
                yield _entry(record)

    def transactions(self, start: int | None = None, stop: int | None = None) -> Iterator[list[Entry]]:
        """The events call by call, of the calls that begin at or after ``start`` and end by ``stop``.

        A transaction holds one call, or the calls of one scheduler step.
        """
        begun: list[Entry] = []
        for records in self.records(start):
            for record in records:
                if begun and record.flags & CALL_BEGIN:
                    yield begun
                    begun = []
                if stop is not None and record.sequence > stop:
                    return
                if begun or record.flags & (TXN_BEGIN | CALL_BEGIN):
                    begun.append(_entry(record))
                if begun and record.flags & TXN_END:
                    yield begun
                    begun = []

    def replay(self, start: int | None = None, stop: int | None = None) -> Iterator[tuple[Entry, State]]:
        """Each event from ``start`` to ``stop`` with the state after it: one state that changes, not to be kept.

        Raises:
            Contradiction: an event contradicts the state that it meets.
        """
        start = self.first if start is None else start
        state = self.before(start)
        for entry in self.entries(start, stop):
            try:
                if state is None:
                    state = genesis(entry.event)
                else:
                    apply(state, entry.event)
            except MISFITS as error:
                raise Contradiction(entry.sequence, f"event {entry.sequence}: {said(error)}") from error
            yield entry, state

    def before(self, sequence: int) -> State | None:
        """The state that event ``sequence`` meets; ``None`` before the first event of a ledger."""
        return None if sequence <= 1 else self.at(sequence - 1)

    def follow(self) -> Iterator[Entry]:
        """Events as they are written from now on, until the writer has ended and everything is read."""
        return _followed(self.tail())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entry(record: Record) -> Entry:
    try:
        return Entry(record.sequence, record.time_ns, record.step, event_of(record))
    except codec.CodecError as error:
        raise SourceError(f"event {record.sequence}: {error}") from error


class RecordedSource(Source):
    """A ``.kvlog`` file."""

    def __init__(self, name: str, progress: Callable[[int, int], None]) -> None:
        super().__init__(name)
        self.recording = Recording(Path(name), progress)
        self.digests_comparable = self.recording.digests_comparable
        self.unfinished = not self.recording.ended
        if self.recording.damage:
            self._find_damage()

    @property
    def first(self) -> int:
        """See :class:`Source`, like the rest."""
        return self.recording.first

    @property
    def last(self) -> int:
        return self.recording.last

    @property
    def last_state(self) -> int:
        return self.recording.last_state

    @property
    def contradiction(self) -> str:
        return self.recording.contradiction

    def intact(self) -> list[tuple[int, int]]:
        gaps = self.recording.gaps
        starts, ends = [self.first, *(last + 1 for _, last in gaps)], [*(first - 1 for first, _ in gaps), self.last]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if start <= end]

    def records(self, start: int | None = None) -> Iterator[list[Record]]:
        start = self.first if start is None else start
        reached = start - 1
        for records in self.recording.records(start):
            reached = records[-1].sequence
            yield records
        if reached < self.last and not self.damage:  # damaged since it was indexed
            self._find_damage()

    def _find_damage(self) -> None:
        reader = KvlogReader(self.recording.path)
        try:
            damage = reader.seek_damage()
        finally:
            reader.close()
        if damage is not None:
            self.damage, self.damaged_at = str(damage), damage.offset

    def at(self, sequence: int) -> State:
        try:
            return self.recording.at(sequence)
        except IndexError as error:
            raise SourceError(str(error)) from None

    def anchor(self, sequence: int) -> int:
        return self.recording.anchor(sequence)

    def starts(self) -> list[int]:
        return self.recording.starts()

    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        try:
            return self.recording.spans(kind, id)
        except LedgerError as error:
            raise SourceError(str(error)) from error

    def before(self, sequence: int) -> State | None:
        if sequence <= self.first:
            return self.recording.base()
        return self.at(sequence - 1)

    def tail(self, start: int | None = None) -> Tail:
        raise SourceError(f"{self.name} is a recording, it does not grow: follow a living ledger by its name")

    def close(self) -> None:
        self.recording.close()


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


def _ignore(done: int, total: int) -> None:
    """Nobody wants to see progress."""


def open_source(text: str, progress: Callable[[int, int], None] = _ignore) -> Source:
    """Open what the user named: the path of a ``.kvlog`` file, or the name of a ledger.

    Args:
        text: a path if there is such a file or it looks like one (a slash, or ``.kvlog`` at the end).
        progress: called with (done, total) while a recording is indexed for the first time, or a ledger replayed.

    Raises:
        SourceError: one line.
    """
    try:
        if "/" in text or text.endswith(".kvlog") or Path(text).is_file():
            return RecordedSource(text, progress)
        return LedgerSource(text, progress)
    except (InvalidName, LedgerNotFound):
        names = sorted(path.name.removesuffix(".control") for path in SHM.glob("*.control"))
        there = f"ledgers here: {', '.join(names)}" if names else "there is no ledger on this machine"
        raise SourceError(f"{text!r} is neither a .kvlog file nor a ledger; {there}") from None
    except LedgerError as error:
        raise SourceError(str(error)) from error
