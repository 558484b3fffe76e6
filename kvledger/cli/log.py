"""``kvledger log``."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer

from kvledger.cli.exits import FAILED
from kvledger.cli.interrupts import until_asked
from kvledger.cli.sources import (
    From,
    Json,
    Src,
    To,
    contradiction_of,
    note_contradiction,
    reading,
    span,
)
from kvledger.cli.terminal import flush, line, note
from kvledger.cli.tiers import TierName
from kvledger.debugger import Entry, Source, SourceError
from kvledger.debugger.explain.wording import Wording
from kvledger.debugger.export.plain import entry_fields
from kvledger.debugger.source.filters import Filter, kinds_named, request_number, request_numbers, select
from kvledger.debugger.source.hashes import find_hash
from kvledger.debugger.source.places import clock
from kvledger.debugger.source.steps import advance
from kvledger.text import printable_json
from statemachine.errors import Contradiction
from statemachine.events import Event, RequestMatched
from statemachine.state.state import State


def log(
    src: Src = None,
    begin: From = None,
    end: To = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only events of this kind (its name or the beginning)")] = None,
    block: Annotated[int | None, typer.Option(min=0, help="Only events that name this block")] = None,
    tier: Annotated[TierName | None, typer.Option(help="Only blocks of this tier")] = None,
    request: Annotated[str | None, typer.Option(help="Only events of this request: its name, or #NUMBER")] = None,
    node: Annotated[int | None, typer.Option(min=1, help="Only events that name this run")] = None,
    hash: Annotated[str | None, typer.Option(help="Only events that concern blocks with this content")] = None,
    transfer: Annotated[int | None, typer.Option(min=1, help="Only events of this transfer")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Only events of this rank's worker")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as events are written, until Ctrl-C")] = False,
    as_json: Json = False,
) -> None:
    """Show the events of a log, one line each."""
    with until_asked(follow), reading(src) as (source, report):
        start, stop = span(source, begin, end)
        if follow and (end is not None or hash is not None):
            raise SourceError("--follow goes on for ever: it goes with neither --to nor --hash")
        numbers: list[int] = []
        if request is not None and not follow:
            numbers = request_numbers(source, request)
        elif request is not None:
            numbers = _begun(source, request)
        wanted = Filter(
            start=start,
            stop=stop,
            kinds=kinds_named(kind or []),
            block=block,
            tier=tier.tier if tier is not None else None,
            request=request,
            numbers=tuple(numbers),
            node=node,
            transfer=transfer,
            rank=rank,
        )
        content = find_hash(source, hash, source.last_state, report).content if hash is not None else None
        show = _Line(source, start, as_json)
        if follow:
            _follow(source, wanted, show, source.first if begin is None else start)
            return
        entry = None
        for entry in select(source, wanted, content, show.learn):
            show(entry)
        if entry is None:
            note("no event matches")


def _begun(source: Source, request: str) -> list[int]:
    """The numbers that a request to be followed has so far; it may be yet to come."""
    if (number := request_number(request)) is not None:
        return [number]
    with suppress(SourceError):
        return request_numbers(source, request)
    return []


class _Line:
    """Prints events; it has to see all of them to know the names of requests, or only those that are wanted."""

    def __init__(self, source: Source, start: int, as_json: bool) -> None:
        self._json = as_json
        self._words = Wording()
        try:
            state = source.before(start) or source.at(source.first)
            self._words = Wording.after(state)
        except (SourceError, Contradiction):
            pass  # a log that has lost its beginning, or has no states here, still has events

    def learn(self, event: Event) -> None:
        """An event that is not shown."""
        self._words.learn(event)

    def __call__(self, entry: Entry) -> None:
        if self._json:
            line(printable_json(entry_fields(entry)))
            return
        text = self._words(entry.event)
        step = f"step {entry.step:<6}" if entry.step else ""
        line(f"{entry.sequence:>8}  {clock(entry.time_ns)}  {step}{type(entry.event).__name__:<17} {text}")


class _Watch:
    """Says of a log that is followed when it contradicts itself, once."""

    def __init__(self, source: Source, start: int) -> None:
        self._source = source
        self.contradiction = contradiction_of(source)
        """What has been said."""
        self._state: State | None = None
        self._knows = not self.contradiction
        with suppress(SourceError):
            self._state = source.before(start) if self._knows else None
            return
        self._knows = False  # a ledger that has lost its beginning

    def __call__(self, entry: Entry) -> None:
        if not self._knows:
            return
        try:
            self._state = advance(self._state, entry)
        except Contradiction as error:
            self._knows, self.contradiction = False, str(error)
            note_contradiction(self._source.name, entry.sequence - 1, self.contradiction)


def _follow(source: Source, wanted: Filter, show: _Line, start: int) -> None:
    watch = _Watch(source, start)
    try:
        _print_as_written(source, wanted, show, watch, start)
    finally:  # Ctrl-C too
        if watch.contradiction:
            raise typer.Exit(FAILED)


def _print_as_written(source: Source, wanted: Filter, show: _Line, watch: _Watch, start: int) -> None:
    tail = source.tail(start)
    numbers = list(wanted.numbers)
    try:
        while True:
            alive = tail.alive
            entries = tail.poll(0.25)
            for entry in entries:
                watch(entry)
                event = entry.event
                if isinstance(event, RequestMatched) and event.key == wanted.request:
                    numbers.append(event.request)
                    wanted = Filter(**{**wanted.__dict__, "numbers": tuple(numbers)})
                if wanted(event):
                    show(entry)
                else:
                    show.learn(event)
            flush()  # whoever reads from a pipe follows, too
            if not entries and not alive:
                return
    finally:
        tail.close()
