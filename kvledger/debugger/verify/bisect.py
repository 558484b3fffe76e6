"""The first event after which something is true."""

from __future__ import annotations

from collections.abc import Callable

from kvledger.debugger.source.source import Entry, Source
from kvledger.debugger.verify.predicates import Predicate


def first_true(
    source: Source,
    holds: Predicate,
    start: int,
    stop: int,
    *,
    stays: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Entry | None:
    """The first event from ``start`` to ``stop`` after which ``holds``; ``None`` if there is none.

    Without more knowledge every event has to be looked at, in order: something may be true for one event only, and
    between two kept states nobody knows. With ``stays`` (what is true once is true ever after, such as a counter that
    has passed a mark) a binary search over the kept states needs a second, however long the log is.

    Raises:
        SourceError: the predicate fails.
        Contradiction: an event before the one that is sought has no state.
    """
    if stays:
        start = _last_false_stretch(source, holds, start, stop)
    total = stop - start + 1
    for entry, state in source.replay(start, stop):
        if holds(state, entry):
            return entry
        if not entry.sequence % 4096:
            progress(entry.sequence - start, total)
    return None


def _last_false_stretch(source: Source, holds: Predicate, start: int, stop: int) -> int:
    """The first event of the last stretch that begins before it is true."""
    starts = [begin for begin in source.starts() if start < begin <= stop]
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        sequence = starts[middle] - 1
        entry = next(source.entries(sequence))
        if holds(source.at(sequence), entry):
            high = middle
        else:
            low = middle + 1
    return starts[low - 1] if low else start
