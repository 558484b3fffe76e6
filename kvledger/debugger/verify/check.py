"""All invariants at every event of a log: the first violation, with the events around it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from kvledger.debugger.source.source import Entry, Source
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.check.incremental import IncrementalCheck
from statemachine.records.replay import MISFITS, misfit_text
from statemachine.records.snapshot import restore, snapshot
from statemachine.state.state import State

FULL_EVERY = 10_000
AROUND = 5


class Violation(NamedTuple):
    """The first event after which something is wrong, or that cannot be."""

    entry: Entry
    messages: list[str]
    """What the event contradicts, or each invariant that does not hold after it."""
    before: list[Entry]
    after: list[Entry]


class Checked(NamedTuple):
    """What a check found."""

    events: int
    full_checks: int
    """How often the whole state was checked; in between, what each event touched."""
    violation: Violation | None


def check_log(
    source: Source,
    start: int,
    stop: int,
    *,
    every_event_in_full: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Checked:
    """Apply every event and check all invariants after it, incrementally; in full every 10,000 events and at the end.

    Should a full check find what the incremental one did not, the stretch since the last full check is gone through
    again in full, event by event: so the event that is named is the first one, whichever way it is found.

    Raises:
        SourceError
    """
    state = source.before(start)
    incremental = IncrementalCheck(state) if state is not None else None
    recent: deque[Entry] = deque(maxlen=AROUND + 1)
    sound = snapshot(state) if state is not None else b""
    sound_at = start - 1
    events = full = 0
    for entry in source.entries(start, stop):
        events += 1
        recent.append(entry)
        try:
            if state is None:
                state = genesis(entry.event)
                incremental = IncrementalCheck(state)
                broken = check(state)
            else:
                assert incremental is not None
                apply(state, entry.event)
                broken = check(state) if every_event_in_full else incremental.after(entry.event)
        except MISFITS as error:
            return Checked(events, full, _violation(source, entry, [misfit_text(error)], recent))
        if broken:
            return Checked(events, full, _violation(source, entry, broken, recent))
        if not events % FULL_EVERY:
            full += 1
            assert incremental is not None
            if incremental.full():
                return Checked(events, full, _in_full(source, sound, sound_at + 1, entry.sequence))
            sound, sound_at = snapshot(state), entry.sequence
            progress(events, stop - start + 1)
    if recent and recent[-1].sequence > sound_at:  # the last event, at ``stop`` or where a damaged log ends
        full += 1
        assert incremental is not None
        if incremental.full():
            return Checked(events, full, _in_full(source, sound, sound_at + 1, recent[-1].sequence))
        progress(stop - start + 1, stop - start + 1)
    return Checked(events, incremental.full_checks if incremental is not None else 0, None)


def _in_full(source: Source, sound: bytes, start: int, stop: int) -> Violation:
    """The first violation of a stretch that is known to have one."""
    state: State | None = restore(sound, expect_sound=False) if sound else None
    recent: deque[Entry] = deque(maxlen=AROUND + 1)
    for entry in source.entries(start, stop):
        recent.append(entry)
        if state is None:
            state = genesis(entry.event)
        else:
            apply(state, entry.event)
        broken = check(state)
        if broken:
            return _violation(source, entry, broken, recent)
    raise AssertionError("a violation went away by itself")


def _violation(source: Source, entry: Entry, messages: list[str], recent: deque[Entry]) -> Violation:
    after = list(islice(source.entries(entry.sequence + 1), AROUND))
    return Violation(entry, messages, list(recent)[:-1], after)
