"""The page as one file that needs no server: a window of a log with all that is needed to step through it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvledger.debugger import SourceError
from kvledger.view.assets import single_file
from kvledger.view.log import Log

DEFAULT_EVENTS = 5_000
MOST_EVENTS = 20_000
"""About 15 MB; a browser takes a second or two to open it."""
_BUCKETS = 1_500


def export(log: Log, path: Path, start: int | None = None, stop: int | None = None) -> tuple[int, int]:
    """Write the events ``start`` to ``stop`` (default: the last 5,000) to a new file, mode 0600.

    The file holds no prompts' words, but the engine's names of its requests, times, and who shares prefixes with whom.

    Returns:
        The first and the last event in the file.

    Raises:
        SourceError: the log does not have these events, they are too many, or the file cannot be made.
    """
    first, last = log.first, log.last
    if stop is None:
        stop = last if start is None else min(start + DEFAULT_EVENTS - 1, last)
    if start is None:
        start = max(stop - DEFAULT_EVENTS + 1, first)
    if not first <= start <= stop <= last:
        raise SourceError(f"there are the events {first} to {last}, not {start} to {stop}")
    if stop - start >= MOST_EVENTS:
        raise SourceError(f"{stop - start + 1:,} events are too many for one file: take up to {MOST_EVENTS:,} of them")
    page = single_file(json.dumps(_content(log, start, stop), separators=(",", ":")))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise SourceError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        path.unlink()
        raise SourceError(f"cannot write {path}: {error.strerror}") from error
    return start, stop


def _content(log: Log, start: int, stop: int) -> dict[str, object]:
    first, last = log.first, log.last
    said = f"This file has the events {start:,} to {stop:,}"
    if (start, stop) != (first, last):
        said += f" of {first:,} to {last:,}, and the timeline of all; what it explains is from these events alone"
    summary = log.summary() | {"first": start, "last": stop, "live": False, "words": False, "exported": f"{said}."}
    return {
        "summary": summary | {"whole": [first, last]},
        "overview": log.timeline(first, last, _BUCKETS),
        "detail": log.timeline(start, stop, _BUCKETS),
        "window": log.events(start, stop),
    }
