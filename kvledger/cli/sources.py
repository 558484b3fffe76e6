"""What the debugger's commands share: opening a source with a progress bar, what is said of it, places in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvledger.cli.exits import BAD_INPUT, FAILED, CommandFailed
from kvledger.cli.ledgers import named, the_one
from kvledger.cli.terminal import errors, note, say
from kvledger.debugger import Source, SourceError, open_source
from kvledger.debugger.source.places import locate
from kvledger.text import printable, printable_json
from statemachine.errors import Contradiction

Src = Annotated[
    str | None,
    typer.Argument(
        metavar="SRC",
        help="Name of a ledger, living or dead, or path of a .kvlog file; default: the one ledger that is here",
        autocompletion=named,
    ),
]
Log = Annotated[
    str,
    typer.Argument(
        metavar="SRC", help="Name of a ledger, living or dead, or path of a .kvlog file", autocompletion=named
    ),
]
At = Annotated[str | None, typer.Option("--at", metavar="SEQ|TIME|step:N", help="Where in the log; default: its end")]
From = Annotated[str | None, typer.Option("--from", metavar="SEQ|TIME|step:N", help="Begin here")]
To = Annotated[str | None, typer.Option("--to", metavar="SEQ|TIME|step:N", help="End here, included")]
Json = Annotated[bool, typer.Option("--json", help="For machines")]

Report = Callable[[int, int], None]
_NO_END = "has no end mark: its recorder still writes or was killed, or the file was cut; more may have happened"


def note_damage(damage: str) -> None:
    """Say that a log ends early, and what that means for what is printed."""
    note(f"note: {damage}; the answer holds for what was read only")


def note_contradiction(name: str, last_state: int, contradiction: str) -> None:
    """Say that a log contradicts itself, and what that means for what is printed."""
    what = f"nothing after event {last_state} has a state (kvledger check shows more)"
    say("FAILED", f"{name} contradicts itself, {what}: {contradiction}")


def contradiction_of(source: Source) -> str:
    """What is wrong with the first event that has no state; empty if every event has one, or no state is known."""
    with suppress(SourceError):  # a ledger that was cut, and no snapshot
        return source.contradiction
    return ""


def in_json(source: Source, fields: dict[str, Any]) -> str:
    """What a command gives machines, and whether the log that it is about ends early or contradicts itself."""
    damage = {"damaged_at": source.damaged_at, "unfinished": source.unfinished}
    return printable_json({**fields, **damage, "contradiction": contradiction_of(source) or None})


@contextmanager
def reading(src: str | None, *, to_the_end: bool = False) -> Iterator[tuple[Source, Report]]:
    """The source, and how to report progress. Of a log that contradicts itself each command says so: exit code 1.

    Args:
        to_the_end: the answer is about all of the log. Of one that is damaged or cut off there is none: exit code 2
            after what could be read, unless that was enough to say no (1).
    """
    src = the_one(src, "SRC")
    console = errors()
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task(f"reading {printable(src)}", total=None, visible=False)

    def report(done: int, total: int) -> None:
        if not bar.live.is_started:
            bar.start()
        bar.update(task, completed=done, total=total, visible=done < total)

    try:
        with open_source(src, report) as source:
            yield from _told(source, report, to_the_end)
    finally:
        if bar.live.is_started:
            bar.stop()


def _told(source: Source, report: Report, to_the_end: bool) -> Iterator[tuple[Source, Report]]:
    """Hand out a source, and say before and after what is wrong with it."""
    damage = source.damage
    if damage:
        note_damage(damage)
    elif to_the_end and source.unfinished:
        note(f"note: {source.name} {_NO_END}")
    if to_the_end:
        _expect_events(source)
    contradiction = contradiction_of(source)
    if contradiction:
        note_contradiction(source.name, source.last_state, contradiction)
    try:
        yield source, report
    except Contradiction as error:
        raise CommandFailed(error, FAILED, told=str(error) == contradiction) from error
    except KeyboardInterrupt:
        if contradiction:
            raise typer.Exit(FAILED) from None
        raise
    finally:
        if source.damage and not damage:
            note_damage(source.damage)
    if contradiction:
        raise typer.Exit(FAILED)
    if to_the_end and source.damage:
        raise typer.Exit(BAD_INPUT)


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
