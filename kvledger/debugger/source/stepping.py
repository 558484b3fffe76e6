"""A log command by command: each transaction with the state after it."""

from __future__ import annotations

from collections.abc import Iterator

from kvledger.debugger.source.source import Entry, Source
from statemachine.apply import apply, genesis
from statemachine.errors import Contradiction
from statemachine.records.replay import MISFITS, said
from statemachine.state.state import State


def stepped(source: Source) -> Iterator[tuple[list[Entry], State]]:
    """Every transaction of a log and the state after it: one state that changes, not to be kept.

    Raises:
        SourceError: a record is no event, or the log begins where no state is known.
        Contradiction: an event contradicts the state that it meets.
    """
    state = source.before(source.first)
    for transaction in source.transactions(source.first):
        for entry in transaction:
            try:
                if state is None:
                    state = genesis(entry.event)
                else:
                    apply(state, entry.event)
            except MISFITS as error:
                raise Contradiction(entry.sequence, f"event {entry.sequence}: {said(error)}") from error
        assert state is not None
        yield transaction, state
