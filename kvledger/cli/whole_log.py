"""What the commands that go through a whole log show: how far they are."""

from __future__ import annotations

from collections.abc import Callable

from kvledger.cli.sources import Report
from kvledger.debugger import Source

_EVERY = 1000


def reached(source: Source, report: Report) -> Callable[[int], None]:
    """A function to call with the sequence of the event that was reached."""
    first, last = source.first, source.last
    shown = 0

    def show(sequence: int) -> None:
        nonlocal shown
        if sequence - shown >= _EVERY:
            shown = sequence
            report(sequence - first + 1, last - first + 1)

    return show
