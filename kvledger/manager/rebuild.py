"""The state of a ledger whose engine is gone: the newest intact snapshot, or the first event, and what follows."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from ipc import Control, LogCorrupt, Overrun, Record, snapshots
from ipc.recovery import recover
from kvledger.errors import CannotContinue
from statemachine.events import KIND_OF, TransferStarted
from statemachine.records import codec
from statemachine.records.replay import Replay
from statemachine.records.snapshot import SnapshotError, restore
from statemachine.state.state import State

_STARTED = KIND_OF[TransferStarted]


class Rebuilt(NamedTuple):
    """What a dead engine leaves."""

    state: State
    last_sequence: int
    """Of the last event that counts."""
    started: dict[int, int]
    """Transfer in flight → the event that started it."""
    segment_bytes: int
    """Size of the last segment."""


def rebuild(control: Control) -> Rebuilt:
    """Replay a ledger; this process holds its lock.

    Raises:
        CannotContinue: the log has other events than this program, or none.
        ipc.LogCorrupt, ipc.Overrun: see :func:`ipc.recovery.recover`.
        InvariantViolation, codec.CodecError: an event does not fit: a defect, or damage that no checksum shows.
    """
    ledger = control.ledger
    if control.schema_hash != codec.SCHEMA_HASH:
        raise CannotContinue(f"ledger {ledger!r} has another event table: open it with the kvledger that wrote it")
    sequence, state = _newest_snapshot(ledger)
    replay = Replay(state)
    started: dict[int, int] = {}

    def feed(records: list[Record]) -> None:
        replay.feed(records)
        note(records)

    def note(records: list[Record]) -> None:
        started.update((record.subject, record.sequence) for record in records if record.kind == _STARTED)

    recovered = recover(ledger, sequence + 1, feed)
    if not recovered.last_sequence:
        raise CannotContinue(
            f"ledger {ledger!r} has no event, its engine died while it was created: remove it with "
            "kvledger segments --remove-dead, and create it anew"
        )
    state = replay.state
    if not state.transfers.keys() <= started.keys():  # older than the snapshot
        with contextlib.suppress(LogCorrupt):
            try:
                recover(ledger, 1, note)
            except Overrun as overrun:
                recover(ledger, overrun.available, note)
    in_flight = {id: started[id] for id in state.transfers if id in started}
    return Rebuilt(state, recovered.last_sequence, in_flight, recovered.capacity)


def _newest_snapshot(ledger: str) -> tuple[int, State | None]:
    found = snapshots.newest(ledger)
    while found is not None:
        sequence, data = found
        try:
            return sequence, restore(data)
        except SnapshotError:  # of another version
            found = snapshots.newest(ledger, at_or_before=sequence - 1)
    return 0, None
