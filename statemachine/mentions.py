"""What an event mentions: blocks by tier, requests, runs and transfers. Filters, histories and indexes ask this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from statemachine.events import ROUTES, Event, Meaning, Tier
from statemachine.fields import FIELDS, Field

_NONE: tuple[int, ...] = ()
_END = {Meaning.SOURCES: 0, Meaning.TARGETS: 1}


class Mentions(NamedTuple):
    """Ids that stand in an event; 0 where it names no run or request."""

    device: Sequence[int] = _NONE
    host: Sequence[int] = _NONE
    requests: Sequence[int] = _NONE
    nodes: Sequence[int] = _NONE
    transfers: Sequence[int] = _NONE


def mentions(event: Event) -> Mentions:
    """The ids in an event."""
    return FINDERS[type(event)](event)


def _ids(fields: list[Field], meaning: Meaning) -> Callable[[Any], Sequence[int]] | None:
    """What finds the ids of one meaning in an event, as they stand there; ``None``: there are none."""
    single = [field.at for field in fields if field.meaning == meaning and field.fixed]
    arrays = [field.at for field in fields if field.meaning == meaning and not field.fixed]
    if not single and len(arrays) < 2:
        return (lambda event: event[arrays[0]]) if arrays else None
    if not arrays:
        return lambda event: [event[index] for index in single]
    return lambda event: [id for index in arrays for id in event[index]] + [event[index] for index in single]


def _blocks(fields: list[Field]) -> Callable[[Any, list[Sequence[int]]], None] | None:
    """What puts the block ids of an event into the sequences of their tiers; ``None``: there are none."""
    kinds = {field.enum.__name__: field.at for field in fields if field.enum is not None}
    device = [field.at for field in fields if field.meaning == Meaning.DEVICE_BLOCKS]
    named = [field.at for field in fields if field.meaning == Meaning.BLOCKS_OF_TIER]
    ends = [(field.at, _END[field.meaning]) for field in fields if field.meaning in _END]
    if device:
        index, *more = device
        if more:
            return lambda event, found: found.__setitem__(0, [id for each in device for id in event[each]])
        return lambda event, found: found.__setitem__(0, event[index])
    if named:
        (index,), tier = named, kinds["Tier"]
        return lambda event, found: found.__setitem__(event[tier], event[index])
    if ends:
        direction = kinds["Direction"]

        def moved(event: Any, found: list[Sequence[int]]) -> None:
            route = ROUTES[event[direction]]
            for index, end in ends:
                found[route[end]] = event[index]

        return moved
    return None


def _finder(fields: list[Field]) -> Callable[[Any], Mentions]:
    blocks = _blocks(fields)
    meanings = (Meaning.REQUESTS, Meaning.RUNS, Meaning.TRANSFERS)
    requests, nodes, transfers = (_ids(fields, meaning) for meaning in meanings)

    def find(event: Any) -> Mentions:
        found: list[Sequence[int]] = [_NONE] * len(Tier)
        if blocks is not None:
            blocks(event, found)
        return Mentions(
            found[0],
            found[1],
            requests(event) if requests is not None else _NONE,
            nodes(event) if nodes is not None else _NONE,
            transfers(event) if transfers is not None else _NONE,
        )

    return find


FINDERS: dict[type[Any], Callable[[Any], Mentions]] = {event: _finder(fields) for event, fields in FIELDS.items()}
