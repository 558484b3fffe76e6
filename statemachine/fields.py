"""The fields of events, as their annotations tell them: how they travel, and what they mean.

Everything that treats events alike asks this table: the codec, what an event mentions, tables and JSON of events, what
a redacted recording leaves out. A new event needs no line in any of them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple, get_type_hints

from statemachine.events import KINDS, Event, Meaning


class Field(NamedTuple):
    """A field of an event."""

    name: str
    at: int
    """Its place in the event."""
    code: str
    """Letter of :mod:`array` or :mod:`struct`, ``"text"`` or ``"bytes"``."""
    fixed: bool
    """One number; else an array, a text or bytes."""
    meaning: Meaning | None
    enum: type[IntEnum] | None
    """Whose members its numbers are."""


def fields_of(event: type[Any]) -> list[Field]:
    """The fields of an event, or of another record that is annotated like one."""
    found = []
    hints = get_type_hints(event, include_extras=True)
    for at, name in enumerate(event._fields):
        code, *more = hints[name].__metadata__
        meaning = next((one for one in more if isinstance(one, Meaning)), None)
        enum = next((one for one in more if isinstance(one, type) and issubclass(one, IntEnum)), None)
        found.append(Field(name, at, code, hints[name].__origin__ is int, meaning, enum))
    return found


FIELDS: dict[type[Event], list[Field]] = {event: fields_of(event) for event in KINDS.values()}
"""Event → its fields, in order."""


def values_of(event: Event, meaning: Meaning) -> list[Any]:
    """What stands in the fields of an event that have this meaning."""
    return [event[field.at] for field in FIELDS[type(event)] if field.meaning == meaning]
