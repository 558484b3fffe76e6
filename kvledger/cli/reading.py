"""What the commands that read a log share: opening it, showing how far they are, and how they fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ipc import LedgerError
from kvledger.cli.exits import BAD_INPUT, FAILED
from kvledger.debugger import Source, SourceError, open_source
from statemachine.replay import Contradiction


class BadInput(ValueError):
    """What the user typed is not possible; one line says what is."""


class Reading:
    """An open log and a progress bar beside it."""

    def __init__(self, source: Source, progress: Progress) -> None:
        self.source = source
        self._progress = progress
        self._shown = 0
        self._task = progress.add_task("reading", total=source.last - source.first + 1)

    def reached(self, sequence: int) -> None:
        """Say how far the work is."""
        if sequence - self._shown >= 1000:
            self._shown = sequence
            self._progress.update(self._task, completed=sequence - self.source.first + 1)


def wide_console() -> Console:
    """Standard output for tables; into a pipe or file they are not squeezed to a screen's width."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


@contextmanager
def reading(text: str, wrong: tuple[type[Exception], ...] = ()) -> Iterator[Reading]:
    """Open the log that the user named; whatever goes wrong becomes one line and an exit code.

    Args:
        wrong: further exceptions that mean bad input.
    """
    bad_input: tuple[type[Exception], ...] = (*wrong, BadInput, SourceError, LedgerError)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    try:
        with progress:
            opening = progress.add_task("opening", total=None)
            with open_source(text, lambda done, total: progress.update(opening, completed=done, total=total)) as source:
                progress.remove_task(opening)
                yield Reading(source, progress)
                if source.damage:
                    errors.print(f"[yellow]note[/] {text} ends early: {source.damage}")
    except Contradiction as error:
        errors.print(f"[bold red]FAILED[/] {error}")
        raise typer.Exit(FAILED) from error
    except bad_input as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
