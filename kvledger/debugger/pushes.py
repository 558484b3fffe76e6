"""What a prefill instance is pushing to decode instances, and how it ended: its log of pushes in words."""

from __future__ import annotations

from typing import NamedTuple

from ipc import LedgerError, LogReader
from kvledger.debugger.source.source import SourceError
from kvledger.handoff.peer import read_from_the_oldest
from statemachine.events import Outcome
from statemachine.records.codec import CodecError
from workers.handoff.pushes import SCHEMA_HASH, PushFinished, PushStarted, fact_of, log_name


class Push(NamedTuple):
    """One push."""

    push: int
    request: str
    to: str
    """Ledger of the decode instance."""
    blocks: int
    step: int
    """Of the engine, that writes the last of these blocks; 0: all were written."""
    started_ns: int
    seconds: float | None
    """From the order to the end; ``None``: it is under way."""
    outcome: str
    """``""`` while it is under way."""
    reason: str


def pushes(ledger: str) -> list[Push]:
    """The pushes that the log of pushes still knows, oldest first.

    Raises:
        SourceError: no sender runs on this ledger, or its log cannot be read.
    """
    try:
        reader = read_from_the_oldest(log_name(ledger), "pushes")
    except LedgerError as error:
        raise SourceError(f"no sender runs on ledger {ledger!r}: {error}") from error
    try:
        if reader.schema_hash != SCHEMA_HASH:
            raise SourceError(f"the sender of {ledger!r} runs another version of kvledger")
        return _read(reader)
    except (LedgerError, CodecError) as error:
        raise SourceError(f"the log of pushes of {ledger!r} cannot be read: {error}") from error
    finally:
        reader.close()


def _read(reader: LogReader) -> list[Push]:
    found: dict[int, Push] = {}
    while records := reader.poll():
        for record in records:
            fact = fact_of(record)
            if isinstance(fact, PushStarted):
                found[fact.push] = Push(
                    fact.push, fact.key, fact.peer, len(fact.targets), fact.step, record.time_ns, None, "", ""
                )
            elif isinstance(fact, PushFinished) and fact.push in found:
                push = found[fact.push]
                seconds = (record.time_ns - push.started_ns) / 1e9
                outcome = Outcome(fact.outcome).name.lower()
                found[fact.push] = push._replace(seconds=seconds, outcome=outcome, reason=fact.reason)
    return list(found.values())
