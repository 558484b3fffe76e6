"""Replay: from the records of a log to the state they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from statemachine import codec
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.encoding import counters_digest, state_digest
from statemachine.errors import InvariantViolation
from statemachine.events import DigestScope, DigestTaken, Event
from statemachine.state import State


class Diverged(InvariantViolation):
    """The replay has another state than the engine had."""


class Record(Protocol):
    """What a replay needs of a log record (:class:`ipc.Record` has it)."""

    @property
    def sequence(self) -> int:
        """Number of the event."""
        ...

    @property
    def kind(self) -> int:
        """Kind of the event, see :data:`statemachine.events.KINDS`."""
        ...

    @property
    def subject(self) -> int:
        """See :mod:`statemachine.codec`, like ``args`` and ``payload``."""
        ...

    @property
    def args(self) -> bytes:
        """24 bytes."""
        ...

    @property
    def payload(self) -> bytes:
        """What follows the record's line."""
        ...


class Source(Protocol):
    """Where records come from: :class:`ipc.LogReader` or :class:`ipc.KvlogReader`."""

    def poll(self, limit: int = ...) -> Sequence[Record]:
        """The next records; none at the end."""
        ...


class Replayed(NamedTuple):
    """A state and how it came about."""

    state: State
    events: int
    checks: int
    """How often all invariants were checked."""
    digests: int
    """How many digests of the engine were compared."""


def event_of(record: Record) -> Event:
    """The event in a record. Raises :class:`statemachine.codec.CodecError`."""
    return codec.decode(record.kind, record.subject, record.args, record.payload)


class Replay:
    """A state that follows a log.

    Args:
        state: what the records continue; ``None``: they begin with the first event of a ledger.
        check_every: check all invariants after so many events; 0 = never.
    """

    def __init__(self, state: State | None = None, *, check_every: int = 0) -> None:
        self._state = state
        self._check_every = check_every
        self.events = 0
        """Events applied."""
        self.checks = 0
        """How often all invariants were checked."""
        self.digests = 0
        """How many digests of the engine were compared."""

    @property
    def state(self) -> State:
        """The state after the last event. Raises :class:`InvariantViolation` before the first one."""
        if self._state is None:
            raise InvariantViolation("there is no event in this log")
        return self._state

    def feed(self, records: Iterable[Record]) -> None:
        """Apply the next records.

        Raises:
            Diverged: a digest in the log is not the replay's.
            InvariantViolation: an event does not fit, or an invariant does not hold; the message names the event.
            statemachine.codec.CodecError: a record is no event.
        """
        state = self._state
        check_every = self._check_every
        for record in records:
            event = event_of(record)
            if state is None:
                state = self._state = genesis(event)
            else:
                apply(state, event)
            self.events += 1
            if type(event) is DigestTaken:
                self._compare(state, event, record.sequence)
            if check_every and not self.events % check_every:
                self.check(record.sequence)

    def _compare(self, state: State, event: DigestTaken, sequence: int) -> None:
        take = state_digest if event.scope == DigestScope.STATE else counters_digest
        if take(state) != event.digest:
            raise Diverged(f"event {sequence}: the replay has another digest than the engine had")
        self.digests += 1

    def check(self, sequence: int) -> None:
        """Check all invariants now. Raises :class:`InvariantViolation`, saying after which event."""
        broken = check(self.state)
        self.checks += 1
        if broken:
            raise InvariantViolation(f"after event {sequence}: " + "; ".join(broken))


def replay(source: Source, *, check_every: int = 0) -> Replayed:
    """Read a log from its first event to its end and apply everything.

    Args:
        source: positioned at the first event.
        check_every: check all invariants after so many events, and at the end; 0 = never.

    Raises:
        as :meth:`Replay.feed`.
    """
    run = Replay(check_every=check_every)
    while records := source.poll(10_000):
        run.feed(records)
    if check_every:
        run.check(run.events)
    return Replayed(run.state, run.events, run.checks, run.digests)
