"""A log as the page asks for it: a summary, a timeline of any zoom, and windows of consecutive events.

A *window* is a picture of the state before its first event, and per event what it says and what it changed. The page
plays a window forwards and backwards by itself, so that a step costs nothing and works in an exported file as well.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from typing import Any

from kvledger.debugger import Entry, Source, SourceError
from kvledger.debugger.explain.wording import Wording
from kvledger.debugger.source.file import RecordedSource
from kvledger.debugger.source.source import Tail
from kvledger.recordings.timeline import ROW_EVENTS, Timeline
from kvledger.text import printable
from kvledger.view import answers
from kvledger.view.picture import Picture
from statemachine.events import KIND_OF, KINDS
from statemachine.records.replay import step
from statemachine.state.state import State

WINDOW = 256
"""Events in a window that the server sends."""
_KEPT_WINDOWS = 16
_BEYOND = 20
"""Events shown behind a contradiction."""
_EXACT = 10_000
"""A zoom into fewer events than this is replayed, not aggregated: well under half a second."""


class Log:
    """What the page can know of a source, which belongs to the caller. Not for two threads at once.

    Args:
        words: let the page ask for prompts' words.
    """

    def __init__(self, source: Source, *, words: bool = False) -> None:
        self._source = source
        self._words = words
        self._timeline: Timeline | None = None
        self._cursor: tuple[int, Picture] | None = None
        """A picture that can be continued, and after which event it is."""
        self._tail: Tail | None = None
        if not isinstance(source, RecordedSource):
            self._tail = source.tail()
        self._windows: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    @property
    def first(self) -> int:
        """The first event that can be shown. Raises :class:`SourceError` if there is none."""
        return self._source.first_state

    @property
    def last(self) -> int:
        """The last event that has a state."""
        return self._source.last_state

    def prepare(self) -> None:
        """Do at once what takes long the first time, so that the page opens quickly.

        Raises:
            SourceError: there is nothing to show.
        """
        first, last = self.first, self.last
        if last < first:
            why = self._source.contradiction or self._source.damage or "it is empty"
            raise SourceError(f"{self._source.name} holds no event that has a state: {why}")
        self._rows(last)

    def summary(self) -> dict[str, Any]:
        """What the page's frame shows."""
        source = self._source
        return {
            "name": printable(source.name),
            "first": self.first,
            "last": self.last,
            "live": self._tail is not None and self._tail.alive,
            "words": self._words,
            "window": WINDOW,
            "damage": printable(source.damage),
            "contradiction": printable(source.contradiction),
            "kinds": {number: kind.__name__ for number, kind in KINDS.items()},
        }

    def window(self, at: int) -> bytes:
        """The window that event ``at`` is in, as JSON.

        Raises:
            SourceError: there is no such event.
        """
        first, last = self.first, self.last
        if not first <= at <= last:
            raise SourceError(f"{self._source.name} has the events {first} to {last}, not {at}")
        start = max((at - 1) // WINDOW * WINDOW + 1, first)
        key = start, min(start + WINDOW - 1, last)
        found = self._windows.pop(key, None)
        if found is None:
            found = json.dumps(self.events(*key), separators=(",", ":")).encode()
        self._windows[key] = found
        if len(self._windows) > _KEPT_WINDOWS:
            self._windows.popitem(last=False)
        return found

    def events(self, start: int, stop: int) -> dict[str, Any]:
        """The window of the events ``start`` to ``stop``; ``beyond`` it, the first events that have no state."""
        entries = self._source.entries(start, stop)
        picture = None
        if self._cursor is not None and self._cursor[0] == start - 1:
            picture = self._cursor[1]
        self._cursor = None
        rows = []
        keyframe: dict[str, Any] = {}
        words: Wording | None = None
        for entry in entries:
            if picture is None:
                picture = Picture(self._before(entry))
            if words is None:
                words = Wording.after(picture.state)
                keyframe = picture.keyframe()
            rows.append(_row(entry, words, picture))
        assert picture is not None and words is not None
        self._cursor = stop, picture
        beyond: list[dict[str, Any]] = []
        if stop == self.last and self._source.contradiction:
            with contextlib.suppress(SourceError):  # a record that is no event
                beyond += (_said(entry, words) for entry in self._source.entries(stop + 1, stop + _BEYOND))
        return {"start": start, "keyframe": keyframe, "events": rows, "beyond": beyond}

    def _before(self, entry: Entry) -> State:
        state = self._source.before(entry.sequence)
        return step(None, entry.event) if state is None else state

    def explain(self, type: str, id: int, at: int) -> dict[str, Any]:
        """See :func:`kvledger.view.answers.explain`."""
        return answers.explain(self._source, type, id, at, words=self._words)

    def neighbour(self, type: str, id: int, at: int, *, forward: bool) -> int | None:
        """See :func:`kvledger.view.answers.neighbour`; only events that have a state."""
        found = answers.neighbour(self._source, type, id, at, forward=forward)
        return found if found is None or found <= self.last else None

    def find(self, text: str) -> dict[str, Any]:
        """See :func:`kvledger.view.answers.find`."""
        return answers.find(self._source, text)

    def words(self, run: int, at: int) -> list[list[int]]:
        """The content words of a run's blocks; negative ones stand for images and the like.

        Raises:
            SourceError: they are not to be shown, or there is no such run after event ``at``.
        """
        if not self._words:
            raise SourceError("prompts stay hidden: start kvledger view with --words to see token ids")
        state = self._source.at(at)
        node = state.nodes.get(run)
        if node is None:
            raise SourceError(f"there is no run {run} after event {at}")
        size = state.block_bytes
        return [list(memoryview(node.words[i : i + size]).cast("i")) for i in range(0, len(node.words), size)]

    def timeline(self, start: int, stop: int, buckets: int) -> dict[str, Any]:
        """The events ``start`` to ``stop`` in about so many buckets (:mod:`kvledger.recordings.timeline`)."""
        first, last = self.first, self.last
        start, stop = max(start, first), min(stop, last)
        if stop - start < _EXACT:
            return self._summed(start, stop, max((stop - start + 1) // buckets, 1)).buckets(start, stop, buckets)
        return self._rows(last).buckets(start, stop, buckets)

    def close(self) -> None:
        """Stop watching whether the ledger lives."""
        if self._tail is not None:
            self._tail.close()

    def _rows(self, last: int) -> Timeline:
        """The timeline up to event ``last``; that of a ledger grows by what was written since the last time."""
        if isinstance(self._source, RecordedSource):
            self._timeline = self._timeline or self._source.recording.timeline()
        elif self._timeline is None:
            self._timeline = self._summed(self.first, last, ROW_EVENTS)
        elif self._timeline.last < last:
            self._add(self._timeline, self._source.at(self._timeline.last), self._timeline.last + 1, last, ROW_EVENTS)
        return self._timeline

    def _summed(self, start: int, stop: int, row_events: int) -> Timeline:
        """A timeline of its own for some events."""
        state = self._source.before(start)
        timeline = Timeline(before=state)
        self._add(timeline, state, start, stop, row_events)
        return timeline

    def _add(self, timeline: Timeline, state: State | None, start: int, stop: int, row_events: int) -> None:
        kinds: list[int] = []
        for entry in self._source.entries(start, stop):
            state = step(state, entry.event)
            kinds.append(KIND_OF[type(entry.event)])
            if len(kinds) == row_events or entry.sequence == stop:
                timeline.add(entry.sequence, entry.time_ns, kinds, state)
                kinds = []


def _row(entry: Entry, words: Wording, picture: Picture) -> dict[str, Any]:
    """An event for the page: what it says, and what it changed."""
    return _said(entry, words) | picture.step(entry.event)


def _said(entry: Entry, words: Wording) -> dict[str, Any]:
    return {
        "n": entry.sequence,
        "t": entry.time_ns / 1e6,
        "s": entry.step,
        "k": KIND_OF[type(entry.event)],
        "text": printable(words(entry.event)),
    }
