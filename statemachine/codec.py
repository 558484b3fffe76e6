"""Events to log records and back: ``(kind, subject, args, payload)``.

Everything follows from the annotations in :mod:`statemachine.events`. Fixed-size fields, then the byte length of every
variable field but the last, are packed little-endian: the first 24 bytes travel in the record's line (``args``), the
rest opens the payload. The variable fields follow in order.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import xxhash

from statemachine.events import KIND_OF, KINDS, Event, IntArray

ARGS_BYTES = 24
_ARRAYS = {"i": 4, "I": 4, "Q": 8}
_WRITERS: dict[str, Callable[[Any], bytes]] = {"bytes": bytes, "text": str.encode}


class CodecError(ValueError):
    """A record is not a well-formed event of this schema."""


class _Plan(NamedTuple):
    kind: int
    event: type[Event]
    subject: bool
    scalars: tuple[int, ...]
    variables: tuple[tuple[int, str], ...]
    writers: tuple[tuple[int, Callable[[Any], bytes]], ...]
    """How each variable field becomes bytes."""
    head: struct.Struct


def _plan(kind: int, event: type[Event]) -> _Plan:
    hints = get_type_hints(event, include_extras=True)
    codes = [hints[name].__metadata__[0] for name in event._fields]
    subject = codes[0] == "Q" and _is_scalar(hints[event._fields[0]])
    scalars = tuple(i for i, code in enumerate(codes) if code in "BIQ" and _is_scalar(hints[event._fields[i]]))
    variables = tuple((i, code) for i, code in enumerate(codes) if i not in scalars)
    packed = scalars[1:] if subject else scalars
    lengths = max(len(variables) - 1, 0)
    head = struct.Struct("<" + "".join(codes[i] for i in packed) + "I" * lengths)
    writers = tuple((i, _WRITERS.get(code, IntArray.tobytes)) for i, code in variables)
    return _Plan(kind, event, subject, packed, variables, writers, head)


def _is_scalar(hint: Any) -> bool:
    return bool(hint.__origin__ is int)


_PLANS: dict[type[Event], _Plan] = {event: _plan(kind, event) for kind, event in KINDS.items()}
_BY_KIND: dict[int, _Plan] = {plan.kind: plan for plan in _PLANS.values()}


def encode(event: Event) -> tuple[int, int, bytes, bytes]:
    """Turn an event into ``(kind, subject, args, payload)``; ``args`` has at most 24 bytes."""
    plan = _PLANS[type(event)]
    parts = [convert(event[i]) for i, convert in plan.writers]
    head = plan.head.pack(*[event[i] for i in plan.scalars], *map(len, parts[:-1]))
    if len(head) > ARGS_BYTES:
        parts.insert(0, head[ARGS_BYTES:])
        head = head[:ARGS_BYTES]
    subject: Any = event[0] if plan.subject else 0
    return plan.kind, subject, head, b"".join(parts)


def decode(kind: int, subject: int, args: bytes, payload: bytes) -> Event:
    """Turn a record back into its event.

    Raises:
        CodecError: the kind is unknown, or lengths and contents do not agree.
    """
    plan = _BY_KIND.get(kind)
    if plan is None:
        raise CodecError(f"unknown event kind {kind}: the log was written by another version of kvledger")
    try:
        return _decode(plan, subject, args, payload)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise CodecError(f"malformed {plan.event.__name__}: {error}") from error


def _decode(plan: _Plan, subject: int, args: bytes, payload: bytes) -> Event:
    size = plan.head.size
    start = max(size - ARGS_BYTES, 0)
    head = args[:size] + payload[:start] if start else args[:size]
    values = plan.head.unpack(head)
    fields: list[Any] = [None] * len(plan.event._fields)
    if plan.subject:
        fields[0] = subject
    for i, value in zip(plan.scalars, values, strict=False):
        fields[i] = value
    lengths = values[len(plan.scalars) :]
    for position, (i, code) in enumerate(plan.variables):
        stop = start + lengths[position] if position < len(lengths) else len(payload)
        if not start <= stop <= len(payload):
            raise ValueError("a field ends outside the payload")
        fields[i] = _field(code, payload[start:stop])
        start = stop
    if start != len(payload):
        raise ValueError("bytes left over")
    make: Callable[[list[Any]], Event] = plan.event._make
    return make(fields)


def _field(code: str, data: bytes) -> object:
    if code == "bytes":
        return data
    if code == "text":
        return data.decode()
    if len(data) % _ARRAYS[code]:
        raise ValueError("an array ends inside an element")
    return array(code, data)


def _describe() -> str:
    lines = []
    for kind, event in KINDS.items():
        hints = get_type_hints(event, include_extras=True)
        fields = " ".join(
            f"{name}:{'' if _is_scalar(hints[name]) else '*'}{hints[name].__metadata__[0]}" for name in event._fields
        )
        lines.append(f"{kind} {event.__name__} {fields}")
    return "\n".join(lines)


SCHEMA_HASH: int = xxhash.xxh3_64_intdigest(_describe().encode())
"""Hash of the whole event table: two programs that agree on it read each other's logs."""

__all__ = ["ARGS_BYTES", "KIND_OF", "SCHEMA_HASH", "CodecError", "decode", "encode"]
