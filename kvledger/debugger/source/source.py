"""A log to be debugged, wherever it comes from: its events, its states, and its end as it grows.

What a source offers is said here; :mod:`.file` and :mod:`.ledger` are the two kinds that exist.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from ipc import (
    Record,
)
from ipc.record import CALL_BEGIN, TXN_BEGIN, TXN_END
from kvledger.recordings.postings import Kind
from statemachine.apply import apply, genesis
from statemachine.errors import Contradiction
from statemachine.events import Event
from statemachine.records import codec
from statemachine.records.replay import MISFITS, event_of, misfit_text
from statemachine.state.state import State


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
                raise Contradiction(entry.sequence, f"event {entry.sequence}: {misfit_text(error)}") from error
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
