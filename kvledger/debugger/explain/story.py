"""Telling a story backwards: facts about one subject, stretch by stretch from the newest on, until there are enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvledger.debugger.source.source import Entry, Source
from statemachine.apply import apply, genesis
from statemachine.events import (
    Event,
)
from statemachine.records.replay import MISFITS, misfit_text
from statemachine.state.state import State


class Fact(NamedTuple):
    """One step of a history."""

    sequence: int
    time_ns: int
    step: int
    text: str


class Explanation(NamedTuple):
    """What is now, and how it came about."""

    subject: str
    at: int
    now: list[str]
    history: list[Fact]
    """Oldest first."""
    omitted: str
    """What the history leaves out; empty if it is complete."""


class Story:
    """Tells facts about one subject, event by event."""

    complete = False
    """Whether nothing before what has been told is of interest."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def spans(self) -> list[tuple[int, int]]:
        """The stretches that may hold facts, ascending; asked again before each, from the newest on backwards."""
        raise NotImplementedError

    def begin(self, state: State | None) -> None:
        """A stretch begins with this state."""

    def before(self, state: State, event: Event) -> None:
        """The event is about to be applied."""

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        """The event has been applied; ``purpose`` is what its transaction is for. Empty: it is of no interest."""
        raise NotImplementedError


def backwards(source: Source, subject: str, now: list[str], story: Story, at: int, most: int) -> Explanation:
    """Tell stretch after stretch from the newest on, until the story is complete or long enough."""
    facts: list[Fact] = []
    start = at + 1
    while spans := [span for span in story.spans() if span[0] < start]:
        if len(facts) > most or story.complete:
            break
        start, last = spans[-1]
        facts = [*_tell(source, story, start, min(last, at)), *facts]
    told = facts[-most:]
    left_out = len(facts) > most or (spans and told)
    omitted = f"older facts are left out: explain it --at {told[0].sequence - 1}" if left_out else ""
    return Explanation(subject, at, now, told, omitted)


def _tell(source: Source, story: Story, first: int, last: int) -> Iterator[Fact]:
    state = source.before(first)
    story.begin(state)
    for transaction in source.transactions(first):
        purpose = transaction[-1].event
        for entry in transaction:
            if entry.sequence > last:
                return
            event = entry.event
            try:
                if state is None:
                    state = genesis(event)
                else:
                    story.before(state, event)
                    apply(state, event)
            except MISFITS as error:
                yield Fact(entry.sequence, entry.time_ns, entry.step, f"contradicts the state: {misfit_text(error)}")
                return
            text = story.after(state, entry, purpose)
            if text:
                yield Fact(entry.sequence, entry.time_ns, entry.step, text)
        if transaction[-1].sequence >= last:
            return
