"""``kvledger check``, ``bisect`` and ``leaks``: what is wrong, since when, and what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.exits import BAD_INPUT, FAILED
from kvledger.cli.sources import At, From, Json, Src, To, in_json, place, reading, span
from kvledger.cli.terminal import line
from kvledger.debugger import Entry, Source, SourceError
from kvledger.debugger.explain.leaks import leaks
from kvledger.debugger.explain.wording import Wording, count
from kvledger.debugger.export.plain import entry_fields
from kvledger.debugger.source.places import clock
from kvledger.debugger.verify.bisect import first_true
from kvledger.debugger.verify.check import check_log
from kvledger.debugger.verify.engine import Mistake, check_engine, read_marks
from kvledger.debugger.verify.predicates import NAMES, predicate
from statemachine.errors import Contradiction

_NAMES = "\n".join(f"- `{name}`: {meaning}" for name, meaning in NAMES.items())


def check(
    src: Src = None,
    begin: From = None,
    end: To = None,
    full: Annotated[bool, typer.Option("--full", help="Check the whole state at every event: slow")] = False,
    engine: Annotated[
        Path | None, typer.Option("--engine", metavar="MARKS", help="Hold what the engine noted of itself against it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check all invariants at every event; show the first violation with the events around it.

    With --engine, and a file that kvledger.Marks wrote, also what the engine did with its blocks: written before they
    were ready, published without being computed, not (or no more) in the block table, used after the release.
    Exit code 1 if anything is wrong; 2 if nothing is and the log is damaged or cut off.
    """
    with reading(src, to_the_end=True) as (source, report):
        start, stop = span(source, begin, end)
        checked = check_log(source, start, stop, every_event_in_full=full, progress=report)
        violation = checked.violation
        mistakes: list[Mistake] = []
        if engine is not None:
            last = stop if violation is None else violation.entry.sequence - 1
            ledger = "" if source.name.endswith(".kvlog") else source.name
            mistakes = check_engine(source, read_marks(engine, ledger), last, report)
        if as_json:
            wrong = None
            if violation is not None:
                wrong = {"messages": violation.messages, "event": entry_fields(violation.entry)}
            counts = {"events": checked.events, "full_checks": checked.full_checks}
            told = {"engine": [mistake._asdict() for mistake in mistakes]} if engine is not None else {}
            line(in_json(source, {**counts, "violation": wrong, **told}))
        elif violation is None:
            line(
                f"{count(checked.events, 'event')}, all invariants hold after every one "
                f"(the whole state was checked {count(checked.full_checks, 'time')})"
            )
        else:
            line(f"event {violation.entry.sequence} is the first that is wrong:")
            for message in violation.messages:
                line(f"  {message}")
            events_around(source, [*violation.before, violation.entry, *violation.after], violation.entry.sequence)
        if engine is not None and not as_json:
            line(f"the engine used its blocks in {count(len(mistakes), 'wrong way')}" + ":" * bool(mistakes))
            for mistake in mistakes:
                line(f"  event {mistake.sequence}, step {mistake.step}: {mistake.text}")
                if mistake.by:
                    line(f"      by {mistake.by}")
        if violation is not None or mistakes:
            raise typer.Exit(FAILED)


def bisect(
    text: Annotated[str, typer.Option("--predicate", metavar="EXPR|FILE.py", help="What becomes true")],
    src: Src = None,
    begin: From = None,
    end: To = None,
    stays: Annotated[bool, typer.Option("--stays", help="Once true it stays true: search by halves")] = False,
    as_json: Json = False,
) -> None:
    """Find the first event after which a predicate over the state is true."""
    holds = predicate(text)
    with reading(src) as (source, report):
        start, stop = span(source, begin, end)
        found = None
        ended = ""
        try:
            found = first_true(source, holds, start, stop, stays=stays, progress=report)
        except Contradiction as error:
            ended = str(error)
        if as_json:
            where = entry_fields(found) if found is not None else None
            line(in_json(source, {"found": where, "ended": ended}))
        elif found is not None:
            line(f"true from event {found.sequence} on:")
            before = list(source.entries(max(found.sequence - 3, source.first), found.sequence))
            events_around(source, before, found.sequence)
        elif ended:
            line(f"not true before the log breaks: {ended}")
        else:
            line(f"never true from event {start} to {stop}")
        if found is None:  # it may become true in what is missing
            raise typer.Exit(BAD_INPUT if source.damage and not ended else FAILED)


bisect.__doc__ = f"""Find the first event after which a predicate over the state is true.

The predicate is your own Python and runs with your rights: an expression, or a file that defines
predicate(state, entry). Every event is looked at in order; with --stays (what is true once stays true, like a counter
that passed a mark) the kept states are searched by halves, which takes a second however long the log is.
Exit code 1 if it is never true; 2 if it was not true yet where a damaged log ends.

An expression can use:

{_NAMES}
"""


def leaks_command(
    src: Src = None,
    at: At = None,
    idle: Annotated[float, typer.Option(min=0, help="Only what nothing has mentioned for so many seconds")] = 0.0,
    as_json: Json = False,
) -> None:
    """List what holds blocks: requests, transfers, cleared trees; what is suspicious first, then the oldest.

    Exit code 1 if something is suspicious by itself, whatever its age; else 2 if the log is damaged or cut off.
    """
    with reading(src, to_the_end=True) as (source, _):
        sequence = place(source, at)
        found = [leak for leak in leaks(source, sequence) if leak.idle_s >= idle]
        if as_json:
            line(in_json(source, {"leaks": [leak._asdict() for leak in found]}))
        elif not found:
            line(f"nothing is held after event {sequence}")
        else:
            for leak in found:
                named = repr(leak.name) if leak.kind == "request" else leak.name
                since = f", since event {leak.since}" if leak.since else ""
                age = f"{leak.age_s:.1f} s old, idle for {leak.idle_s:.1f} s"
                line(f"{leak.kind} {named}: {leak.holds}{since}, {age}")
                if leak.why:
                    line(f"    {leak.why}")
                if leak.made_by:
                    line(f"    made by: {leak.made_by}")
        if any(leak.why for leak in found):
            raise typer.Exit(FAILED)


def events_around(source: Source, entries: list[Entry], marked: int) -> None:
    """Print some events; the one that matters has an arrow."""
    words = Wording()
    try:
        state = source.before(entries[0].sequence)
    except (SourceError, Contradiction):
        state = None
    if state is not None:
        words = Wording.after(state)
    for entry in entries:
        arrow = "→" if entry.sequence == marked else " "
        kind = type(entry.event).__name__
        line(f"{arrow} {entry.sequence:>8}  {clock(entry.time_ns)}  {kind:<17} {words(entry.event)}")
