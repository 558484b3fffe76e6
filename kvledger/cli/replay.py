"""``kvledger replay``, ``diff`` and ``shrink``: logs against themselves, each other, and the code at hand."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.check import events_around
from kvledger.cli.exits import FAILED
from kvledger.cli.sources import From, Json, Report, Src, To, in_json, reading, span
from kvledger.cli.terminal import line
from kvledger.debugger import Entry, Source, SourceError
from kvledger.debugger.explain.wording import Wording, count
from kvledger.debugger.export.output import complete
from kvledger.debugger.export.plain import entry_fields, event_fields
from kvledger.debugger.source.places import locate
from kvledger.debugger.source.replay import Decision, decisions, evolve
from kvledger.debugger.verify.diff import differences, diverge, fields_that_differ
from kvledger.debugger.verify.predicates import predicate
from kvledger.debugger.verify.pytest_file import as_test
from kvledger.debugger.verify.shrink import shrink
from kvledger.text import printable_json
from statemachine.events import DigestScope

_MOST_DIFFERENCES = 40


def replay(
    src: Src = None,
    begin: From = None,
    end: To = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="Decide the commands anew instead of applying events")
    ] = False,
    as_json: Json = False,
) -> None:
    """Replay a log: its events into states, comparing every digest; or with --decide, its commands.

    --decide derives the command behind each transaction, runs it through the decisions of this version of kvledger and
    stops at the first that is different: it proves determinism, or shows what a change of the code changes.
    Exit code 1 if something differs; 2 if nothing does and the log is damaged or cut off.
    """
    with reading(src, to_the_end=True) as (source, report):
        start, stop = span(source, begin, end)
        (_decide if decide else _evolve)(source, start, stop, report, as_json)


def _evolve(source: Source, start: int, stop: int, report: Report, as_json: bool) -> None:
    compared = different = 0
    for digest in evolve(source, start, stop, report):
        if digest.own:
            if as_json:
                fields = {"digests": compared, "different": different, "digest": digest.replayed.hex()}
                line(in_json(source, fields))
            else:
                digests = f"{compared - different:,} of {compared:,} digests equal"
                if not source.digests_comparable:
                    digests = "its digests are those of an earlier version and cannot be compared"
                line(f"{count(digest.sequence - start + 1, 'event')}, {digests}")
                line(f"digest after event {digest.sequence}: {digest.replayed.hex()}")
            continue
        compared += 1
        if not digest.equal:
            different += 1
            if not as_json and different == 1:
                scope = "state" if digest.scope == DigestScope.STATE else "counters"
                line(f"event {digest.sequence}: the engine's digest of its {scope} was {digest.recorded.hex()},")
                line(f"  the replay has {digest.replayed.hex()}: the engine had another state than its own log")
    if different:
        raise typer.Exit(FAILED)


def _decide(source: Source, start: int, stop: int, report: Report, as_json: bool) -> None:
    made = 0
    for decision in decisions(source, start, stop, report):
        made += 1
        if not decision.same:
            if as_json:
                entries = [entry_fields(entry) for entry in decision.entries]
                today = [{"kind": type(event).__name__, **event_fields(event)} for event in decision.events]
                fields = {"transactions": made, "logged": entries, "decided": today, "rejected": decision.rejected}
                line(in_json(source, fields))
            else:
                _print_decision(source, decision, made)
            raise typer.Exit(FAILED)
    if as_json:
        line(in_json(source, {"transactions": made}))
    else:
        line(f"{count(made, 'command')} decided again: all the same events")


def _print_decision(source: Source, decision: Decision, made: int) -> None:
    first = decision.entries[0].sequence
    same = "1 command is decided as it was" if made == 2 else f"{made - 1:,} commands are decided as they were"
    line(f"the first {same}; the one at event {first} is not:")
    name = type(decision.command).__name__ if decision.command is not None else "no command of this version"
    line(f"{name} came to")
    events_around(source, decision.entries, 0)
    if decision.rejected:
        line(f"and is not possible today: {decision.rejected}")
        return
    line("and comes today to")
    state = source.before(first)
    words = Wording.after(state) if state is not None else Wording()
    for event in decision.events:
        line(f"  {type(event).__name__:<17} {words(event)}")
    for entry, event in zip(decision.entries, decision.events):
        if entry.event != event:
            line("which differs in " + "; ".join(fields_that_differ(entry.event, event)))
            break


def diff(
    first: Annotated[str, typer.Argument(metavar="A[@PLACE]", help="A log, or one of its states")],
    second: Annotated[str, typer.Argument(metavar="B[@PLACE]", help="Another")],
    as_json: Json = False,
) -> None:
    """Show where two logs part; or with A@SEQ B@SEQ (a time, step:N) in what two states differ.

    Exit code 1 if they differ; 2 if two logs do not and one is damaged or cut off.
    """
    (one, here), (other, there) = _with_place(first), _with_place(second)
    with ExitStack() as stack:
        left, report = stack.enter_context(reading(one, to_the_end=here is None and there is None))
        right, _ = stack.enter_context(reading(other, to_the_end=here is None and there is None))
        if here is None and there is None:
            parted = diverge(left, right, report)
            if parted is None:
                line(printable_json({"first_difference": None}) if as_json else "the logs hold the same events")
                return
            if as_json:
                sides = [entry_fields(entry) if entry is not None else None for entry in parted[1:]]
                line(printable_json({"first_difference": parted.sequence, "first": sides[0], "second": sides[1]}))
            else:
                _print_parting(left, right, *parted)
            raise typer.Exit(FAILED)
        places = [
            source.last_state if text is None else locate(source, text)
            for source, text in ((left, here), (right, there))
        ]
        told = list(differences(left.at(places[0]), right.at(places[1])))
        if as_json:
            line(printable_json({"differences": told}))
        elif not told:
            line("the states are the same")
        else:
            line(f"{one} after event {places[0]} and {other} after event {places[1]} differ:")
            for difference in told[:_MOST_DIFFERENCES]:
                line(f"  {difference}")
            if len(told) > _MOST_DIFFERENCES:
                line(f"  … and {len(told) - _MOST_DIFFERENCES} more")
        if told:
            raise typer.Exit(FAILED)


def _with_place(text: str) -> tuple[str, str | None]:
    name, at, where = text.rpartition("@")
    return (name, where) if at and name and "/" not in where else (text, None)


def _print_parting(left: Source, right: Source, sequence: int, one: Entry | None, other: Entry | None) -> None:
    line(f"the same up to event {sequence - 1}, then:")
    for source, entry in ((left, one), (right, other)):
        if entry is None:
            line(f"{source.name} ends")
        else:
            line(source.name)
            events_around(source, [entry], 0)
    if one is not None and other is not None:
        line("they differ in " + "; ".join(fields_that_differ(one.event, other.event)))


def shrink_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the test here (must not exist)")],
    src: Src = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--predicate", metavar="EXPR|FILE.py", help="What counts as failing, as in bisect; default: check"
        ),
    ] = None,
    end: To = None,
) -> None:
    """Reduce a failing log to the fewest commands that still fail, and write them as a pytest file that fails.

    The commands are decided anew by the code at hand: use the version that the failing engine ran.
    """
    holds = predicate(text) if text is not None else None
    if output.exists():
        raise SourceError(f"{output} exists already: choose another name, or remove it")
    if not output.parent.is_dir():
        raise SourceError(f"there is no folder {output.parent}")
    with reading(src) as (source, report):
        _, stop = span(source, None, end)
        shrunk = shrink(source, holds, stop, report)
        with complete(output) as file:
            file.write_text(as_test(shrunk, Path(source.name).name, text or ""))
        line(f"{len(shrunk.commands)} of {shrunk.before} commands are left; {output} fails: {shrunk.message}")
