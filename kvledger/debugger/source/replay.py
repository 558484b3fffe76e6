"""Replaying a log at two levels: its events into states, and its commands into decisions again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvledger.debugger.source.source import Entry, Source
from statemachine.apply import apply, genesis
from statemachine.commands import Command
from statemachine.decide.derive import NoCommand, is_step_of_resize, redecide
from statemachine.errors import Contradiction
from statemachine.events import DigestScope, DigestTaken, Event, LedgerOpened, PoolResized
from statemachine.records.replay import MISFITS, misfit_text
from statemachine.records.snapshot import counters_digest, state_digest
from statemachine.state.state import State

Progress = Callable[[int, int], None]


def _silent(done: int, total: int) -> None: ...


class Digest(NamedTuple):
    """A digest that the engine wrote, and the replay's."""

    sequence: int
    """Of the ``DigestTaken`` event."""
    scope: DigestScope
    recorded: bytes
    replayed: bytes
    own: bool = False
    """The engine wrote none here: this is the replay's, of the last state."""

    @property
    def equal(self) -> bool:
        """Whether they agree."""
        return self.recorded == self.replayed


def evolve(source: Source, start: int, stop: int, progress: Progress = _silent) -> Iterator[Digest]:
    """Apply every event and compare each digest in the log. The last one is the replay's own, of the final state.

    Digests of an earlier version, which meant something else, are passed over.

    Raises:
        Contradiction: an event contradicts the state that it meets.
    """
    state: State | None = None
    reached = 0
    for entry, now in source.replay(start, stop):
        state, reached = now, entry.sequence
        event = entry.event
        if isinstance(event, DigestTaken) and source.digests_comparable:
            take = state_digest if event.scope == DigestScope.STATE else counters_digest
            yield Digest(entry.sequence, DigestScope(event.scope), event.digest, take(now))
        if not entry.sequence % 4096:
            progress(entry.sequence - start, stop - start)
    if state is not None:
        digest = state_digest(state)
        yield Digest(reached, DigestScope.STATE, digest, digest, True)


def next_resize(source: Source, sequence: int) -> PoolResized | None:
    """The first ``PoolResized`` after an event."""
    found = (entry.event for entry in source.entries(sequence + 1) if isinstance(entry.event, PoolResized))
    return next(found, None)


class Decision(NamedTuple):
    """A transaction, and what today's ``decide`` makes of the command behind it."""

    entries: list[Entry]
    command: Command | None
    """``None``: no command of this version comes to such events."""
    events: list[Event]
    """What is decided today."""
    rejected: str
    """Why nothing is; empty if something is."""

    @property
    def same(self) -> bool:
        """Whether today's decision is the recorded one."""
        return [entry.event for entry in self.entries] == self.events


def decisions(source: Source, start: int, stop: int, progress: Progress = _silent) -> Iterator[Decision]:
    """Every transaction with today's decision, as long as the log agrees with the state machine.

    Raises:
        Contradiction: an event contradicts the state that it meets.
    """
    state = source.before(start)
    for entries in source.transactions(start, stop):
        events = [entry.event for entry in entries]
        if state is None:
            assert isinstance(events[0], LedgerOpened)
            state = genesis(events[0])
            continue
        try:
            resized = next_resize(source, entries[-1].sequence) if is_step_of_resize(events) else None
            command, decided, rejected = redecide(events, state, resized)
            yield Decision(entries, command, decided, rejected)
        except NoCommand as error:
            yield Decision(entries, None, [], str(error))
        for entry in entries:
            try:
                apply(state, entry.event)
            except MISFITS as error:
                raise Contradiction(entry.sequence, f"event {entry.sequence}: {misfit_text(error)}") from error
            if not entry.sequence % 4096:
                progress(entry.sequence - start, stop - start)
