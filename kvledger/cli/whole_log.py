"""What the commands that go through a whole log show: how far they are, and tables that a pipe does not squeeze."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from kvledger.cli.debugging import Report
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


def wide_console() -> Console:
    """Standard output for tables; into a pipe or file they are as wide as they are."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
