"""Events as rows of one table: a column for every field that an event can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kvledger.debugger.source.source import Entry, Source
from statemachine.events import KINDS, Event, Meaning
from statemachine.fields import FIELDS, Field

RENAMED = {
    ("PoolResized", "blocks"): "capacity",
    ("DigestTaken", "sequence"): "digest_sequence",
    ("BlocksComputed", "blocks"): "computed_blocks",
}
"""Fields whose name means something else in other events, or beside all of them."""
_TEXTS = ("text", "bytes")
_TYPES = {"B": "u32", "I": "u32", "Q": "u64", "text": "text", "bytes": "text"}
_LISTS = {"i": "list<i32>", "I": "list<u32>", "Q": "list<u64>"}


class Column(NamedTuple):
    """A column of the table."""

    name: str
    type: str
    """``u32``, ``u64``, ``i64``, ``text``, or ``list<...>`` of ``i32``, ``u32`` or ``u64``."""


def _column(event: type[Event], field: Field) -> Column:
    name = RENAMED.get((event.__name__, field.name), field.name)
    if field.enum is not None:
        return Column(name, "text")
    if field.meaning == Meaning.CONTENT:
        return Column(name, "list<i32>")
    return Column(name, _TYPES[field.code] if field.fixed or field.code in _TEXTS else _LISTS[field.code])


_COLUMNS: dict[type[Any], list[tuple[Field, Column]]] = {
    event: [(field, _column(event, field)) for field in fields] for event, fields in FIELDS.items()
}


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
        for _, column in _COLUMNS[event]:
            if column in always or columns.setdefault(column.name, column).type != column.type:
                raise TypeError(f"{event.__name__}.{column.name} needs a column of its own: see RENAMED")
    return list(columns.values())


COLUMNS: list[Column] = _columns()
"""All columns. ``transaction`` is the sequence of the first event of the same call, ``kind`` the event's name."""


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
    for (field, column), value in zip(_COLUMNS[type(event)], event):
        if field.meaning == Meaning.CONTENT:
            if words:
                values[column.name] = np.frombuffer(value, "<i4").tolist()
        elif field.meaning == Meaning.ITEMS:  # hashes of what users sent
            if words:
                values[column.name] = value.hex()
        elif field.enum is not None:
            values[column.name] = field.enum(value).name
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
