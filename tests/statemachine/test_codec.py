"""Events travel through log records unchanged, and damaged records are refused."""

from __future__ import annotations

from array import array
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statemachine.events import KIND_OF, KINDS, Event
from statemachine.records.codec import ARGS_BYTES, CodecError, decode, encode

_LIMITS = {"B": 2**8 - 1, "I": 2**32 - 1, "Q": 2**64 - 1}


def _field(hint: Any) -> st.SearchStrategy[Any]:
    code = hint.__metadata__[0]
    if hint.__origin__ is int:
        return st.integers(0, _LIMITS[code])
    if code == "bytes":
        return st.binary(max_size=40)
    if code == "text":
        return st.text(st.characters(codec="utf-8"), max_size=20)
    limit = 2**31 - 1 if code == "i" else _LIMITS[code]
    return st.lists(st.integers(0, limit), max_size=12).map(lambda values: array(code, values))


def _event(kind: type[Event]) -> st.SearchStrategy[Event]:
    hints = get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: _field(hints[name]) for name in kind._fields})


EVENTS: st.SearchStrategy[Event] = st.one_of([_event(kind) for kind in KINDS.values()])


@given(EVENTS)
def test_round_trip(event: Event) -> None:
    kind, subject, args, payload = encode(event)
    assert len(args) <= ARGS_BYTES
    again = decode(kind, subject, args.ljust(ARGS_BYTES, b"\0"), payload)
    assert again == event and type(again) is type(event)


@given(EVENTS, st.data())
def test_truncated_and_flipped_payloads_are_refused_or_another_event(event: Event, data: st.DataObject) -> None:
    kind, subject, args, payload = encode(event)
    if payload:
        cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
        try:
            other: Event | None = decode(kind, subject, args, cut)
        except CodecError:
            other = None
        assert other != event
    flipped = bytearray(args)
    if flipped:
        flipped[data.draw(st.integers(0, len(args) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            other = decode(kind, subject, bytes(flipped), payload)
        except CodecError:
            other = None
        assert other != event


def test_unknown_kind() -> None:
    with pytest.raises(CodecError, match="another version"):
        decode(max(KINDS) + 1, 0, b"", b"")


def test_every_kind_has_one_number() -> None:
    assert len(KINDS) == len(KIND_OF) and 0 not in KINDS and max(KINDS) < 64
