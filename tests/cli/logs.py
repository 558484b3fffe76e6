"""Logs whose every text was chosen by somebody who means ill, sound and broken, as a recording and as a ledger."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_type_hints

from examples.garbled.engine import Engine
from ipc import KvlogWriter, LogWriter, Record
from ipc.ownership import remove_objects
from kvledger.debugger import open_source
from statemachine.apply import apply, genesis
from statemachine.events import BlocksCached, DigestScope, DigestTaken, Event, HostPolicy
from statemachine.records import codec
from statemachine.records.snapshot import counters_digest, state_digest
from tests.data.generate import drive

HOSTILE = (
    "job\x1b]0;owned\x07\x1b[2J\n\rforged: 0 blocks of its own\x9b31m\x7f\u202egnp.\u2066\u2028\x85"
    "[bold red]loud[/bold red][/]:smile:\\[x]"
)
"""Sets the title, clears the screen, begins lines of its own (four ways), reverses text, and is unclosed markup."""
LOUD = "[bold red]loud[/bold red][/]:smile:\\"
"""What has to be seen of it as it is."""


def every_event(text: Callable[[str], str]) -> list[list[Event]]:
    """Transactions with every kind of event, each text in them (names, namespaces, reasons) changed by ``text``."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "every.kvlog"
        engine = Engine(path, 14, 10, 5, HostPolicy.EXCLUSIVE, backup_after=2)
        drive(engine, random.Random(1))
        engine.close()
        with open_source(str(path)) as source:
            transactions = [[entry.event for entry in entries] for entries in source.transactions()]
    return [[_changed(event, text) for event in events] for events in transactions]


def _changed(event: Event, text: Callable[[str], str]) -> Event:
    hints = get_type_hints(type(event))
    values = dict(zip(event._fields, event))
    for name, value in values.items():
        if hints[name] is str and name != "groups":  # that is a description, and has to be one
            values[name] = text(value)
        elif name == "namespace" and value:
            values[name] = text(value.hex()).encode()
    changed = type(event)(**values)
    return changed


def records_of(transactions: list[list[Event]]) -> list[list[Record]]:
    """The transactions as records; digests are those of the states that the events really lead to."""
    from ipc.record import TXN_BEGIN, TXN_END

    state = None
    sequence = 0
    found: list[list[Record]] = []
    for number, events in enumerate(transactions):
        records = []
        for index, event in enumerate(events):
            if isinstance(event, DigestTaken) and state is not None:
                take = state_digest if event.scope == DigestScope.STATE else counters_digest
                event = event._replace(digest=take(state))
            try:
                if state is None:
                    state = genesis(event)
                else:
                    apply(state, event)
            except Exception:
                pass  # the log is to contradict itself here
            sequence += 1
            flags = TXN_BEGIN * (not index) | TXN_END * (index == len(events) - 1)
            kind, subject, args, payload = codec.encode(event)
            time_ns = 1_767_265_200 * 10**9 + sequence * 1_000_000
            args = args.ljust(codec.ARGS_BYTES, b"\0")
            records.append(Record(sequence, time_ns, kind, flags, number, subject, args, payload))
        found.append(records)
    return found


def broken(transactions: list[list[Event]]) -> list[list[Event]]:
    """The same log up to the middle, and then something is published from a block that the request does not have."""
    place = next(
        number
        for number, events in enumerate(transactions)
        if number > len(transactions) // 2 and any(isinstance(event, BlocksCached) and event.blocks for event in events)
    )
    wrong = [
        event._replace(blocks=array("i", [13 - block for block in event.blocks]))
        if isinstance(event, BlocksCached) and event.blocks
        else event
        for event in transactions[place]
    ]
    return [*transactions[:place], wrong, *transactions[place + 1 :]]


def write_recording(path: Path, transactions: list[list[Event]]) -> None:
    """Write a ``.kvlog`` file."""
    writer = KvlogWriter(path, schema_hash=codec.SCHEMA_HASH)
    for records in records_of(transactions):
        writer.write(records)
    writer.close()


@contextmanager
def living_ledger(name: str, transactions: list[list[Event]]) -> Iterator[LogWriter]:
    """A ledger in shared memory with this log, whose engine is this process; removed at the end."""
    writer = LogWriter.create(name, schema_hash=codec.SCHEMA_HASH, segment_bytes=1 << 20)
    try:
        for records in records_of(transactions):
            writer.append([(record.kind, record.subject, record.args, record.payload) for record in records])
        yield writer
    finally:
        writer.close(unlink=True)
        remove_objects(name)  # what an auditor leaves
