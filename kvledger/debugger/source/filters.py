"""Which events of a log one wants to see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvledger.debugger.source.hashes import Content
from kvledger.debugger.source.source import Entry, Source, SourceError
from kvledger.recordings.postings import key_number
from statemachine.events import KINDS, AllocationRefused, Event, RequestMatched, Tier, WorkerJoined, WorkerLost
from statemachine.mentions import mentions


def kinds_named(names: list[str]) -> frozenset[type[Event]]:
    """Kinds of events by their names, in any case, whole or the beginning.

    Raises:
        SourceError: there is no such kind; the message lists them.
    """
    found = set()
    for name in names:
        matching = [kind for kind in KINDS.values() if kind.__name__.lower().startswith(name.lower())]
        if not name or not matching:
            there = ", ".join(kind.__name__ for kind in KINDS.values())
            raise SourceError(f"there is no kind of event {name!r}; there are {there}")
        found.update(matching)
    return frozenset(found)


def request_number(text: str) -> int | None:
    """The number in ``#12``; ``None``: it is a name."""
    return int(text[1:]) if text.startswith("#") and text[1:].isdecimal() else None


def request_numbers(source: Source, text: str, stop: int | None = None) -> list[int]:
    """Numbers of the requests of that name, oldest first; ``#12`` is the number itself.

    Raises:
        SourceError: no request of that name begins in the log (up to ``stop``), or there has been none of that number.
    """
    if (number := request_number(text)) is not None:
        at = source.last_state if stop is None else stop
        try:
            begun = source.at(at).next_request - 1
        except SourceError:  # a ledger that was cut, and of which no state is known
            return [number]
        if not 0 < number <= begun:
            raise SourceError(f"no request {text} has begun up to event {at}; there were {begun}")
        return [number]
    numbers = [
        entry.event.request
        for first, last in source.spans("key", key_number(text))
        for entry in source.entries(first, last if stop is None else min(last, stop))
        if isinstance(entry.event, RequestMatched) and entry.event.key == text
    ]
    before = source.before(source.first)
    if before is not None and text in before.numbers:
        numbers.insert(0, before.numbers[text])
    if not numbers:
        until = "" if stop is None else f" up to event {stop}"
        raise SourceError(f"no request {text!r} begins in {source.name}{until}; a request's number is written #12")
    return numbers


@dataclass(frozen=True, kw_only=True)
class Filter:
    """What an event has to mention; everything that is set must hold."""

    start: int | None = None
    stop: int | None = None
    kinds: frozenset[type[Event]] = frozenset()
    block: int | None = None
    tier: Tier | None = None
    """With ``block``: on that tier only. Alone: any block of that tier."""
    request: str | None = None
    numbers: tuple[int, ...] = field(default=())
    """Numbers of the requests named ``request``."""
    node: int | None = None
    transfer: int | None = None
    rank: int | None = None

    def __call__(self, event: Event) -> bool:
        """Whether an event is wanted."""
        if self.kinds and type(event) not in self.kinds:
            return False
        if self.rank is not None and not (isinstance(event, WorkerJoined | WorkerLost) and event.rank == self.rank):
            return False
        found = mentions(event)
        if self.block is not None or self.tier is not None:
            on = [
                ids for tier, ids in ((Tier.DEVICE, found.device), (Tier.HOST, found.host)) if self.tier in (None, tier)
            ]
            if not any(ids if self.block is None else self.block in ids for ids in on):
                return False
        if self.request is not None:
            refused = isinstance(event, AllocationRefused) and event.key == self.request
            if not refused and not any(number in found.requests for number in self.numbers):
                return False
        if self.node is not None and self.node not in found.nodes:
            return False
        return self.transfer is None or self.transfer in found.transfers

    def spans(self, source: Source) -> list[tuple[int, int]]:
        """The stretches of a log that have to be read."""
        first = source.first if self.start is None else max(self.start, source.first)
        last = source.last if self.stop is None else self.stop
        found = [(first, last)]
        if self.block is not None:
            tiers = [self.tier] if self.tier is not None else list(Tier)
            found = _both(found, [s for t in tiers for s in source.spans("host" if t else "device", self.block)])
        if self.request is not None:
            spans = [span for number in self.numbers for span in source.spans("request", number)]
            found = _both(found, [*spans, *source.spans("key", key_number(self.request))])
        if self.node is not None:
            found = _both(found, source.spans("node", self.node))
        if self.transfer is not None:
            found = _both(found, source.spans("transfer", self.transfer))
        return _both(found, source.intact())


def _both(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two lists of stretches share, ascending."""
    shared = {(max(a, c), min(b, d)) for a, b in some for c, d in set(others)}
    return sorted((first, last) for first, last in shared if first <= last)


def select(
    source: Source,
    wanted: Filter,
    content: Content | None = None,
    passed: Callable[[Event], None] = lambda event: None,
) -> Iterator[Entry]:
    """The events of a log that are wanted, in order.

    Args:
        content: only those that concern a block which holds it.
        passed: called with those that are read and not wanted.

    Raises:
        SourceError
    """
    for first, last in wanted.spans(source):
        if content is None:
            for entry in source.entries(first, last):
                if wanted(entry.event):
                    yield entry
                else:
                    passed(entry.event)
        else:
            for entry in content.concerned(source, first, last):
                if wanted(entry.event):
                    yield entry
