"""Replay: from the records of a log to the state they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.errors import Contradiction, Diverged, InvariantViolation
from statemachine.events import DigestScope, DigestTaken, Event
from statemachine.records import codec
from statemachine.records.snapshot import counters_digest, state_digest
from statemachine.state.state import State

MISFITS = (AssertionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What ``apply`` or the codec raise when a log is not one of a sound state machine."""


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
        """See :mod:`statemachine.records.codec`, like ``args`` and ``payload``."""
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

    def poll(self, limit: int) -> Sequence[Record]:
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
    """The event in a record. Raises :class:`statemachine.records.codec.CodecError`."""
    return codec.decode(record.kind, record.subject, record.args, record.payload)


def misfit_text(error: BaseException) -> str:
    """Put the reason of a misfit in one line. An error that nobody meant for people is named by its class."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, InvariantViolation | codec.CodecError) else f"{type(error).__name__}: {text}"


def step(state: State | None, event: Event) -> State:
    """The state after one more event: made from the first one of a ledger, changed in place by all others.

    Raises:
        InvariantViolation: the event does not fit, whichever way that showed.
    """
    try:
        if state is None:
            return genesis(event)
        apply(state, event)
        return state
    except InvariantViolation:
        raise
    except MISFITS as error:
        raise InvariantViolation(misfit_text(error)) from error


class Replay:
    """A state that follows a log.

    Args:
        state: what the records continue; ``None``: they begin with the first event of a ledger.
        check_every: check all invariants after so many events; 0 = never.
        compare: compare the digests that the engine wrote; without it a log replays beyond a wrong one.
        watch: called with each event and the state after it.
    """

    def __init__(
        self,
        state: State | None = None,
        *,
        check_every: int = 0,
        compare: bool = True,
        watch: Callable[[Event, State], None] | None = None,
    ) -> None:
        self._state = state
        self._watch = watch
        self._check_every = check_every
        self._compare_digests = compare
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
            Contradiction: a record is no event, an event does not fit, or an invariant does not hold.
        """
        state = self._state
        check_every, watch = self._check_every, self._watch
        record = None
        try:
            for record in records:
                event = event_of(record)
                state = self._state = step(state, event)
                self.events += 1
                if watch is not None:
                    watch(event, state)
                if type(event) is DigestTaken and self._compare_digests:
                    self._compare(state, event, record.sequence)
                if check_every and not self.events % check_every:
                    self.check(record.sequence)
        except Contradiction:
            raise
        except MISFITS as error:
            assert record is not None
            raise Contradiction(record.sequence, f"event {record.sequence}: {misfit_text(error)}") from error

    def _compare(self, state: State, event: DigestTaken, sequence: int) -> None:
        take = state_digest if event.scope == DigestScope.STATE else counters_digest
        if take(state) != event.digest:
            raise Diverged(sequence, f"event {sequence}: the replay has another digest than the engine had")
        self.digests += 1

    def check(self, sequence: int) -> None:
        """Check all invariants now. Raises :class:`Contradiction`, saying after which event."""
        broken = check(self.state)
        self.checks += 1
        if broken:
            raise Contradiction(sequence, f"after event {sequence}: " + "; ".join(broken))


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
