"""Events to log records and back: ``(kind, subject, args, payload)``.

Everything follows from the annotations in :mod:`statemachine.events`. Fixed-size fields, then the byte length of every
variable field but the last, are packed little-endian: the first 24 bytes travel in the record's line (``args``), the
rest opens the payload. The variable fields follow in order.

Both directions are straight-line functions compiled from the table when this module is imported, one pair per event
(as ``dataclasses`` and ``namedtuple`` make theirs): a loop over fields took twice as long.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import xxhash

from statemachine.events import KINDS, Event
from statemachine.fields import FIELDS, fields_of

ARGS_BYTES = 24

Encoded = tuple[int, int, bytes, bytes, bytes]
"""``(kind, subject, args, head, tail)``: the payload is head + tail. Content words that end an event are the tail, so
that writing an event copies them once."""


class CodecError(ValueError):
    """A record is not a well-formed event of this schema."""


def encode(event: Event) -> tuple[int, int, bytes, bytes]:
    """Turn an event into ``(kind, subject, args, payload)``; ``args`` has at most 24 bytes."""
    kind, subject, args, head, tail = ENCODERS[type(event)](event)
    return kind, subject, args, head + tail


def decode(kind: int, subject: int, args: bytes, payload: bytes) -> Event:
    """Turn a record back into its event.

    Raises:
        CodecError: the kind is unknown, or lengths and contents do not agree.
    """
    decoder = DECODERS.get(kind)
    if decoder is None:
        raise CodecError(f"unknown event kind {kind}: the log was written by another version of kvledger")
    try:
        return decoder(subject, args, payload)
    except (struct.error, ValueError) as error:
        raise CodecError(f"malformed {KINDS[kind].__name__}: {error}") from error


def _compile(kind: int, event: type[Event]) -> tuple[Callable[[Any], Encoded], Callable[[int, bytes, bytes], Event]]:
    fields = fields_of(event)
    subject = fields[0].name if fields[0].fixed and fields[0].code == "Q" else ""
    packed = [(field.name, field.code) for field in fields if field.fixed and field.name != subject]
    variable = [(field.name, field.code) for field in fields if not field.fixed]
    head = struct.Struct("<" + "".join(code for _, code in packed) + "I" * max(len(variable) - 1, 0))
    fixed_names = [name for name, _ in packed]
    spill = max(head.size - ARGS_BYTES, 0)  # so much of the fixed part opens the payload
    text = [
        *_encoder(event, kind, subject, fixed_names, variable, spill),
        *_decoder(event, subject, fixed_names, variable, spill, head.size),
    ]
    space: dict[str, Any] = {
        "pack": head.pack,
        "unpack": head.unpack,
        "join": b"".join,
        "array": array,
        "new": tuple.__new__,
        "event_type": event,
    }
    exec("\n".join(text), space)
    return space["encode"], space["decode"]


def _encoder(
    event: type[Event], kind: int, subject: str, fixed: list[str], variable: list[tuple[str, str]], spill: int
) -> Iterator[str]:
    yield "def encode(event):"
    yield f"    ({', '.join(event._fields)},) = event"
    for name, code in variable:
        if code == "text":
            yield f"    {name} = {name}.encode()"
    lengths = [
        f"len({name})" if code in ("bytes", "text") else f"{array(code).itemsize} * len({name})"
        for name, code in variable[:-1]
    ]
    yield f"    head = pack({', '.join(fixed + lengths)})"
    parts = ["head[24:]"] * bool(spill) + [name for name, _ in variable]
    tail = parts.pop() if variable and variable[-1][1] == "bytes" else "b''"
    payload = f"join(({', '.join(parts)},))" if parts else "b''"
    yield f"    return {kind}, {subject or 0}, head[:24], {payload}, {tail}"


def _decoder(
    event: type[Event], subject: str, fixed: list[str], variable: list[tuple[str, str]], spill: int, size: int
) -> Iterator[str]:
    lengths = [f"length_of_{name}" for name, _ in variable[:-1]]
    yield "def decode(subject, args, payload):"
    yield f"    ({''.join(f'{name}, ' for name in fixed + lengths)}) = unpack(args[:{size}] + payload[:{spill}])"
    values = {subject: "subject"}
    start = f"{spill}"
    for index, (name, code) in enumerate(variable):
        stop = ""
        if index < len(lengths):
            stop = f"end_of_{name}"
            yield f"    {stop} = {start} + {lengths[index]}"
        piece = f"payload[{start}:{stop}]"
        values[name] = {"bytes": piece, "text": f"str({piece}, 'utf-8')"}.get(code, f"array({code!r}, {piece})")
        start = stop or start
    # Lengths are not negative and the last field takes what is left, so one comparison covers all of them.
    yield f"    if len(payload) {'<' if variable else '!='} {start}:"
    yield "        raise ValueError('the lengths do not fit the payload')"
    yield f"    return new(event_type, ({''.join(f'{values.get(name, name)}, ' for name in event._fields)}))"


def decoder_of(event: type[Any]) -> Callable[[int, bytes, bytes], Any]:
    """The decoder of an event that is not in the table any more (:mod:`statemachine.records.upcast`)."""
    return _compile(0, event)[1]


def codec_of(
    kind: int, event: type[Any]
) -> tuple[Callable[[Any], tuple[int, int, bytes, bytes]], Callable[[int, bytes, bytes], Any]]:
    """Encoder and decoder of a record of another log than the ledger's own, annotated as events are."""
    encoder, decoder = _compile(kind, event)

    def encode_it(record: Any) -> tuple[int, int, bytes, bytes]:
        kind, subject, args, head, tail = encoder(record)
        return kind, subject, args, head + tail

    return encode_it, decoder


_CODECS = {kind: _compile(kind, event) for kind, event in KINDS.items()}
ENCODERS: dict[type[Event], Callable[[Any], Encoded]] = {KINDS[kind]: pair[0] for kind, pair in _CODECS.items()}
DECODERS: dict[int, Callable[[int, bytes, bytes], Event]] = {kind: pair[1] for kind, pair in _CODECS.items()}


def _describe() -> str:
    lines = []
    for kind, event in KINDS.items():
        fields = " ".join(f"{field.name}:{'' if field.fixed else '*'}{field.code}" for field in FIELDS[event])
        lines.append(f"{kind} {event.__name__} {fields}")
    return "\n".join(lines)


SCHEMA_HASH: int = xxhash.xxh3_64_intdigest(_describe().encode())
"""Hash of the whole event table: two programs that agree on it read each other's logs."""
