"""A log command by command: each transaction with the state after it."""

from __future__ import annotations

from collections.abc import Iterator

from kvledger.debugger.source.source import Entry, Source
from statemachine.errors import Contradiction, InvariantViolation
from statemachine.records.replay import step
from statemachine.state.state import State


def advance(state: State | None, entry: Entry) -> State:
    """Apply an event to the state that it meets, in place; ``None``: it is the first of its ledger.

    Raises:
        Contradiction: it does not fit.
    """
    try:
        return step(state, entry.event)
    except InvariantViolation as error:
        raise Contradiction(entry.sequence, f"event {entry.sequence}: {error}") from error


def stepped(source: Source) -> Iterator[tuple[list[Entry], State]]:
    """Every transaction of a log and the state after it: one state that changes, not to be kept.

    Raises:
        SourceError: a record is no event, or the log begins where no state is known.
        Contradiction: an event contradicts the state that it meets.
    """
    state = source.before(source.first)
    for transaction in source.transactions(source.first):
        for entry in transaction:
            state = advance(state, entry)
        assert state is not None
        yield transaction, state
