"""What an engine did with its blocks, held against its ledger: mistakes that leave a sound log.

The marks (:mod:`kvledger.manager.marks`) say what was written and read; the log says what was granted, ready and
published by then. Every mistake is told once per request and kind, the first time.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvledger.debugger.explain.wording import count, ids, listed
from kvledger.debugger.source.source import Entry, Source, SourceError
from kvledger.manager.marks import CALLS, FORMAT
from statemachine.events import (
    BlocksCached,
    BlocksComputed,
    BlocksTrimmed,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
)
from statemachine.mentions import mentions
from statemachine.state.nodes import Request
from statemachine.state.state import State


class Mark(NamedTuple):
    """One line of a file of marks."""

    what: str
    """``computed``, ``read``, or the name of a call."""
    sequence: int
    """The last event by then."""
    step: int
    values: list[Any]
    by: str


class Mistake(NamedTuple):
    """Something that the engine did and should not have done."""

    kind: str
    """``not ready``, ``not in the table``, ``old table``, ``shared``, ``released``, ``not computed``."""
    sequence: int
    """The event that it is about; of what was computed or read: the last one by then."""
    step: int
    request: str
    blocks: list[int]
    text: str
    by: str
    """Thread, call sites and batch row, as far as known."""


def read_marks(path: Path, ledger: str) -> Iterator[Mark]:
    """The marks in a file, in their order. The end of a line that its writer could not finish is left out.

    Raises:
        SourceError: it is no file of marks, or of another ledger.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        heads = [json.loads(line) for line in lines[:1]]
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is no file of marks: {error}") from error
    if not heads or not isinstance(heads[0], list) or heads[0][:1] != [FORMAT]:
        raise SourceError(f"{path} is no file of marks: write one with kvledger.Marks")
    if ledger and heads[0][1:] != [ledger]:
        raise SourceError(f"{path} is about ledger {heads[0][1:]}, not {ledger}")
    for number, line in enumerate(lines[1:], 2):
        try:
            what, sequence, step, *values, by = json.loads(line)
            if type(sequence) is not int or type(step) is not int or type(by) is not str:
                raise ValueError("event and step have to be numbers, and who called a text")
            if not _fits(what, values):
                raise ValueError(f"{what!r} cannot have the values {values!r:.200}")
        except (ValueError, TypeError, RecursionError) as error:
            raise SourceError(f"{path}, line {number}: {error}") from error
        yield Mark(what, sequence, step, values, by)


def _fits(what: Any, values: list[Any]) -> bool:
    """Whether these are the values of such a mark."""
    if what in CALLS:
        return (
            len(values) == 1 and type(values[0]) is list and not any(type(name) in (list, dict) for name in values[0])
        )
    if len(values) != {"computed": 5, "read": 3}.get(what, 0) or type(values[0]) is not str:
        return False
    *places, blocks, row = values[1:]
    return type(blocks) is list and all(type(number) is int for number in (*places, *blocks, row))


def check_engine(
    source: Source, marks: Iterator[Mark], stop: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Mistake]:
    """What the engine did wrong up to event ``stop``, in the order of the log.

    Raises:
        SourceError, Contradiction
    """
    engine = _Engine()
    ahead = next(marks, None)
    for entry, state in source.replay(None, stop):
        engine.event(state, entry)
        while ahead is not None and ahead.sequence <= entry.sequence:
            if ahead.sequence == entry.sequence:
                engine.mark(state, ahead)
            ahead = next(marks, None)
        if not entry.sequence % 1000:
            progress(entry.sequence, stop)
    return engine.found


class _Former(NamedTuple):
    """A block table before its last change."""

    table: array[int]
    sequence: int


class _Engine:
    def __init__(self) -> None:
        self.found: list[Mistake] = []
        self._told: set[tuple[str, str]] = set()
        self._reach: dict[int, int] = {}
        """By request that began under these eyes: so many leading tokens are cached for it, or written."""
        self._tables: dict[int, array[int]] = {}
        self._former: dict[int, _Former] = {}
        self._ended: dict[str, Entry] = {}
        self._names: dict[int, str] = {}
        self._calls: dict[tuple[str, str], str] = {}
        """Who last made a call about a request."""

    def event(self, state: State, entry: Entry) -> None:
        """An event, and the state after it."""
        event = entry.event
        size = state.opened.block_size
        for number in {*mentions(event).requests} - {0}:
            request = state.requests.get(number)
            if request is not None:
                self._changed(request, entry.sequence)
        match event:
            case RequestMatched():
                self._names[event.request] = event.key
                self._ended.pop(event.key, None)
                self._reach[event.request] = state.requests[event.request].leaf.end * size
            case RequestExtended() if event.request in self._reach:
                end = state.requests[event.request].leaf.end * size
                self._reach[event.request] = max(self._reach[event.request], end)
            case BlocksTrimmed() if event.request in self._reach:
                room = len(state.requests[event.request].table) * size
                self._reach[event.request] = min(self._reach[event.request], room)
            case BlocksCached() | BlocksComputed() if event.request in self._reach:
                self._claimed(state.requests[event.request], entry, size)
            case RequestReleased():
                self._tables.pop(event.request, None)
                self._former.pop(event.request, None)
                self._reach.pop(event.request, None)
                self._ended[self._names.pop(event.request, "")] = entry

    def _changed(self, request: Request, sequence: int) -> None:
        before = self._tables.get(request.number)
        if before is None or before != request.table:
            if before is not None and request.table[: len(before)] != before:
                self._former[request.number] = _Former(before, sequence)
            self._tables[request.number] = request.table[:]

    def _claimed(self, request: Request, entry: Entry, size: int) -> None:
        """A request says that blocks are computed: they have to have been written."""
        claimed = min(request.leaf.end, request.computed)
        written = self._reach[request.number] // size
        if claimed <= written:
            return
        self._reach[request.number] = claimed * size
        blocks = list(request.table[written:claimed])
        text = (
            f"publishes device blocks {ids(blocks)}, {_positions(written, claimed)} of its block table: "
            f"nothing was computed there, only its first {count(written, 'block')} are"
        )
        by = self._calls.get(("commit", request.request_id)) or self._calls.get(("cache", request.request_id), "")
        self._tell("not computed", entry.sequence, entry.step, request.request_id, blocks, text, by)

    def mark(self, state: State, mark: Mark) -> None:
        """What the engine says of itself, and the state by then."""
        if mark.what not in ("computed", "read"):
            for name in mark.values[0]:
                self._calls[mark.what, name] = mark.by
            return
        name, row = mark.values[0], mark.values[-1]
        by = mark.by + (f", row {row}" if row >= 0 else "")
        writes = mark.what == "computed"
        start, stop = (mark.values[1], mark.values[2]) if writes else (0, 0)
        blocks: list[int] = mark.values[-2]
        does = "writes to" if writes else "reads"
        number = state.numbers.get(name)
        size = state.opened.block_size

        def tell(kind: str, text: str, these: list[int]) -> None:
            self._tell(kind, mark.sequence, mark.step, name, these, f"{does} device blocks {ids(these)} {text}", by)

        if number is None:
            tell("released", self._end_of(name), blocks)
            return
        request = state.requests[number]
        first = start // size
        expected = request.table[first : -(-stop // size)] if writes else request.table[: len(blocks)]
        self._compare(request, first, blocks, list(expected), tell)
        last = (-(-stop // size) if writes else len(blocks)) - 1
        waits = {transfer: position for transfer, position in request.waits_for.items() if last >= position}
        if waits:
            names = listed(str(transfer) for transfer in sorted(waits))
            ended = f"transfers {names} have" if len(waits) > 1 else f"transfer {names} has"
            these = blocks[max(min(waits.values()) - first, 0) :]
            tell("not ready", f"before {ended} ended, for which it waits", these)
        if writes:
            self._written(request, first, start, stop, size, blocks, tell)

    def _compare(
        self, request: Request, first: int, blocks: list[int], expected: list[int], tell: Callable[..., None]
    ) -> None:
        pairs = itertools.zip_longest(blocks, expected)
        wrong = [
            (first + index, given, right)
            for index, (given, right) in enumerate(pairs)
            if given is not None and given != right
        ]
        if not wrong:
            return
        former = self._former.get(request.number)
        old = former is not None and all(list(former.table[place : place + 1]) == [given] for place, given, _ in wrong)
        right = listed(str(place) for place, _, _ in wrong[:3]) + (" and more" if len(wrong) > 3 else "")
        where = f"at position {right} of its block table, where "
        where += f"{ids([block for _, _, block in wrong if block is not None])} stands"
        given = [block for _, block, _ in wrong]
        if old and former is not None:
            tell("old table", f"{where} since event {former.sequence}: its table is older than that", given)
        else:
            tell("not in the table", where, given)

    def _written(
        self,
        request: Request,
        first: int,
        start: int,
        stop: int,
        size: int,
        blocks: list[int],
        tell: Callable[..., None],
    ) -> None:
        own = {place for begin, end in request.duplicate_ranges for place in range(begin, end)}
        firm = min(request.leaf.end, request.computed)
        shared = [
            block for place, block in enumerate(blocks, first) if place < firm and place not in own and start < stop
        ]
        if shared:
            tell("shared", "which are cached: whoever finds them there reads what is written now", shared)
        reach = self._reach.get(request.number)
        if reach is not None and start <= reach:
            self._reach[request.number] = max(reach, stop)

    def _end_of(self, name: str) -> str:
        ended = self._ended.get(name)
        if ended is None or not isinstance(ended.event, RequestReleased):
            return "for a request that there is not"
        reason = ReleaseReason(ended.event.reason).name.lower().replace("_", " ")
        by = self._calls.get(("release", name))
        return f"after it was released at event {ended.sequence} ({reason})" + (f" by {by}" if by else "")

    def _tell(self, kind: str, sequence: int, step: int, name: str, blocks: list[int], text: str, by: str) -> None:
        if (kind, name) not in self._told:
            self._told.add((kind, name))
            self.found.append(Mistake(kind, sequence, step, name, blocks, f"request {name!r} {text}", by))


def _positions(start: int, stop: int) -> str:
    return f"position {start}" if stop == start + 1 else f"positions {start} to {stop - 1}"
