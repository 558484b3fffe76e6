"""What the debugger's commands share: opening a source with a progress bar, places, errors in one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ipc import LedgerError
from kvledger.cli.exits import BAD_INPUT, FAILED, INTERRUPTED
from kvledger.debugger import Source, SourceError, open_source
from kvledger.debugger.source.places import locate
from statemachine.errors import Contradiction

Src = Annotated[str, typer.Argument(metavar="SRC", help="Name of a ledger, living or dead, or path of a .kvlog file")]
At = Annotated[str | None, typer.Option("--at", metavar="SEQ|TIME|step:N", help="Where in the log; default: its end")]
From = Annotated[str | None, typer.Option("--from", metavar="SEQ|TIME|step:N", help="Begin here")]
To = Annotated[str | None, typer.Option("--to", metavar="SEQ|TIME|step:N", help="End here, included")]
Json = Annotated[bool, typer.Option("--json", help="For machines")]

Report = Callable[[int, int], None]
_NO_END = "has no end mark: its recorder still writes or was killed, or the file was cut; more may have happened"
errors = Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What the user did wrong, or what is wrong with the log, in one line and an exit code."""
    try:
        yield
    except (SourceError, LedgerError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        say("error", error)
        raise typer.Exit(BAD_INPUT) from None
    except Contradiction as error:
        say("FAILED", f"{error}; nothing after event {error.sequence - 1} has a state (kvledger check shows more)")
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # the same, where a table was printed
            raise typer.Exit(0) from None
        raise


def say(word: str, message: object) -> None:
    """On standard error: what kind of trouble, and which."""
    errors.print(f"[bold red]{word}[/] ", end="")
    errors.print(str(message), markup=False)


def note_damage(damage: str) -> None:
    """Say that a log ends early, and what that means for what is printed."""
    errors.print(f"note: {damage}; the answer holds for what was read only", markup=False)


def in_json(source: Source, fields: dict[str, Any]) -> str:
    """What a command gives machines, and whether the log that it is about ends early."""
    return json.dumps({**fields, "damaged_at": source.damaged_at, "unfinished": source.unfinished})


@contextmanager
def reading(src: str, *, whole: bool = False) -> Iterator[tuple[Source, Report]]:
    """The source, and how to report progress; both with errors in one line.

    Args:
        whole: the answer is about all of the log. Of one that is damaged or cut off there is none: exit code 2 after
            what could be read, unless that was enough to say no (1).
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    task = bar.add_task(f"reading {src}", total=None, visible=False)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, visible=done < total)

    try:
        with one_line_errors(), open_source(src, report) as source:
            told = source.damage
            if told:
                note_damage(told)
            elif whole and source.unfinished:
                errors.print(f"note: {src} {_NO_END}", markup=False)
            if whole:
                _expect_events(source)
            try:
                yield source, report
            finally:
                if source.damage and not told:
                    note_damage(source.damage)
            if whole and source.damage:
                raise typer.Exit(BAD_INPUT)
    finally:
        if bar.live.is_started:
            bar.stop()


def place(source: Source, text: str | None) -> int:
    """Where ``--at`` points to; by default the last event that has a state."""
    if text is not None:
        return locate(source, text)
    _expect_events(source)
    return source.last_state


def span(source: Source, begin: str | None, end: str | None) -> tuple[int, int]:
    """The events from ``--from`` to ``--to``. Raises :class:`SourceError`."""
    _expect_events(source)
    start = source.first if begin is None else locate(source, begin)
    stop = source.last if end is None else locate(source, end)
    if start > stop:
        raise SourceError(f"--from is event {start}, after --to, event {stop}")
    return start, stop


def _expect_events(source: Source) -> None:
    if source.last < source.first:
        raise SourceError(f"{source.name} holds no event that can be read")
