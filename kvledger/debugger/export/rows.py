"""Events as rows of one table: a column for every field that an event can have."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from kvledger.debugger.source.source import Entry, Source
from statemachine.events import (
    KINDS,
    DigestScope,
    Direction,
    Event,
    EvictReason,
    HostPolicy,
    Outcome,
    ReleaseReason,
    Tier,
)

ENUMS: dict[str, dict[str, type[IntEnum]]] = {
    "LedgerOpened": {"host_policy": HostPolicy},
    "RequestReleased": {"reason": ReleaseReason},
    "BlocksEvicted": {"tier": Tier, "reason": EvictReason},
    "TransferStarted": {"direction": Direction},
    "TransferFinished": {"outcome": Outcome},
    "PoolResized": {"tier": Tier},
    "TierLost": {"tier": Tier},
    "DigestTaken": {"scope": DigestScope},
}
"""Fields that are numbers in the log and names here."""
RENAMED = {
    ("PoolResized", "blocks"): "capacity",
    ("DigestTaken", "sequence"): "digest_sequence",
    ("BlocksComputed", "blocks"): "computed_blocks",
}
"""Fields whose name means something else in other events, or beside all of them."""
_TYPES = {"B": "u32", "I": "u32", "Q": "u64", "text": "text", "bytes": "hex"}
_LISTS = {"i": "list<i32>", "I": "list<u32>", "Q": "list<u64>"}


class Column(NamedTuple):
    """A column of the table."""

    name: str
    type: str
    """``u32``, ``u64``, ``i64``, ``text``, or ``list<...>`` of ``i32``, ``u32`` or ``u64``."""


class _Field(NamedTuple):
    name: str
    column: Column
    enum: type[IntEnum] | None


def _fields(event: type[Event]) -> list[_Field]:
    hints = get_type_hints(event, include_extras=True)
    enums = ENUMS.get(event.__name__, {})
    found = []
    for name in event._fields:
        code = hints[name].__metadata__[0]
        column = RENAMED.get((event.__name__, name), name)
        if name in enums:
            type = "text"
        elif name == "words":
            type = "list<i32>"
        elif hints[name].__origin__ is int or code in ("text", "bytes"):
            type = _TYPES[code]
        else:
            type = _LISTS[code]
        found.append(_Field(name, Column(column, "text" if type == "hex" else type), enums.get(name)))
    return found


_FIELDS: dict[type[Any], list[_Field]] = {event: _fields(event) for event in KINDS.values()}


def _columns() -> list[Column]:
    always = [
        Column("sequence", "u64"),
        Column("transaction", "u64"),
        Column("time_ns", "i64"),
        Column("step", "u32"),
        Column("kind", "text"),
    ]
    columns = {column.name: column for column in always}
    for event in KINDS.values():
        for _, column, _ in _FIELDS[event]:
            if column in always or columns.setdefault(column.name, column).type != column.type:
                raise TypeError(f"{event.__name__}.{column.name} needs a column of its own: see RENAMED")
    return list(columns.values())


COLUMNS: list[Column] = _columns()
"""All columns. ``transaction`` is the sequence of the first event of the transaction, ``kind`` the event's name."""


def row(entry: Entry, transaction: int, *, words: bool) -> dict[str, Any]:
    """The columns that an event has. ``words``: with the content words, which are what users wrote."""
    event = entry.event
    values: dict[str, Any] = {
        "sequence": entry.sequence,
        "transaction": transaction,
        "time_ns": entry.time_ns,
        "step": entry.step,
        "kind": type(event).__name__,
    }
    value: Any
    for (name, column, enum), value in zip(_FIELDS[type(event)], event):
        if name == "words":
            if words:
                values["words"] = np.frombuffer(value, "<i4").tolist()
        elif enum is not None:
            values[column.name] = enum(value).name
        elif isinstance(value, bytes):
            values[column.name] = value.hex()
        elif column.type.startswith("list"):
            values[column.name] = value.tolist()
        else:
            values[column.name] = value
    return values


def rows(source: Source, *, words: bool) -> Iterator[dict[str, Any]]:
    """Every event of a log as a row."""
    for transaction in source.transactions(source.first):
        for entry in transaction:
            yield row(entry, transaction[0].sequence, words=words)
