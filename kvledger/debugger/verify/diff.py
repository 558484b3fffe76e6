"""Where two logs part, and in what two states differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ipc import Record
from kvledger.debugger.explain.wording import count, ids
from kvledger.debugger.source.source import Entry, Source, SourceError
from statemachine.events import Event, Tier
from statemachine.records.replay import event_of
from statemachine.state.nodes import Node, Request, Transfer
from statemachine.state.order import EvictionOrder
from statemachine.state.places import Place
from statemachine.state.state import State


class Divergence(NamedTuple):
    """The first event that two logs do not share; ``None`` where one has ended."""

    sequence: int
    first: Entry | None
    second: Entry | None


def diverge(
    one: Source, other: Source, progress: Callable[[int, int], None] = lambda done, total: None
) -> Divergence | None:
    """The first event in which two logs differ, times and steps aside; ``None``: they are the same.

    Raises:
        SourceError: they have no events in common.
    """
    start = max(one.first, other.first)
    if start > min(one.last, other.last):
        raise SourceError(
            f"{one.name} holds the events {one.first} to {one.last}, {other.name} {other.first} to {other.last}: "
            "there is nothing to compare"
        )
    total = max(one.last, other.last)
    left, right = _flat(one, start), _flat(other, start)
    while True:
        a, b = next(left, None), next(right, None)
        if a is None and b is None:
            return None
        if a is None or b is None or a[2:3] + a[5:] != b[2:3] + b[5:]:
            sequence = (a or b).sequence  # type: ignore[union-attr]
            return Divergence(sequence, _entry(a), _entry(b))
        if not a.sequence % 8192:
            progress(a.sequence, total)


def _flat(source: Source, start: int) -> Iterator[Record]:
    for records in source.records(start):
        yield from records


def _entry(record: Record | None) -> Entry | None:
    return None if record is None else Entry(record.sequence, record.time_ns, record.step, event_of(record))


def fields_that_differ(one: Event, other: Event) -> list[str]:
    """Names and values of the fields in which two events of one kind differ."""
    if type(one) is not type(other):
        return [f"{type(one).__name__} on one side, {type(other).__name__} on the other"]
    return [
        f"{name}: {_short(a)} and {_short(b)}" for name, a, b in zip(one._fields, one, other, strict=True) if a != b
    ]


def _short(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes {value[:16].hex()}{'…' if len(value) > 16 else ''}"
    return repr(value) if isinstance(value, int | str) else f"[{ids(value)}]"


def differences(one: State, other: State) -> Iterator[str]:
    """What differs between two states, most telling first: blocks, requests, runs, transfers, orders, totals."""
    for tier in Tier:
        yield from _pool(one, other, tier)
    requests = {r.request_id: r for r in one.requests.values()}, {r.request_id: r for r in other.requests.values()}
    yield from _each("request", *requests, _request)
    yield from _each("run", one.nodes, other.nodes, _node)
    yield from _each("transfer", one.transfers, other.transfers, _transfer)
    for a, b in zip(one.places, other.places):
        yield from _place(a, b)
    plain = {name: (getattr(one, name), getattr(other, name)) for name in _SCALARS}
    plain |= {name: (value, other.counters.as_dict()[name]) for name, value in one.counters.as_dict().items()}
    for name, (a, b) in plain.items():
        if a != b:
            yield f"{name.replace('_', ' ')}: {a} and {b}"


_SCALARS = (
    *("next_request", "next_node", "next_transfer"),
    *("generation", "epoch", "workers", "weights", "opened"),
)


def _place(one: Place, other: Place) -> Iterator[str]:
    name = one.tier.name.lower()
    for a, b in zip(one.orders, other.orders):
        yield from _order("final" if a is not one.lru else f"{name} order", a, b)
    for field in ("evictable", "resident", "limit"):
        values = getattr(one, field), getattr(other, field)
        if values[0] != values[1]:
            yield f"{name} {field}: {values[0]} and {values[1]}"


def _pool(one: State, other: State, tier: Tier) -> Iterator[str]:
    a, b = one.pool(tier), other.pool(tier)
    name = tier.name.lower()
    if a.capacity != b.capacity:
        yield f"the {name} pool has {a.capacity} blocks and {b.capacity}"
    only = sorted(set(a.free) - set(b.free)), sorted(set(b.free) - set(a.free))
    for side, blocks in zip(("first", "second"), only):
        if blocks:
            yield f"{name} {'block' if len(blocks) == 1 else 'blocks'} {ids(blocks)}: free in the {side} only"
    if not any(only) and a.free != b.free:
        place = next(i for i, (x, y) in enumerate(zip(reversed(a.free), reversed(b.free))) if x != y)
        yield f"the {name} free lists hold the same blocks in another order, from the {place + 1}. to be granted on"


def _each(
    noun: str, one: dict[Any, Any], other: dict[Any, Any], compare: Callable[[Any, Any], list[str]]
) -> Iterator[str]:
    only = [key for key in one if key not in other], [key for key in other if key not in one]
    for side, keys in zip(("first", "second"), only):
        if keys:
            names = ", ".join(map(repr, keys[:8])) + " …" * (len(keys) > 8)
            yield f"{count(len(keys), noun)} in the {side} only: {names}"
    for key in one:
        if key in other:
            differing = compare(one[key], other[key])
            if differing:
                yield f"{noun} {key!r}: " + ", ".join(differing)


def _request(one: Request, other: Request) -> list[str]:
    differing = []
    if one.table != other.table:
        place = next((i for i, (a, b) in enumerate(zip(one.table, other.table)) if a != b), None)
        if place is None:
            differing.append(f"block tables of {len(one.table)} and {len(other.table)} blocks")
        else:
            differing.append(
                f"position {place} of its block table is block {one.table[place]} and {other.table[place]}"
            )
    if (one.leaf.id, one.leaf.end) != (other.leaf.id, other.leaf.end):
        differing.append(
            f"its path ends in run {one.leaf.id} ({one.leaf.end} blocks) and {other.leaf.id} ({other.leaf.end})"
        )
    names = ("number", "namespace", "words", "matched", "computed", "waits_for")
    differing += _simple(one, other, (*names, "duplicate_ranges", "joined_ranges", "replaced_ranges"))
    return differing


def _node(one: Node, other: Node) -> list[str]:
    above = [0 if node.parent is None else node.parent.id for node in (one, other)]
    differing = _simple(one, other, ("start", "size", "pins", "words", "uncomputed", "distrusted", "hits"))
    for tier, mine, its in zip(Tier, one.copies, other.copies):
        copies = [None if copy is None else (copy.ids, copy.ready) for copy in (mine, its)]
        if copies[0] != copies[1]:
            texts = ["nothing" if c is None else f"[{ids(c[0])}]{'' if c[1] else ' (arriving)'}" for c in copies]
            differing.append(f"{tier.name.lower()} {texts[0]} and {texts[1]}")
    return differing if above[0] == above[1] else [f"below run {above[0]} and {above[1]}", *differing]


def _transfer(one: Transfer, other: Transfer) -> list[str]:
    names = ("direction", "sources", "targets", "waits_for", "held_sources", "held_targets", "quarantined")
    differing = _simple(one, other, names)
    if list(one.waiters) != list(other.waiters):
        differing.append(f"requests {list(one.waiters)} and {list(other.waiters)} wait")
    return differing


def _simple(one: Any, other: Any, names: tuple[str, ...]) -> list[str]:
    differing = []
    for name in names:
        a, b = getattr(one, name), getattr(other, name)
        if a != b:
            differing.append(f"{name.replace('_', ' ')} {_value(a)} and {_value(b)}")
    return differing


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return _short(value)
    if value is None or isinstance(value, int | str | dict):
        return str(value)
    return f"[{ids(value)}]" if not value or isinstance(value[0], int) else str(value)


def _order(name: str, one: EvictionOrder, other: EvictionOrder) -> Iterator[str]:
    a, b = [node.id for node in one], [node.id for node in other]
    if a != b:
        place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        sides = " and ".join(f"run {order[place]}" if place < len(order) else "nothing" for order in (a, b))
        yield f"{name.replace('_', ' ')}: the {place + 1}. to be evicted is {sides}"
