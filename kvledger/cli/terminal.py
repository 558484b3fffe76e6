"""All that the command line prints. What is printed may hold names that clients chose: none of it is ever obeyed.

A line is one line and a cell of a table is one cell, whatever stands in it: see :func:`kvledger.text.printable`.
Nothing is markup; what is coloured is a :class:`rich.text.Text` of the command's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from kvledger.text import printable

_RED = "\x1b[1;31m{}\x1b[0m"


class _Console(Console):
    """A console to which a text is no markup, no emoji and nothing to be highlighted, in every cell."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string that is to be printed or stands in a table."""
        return super().render_str(printable(text), **options)


def line(text: str = "") -> None:
    """Print one line to standard output."""
    print(printable(text))


def flush() -> None:
    """Let the reader of a pipe have what has been printed."""
    sys.stdout.flush()


def note(text: object) -> None:
    """Print one line to standard error: what the reader of the output should know as well."""
    print(printable(str(text)), file=sys.stderr)


def say(word: str, message: object) -> None:
    """Print one line to standard error: what kind of trouble, and which."""
    shown = _RED.format(word) if _coloured(sys.stderr) else word
    print(shown, printable(str(message)), file=sys.stderr)


def output() -> Console:
    """Standard output, for tables and trees; into a pipe or a file they are as wide as they are."""
    console = _Console()
    return console if console.is_terminal else _Console(width=_WIDE)


_WIDE = 100_000
"""Cells; a table takes those that it needs."""


def errors() -> Console:
    """Standard error, for progress."""
    return _Console(stderr=True)


@contextmanager
def working(text: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done; the yielded function says what it is by now."""

    def shown(text: str) -> Text:
        return Text(printable(text))

    with errors().status(shown(text)) as status:
        yield lambda text: status.update(shown(text))


def _coloured(stream: IO[str]) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
