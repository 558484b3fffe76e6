"""Replay: from the records of a log to the state they add up to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ipc import Record
from statemachine import codec
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.encoding import counters_digest, state_digest
from statemachine.errors import InvariantViolation
from statemachine.events import DigestScope, DigestTaken, Event
from statemachine.state import State


class Diverged(InvariantViolation):
    """The replay has another state than the engine had."""


class Source(Protocol):
    """Where records come from: :class:`ipc.LogReader` or :class:`ipc.KvlogReader`."""

    def poll(self, limit: int = ...) -> list[Record]:
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
    return codec.decode(record.kind, record.subject, record.args[: codec.ARGS_BYTES], record.payload)


def replay(source: Source, *, check_every: int = 0) -> Replayed:
    """Read a log from its first event to its end and apply everything.

    Args:
        source: positioned at the first event.
        check_every: check all invariants after so many events, and at the end; 0 = never.

    Raises:
        Diverged: a digest in the log is not the replay's.
        InvariantViolation: an event does not fit, or an invariant does not hold.
    """
    state: State | None = None
    events = checks = digests = 0
    while records := source.poll(10_000):
        for record in records:
            event = event_of(record)
            if state is None:
                state = genesis(event)
            else:
                apply(state, event)
            events += 1
            if isinstance(event, DigestTaken):
                take = state_digest if event.scope == DigestScope.STATE else counters_digest
                if take(state) != event.digest:
                    raise Diverged(f"event {record.sequence}: the replay has another digest than the engine had")
                digests += 1
            if check_every and not events % check_every:
                _check(state, record.sequence)
                checks += 1
    if state is None:
        raise InvariantViolation("there is no event in this log")
    if check_every:
        _check(state, events)
        checks += 1
    return Replayed(state, events, checks, digests)


def _check(state: State, sequence: int) -> None:
    broken = check(state)
    if broken:
        raise InvariantViolation(f"after event {sequence}: " + "; ".join(map(str, broken)))
