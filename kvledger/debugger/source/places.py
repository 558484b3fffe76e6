"""Places in a log as people name them: a sequence number, a time, a scheduler step."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, time

from kvledger.debugger.source.source import Entry, Source, SourceError

_NS = 10**9


def clock(time_ns: int) -> str:
    """Time of day in UTC, with microseconds."""
    return f"{datetime.fromtimestamp(time_ns // _NS, UTC):%H:%M:%S}.{time_ns % _NS // 1000:06}"


def date(time_ns: int) -> str:
    """Date and time in UTC."""
    return f"{datetime.fromtimestamp(time_ns // _NS, UTC):%Y-%m-%d} {clock(time_ns)}"


def locate(source: Source, text: str) -> int:
    """The event that a place means: the last one at or before it.

    Args:
        text: a sequence number; ``step:N``; a time of day (UTC, on the day of the first event), or a whole ISO 8601
            date and time (UTC unless it says otherwise).

    Raises:
        SourceError: it is none of these, or outside of the log.
    """
    first, last = source.first, source.last
    if text.isdecimal():
        sequence = int(text)
        if not first <= sequence <= last:
            raise SourceError(f"{source.name} holds the events {first} to {last}, not {sequence}")
        return sequence
    if text.startswith("step:"):
        if not text[5:].isdecimal():
            raise SourceError(f"{text!r} is no step: write step:12")
        return _search(source, int(text[5:]), lambda entry: entry.step, f"step {text[5:]}", lambda e: f"step {e.step}")
    moment = _moment(source, text)
    return _search(source, moment, lambda entry: entry.time_ns, text, lambda entry: date(entry.time_ns))


def _moment(source: Source, text: str) -> int:
    try:
        if "-" in text or "T" in text:
            moment = datetime.fromisoformat(text)
        else:
            begun = next(source.entries()).time_ns
            moment = datetime.combine(datetime.fromtimestamp(begun // _NS, UTC), time.fromisoformat(text))
    except ValueError:
        raise SourceError(
            f"{text!r} is no place in a log: give an event's number, step:N, or a time like 14:05:09.5 (UTC)"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    whole = moment.replace(microsecond=0)
    return int(whole.timestamp()) * _NS + moment.microsecond * 1000


def _search(source: Source, wanted: int, key: Callable[[Entry], int], name: str, say: Callable[[Entry], str]) -> int:
    """The last event whose ``key``, which never decreases, is at most ``wanted``: which stretch, then which event."""
    starts = source.starts()
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if key(next(source.entries(starts[middle]))) <= wanted:
            low = middle + 1
        else:
            high = middle
    if not low:
        raise SourceError(f"{name} is before the log begins, with {say(next(source.entries()))}")
    found: Entry | None = None
    for entry in source.entries(starts[low - 1]):
        if key(entry) > wanted:
            break
        found = entry
    else:  # to the end of what there was; a living log has grown since
        if found is not None and key(found) != wanted:
            raise SourceError(f"{name} is after the log ends, with {say(found)}")
    assert found is not None
    return found.sequence
