"""``kvledger record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.exits import FAILED, INTERRUPTED, CommandFailed
from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import cannot_follow
from kvledger.cli.terminal import line, note, say, working
from kvledger.debugger.explain.wording import count


def record(
    name: Annotated[str, typer.Argument(help="Name of a ledger on this machine")],
    file: Annotated[Path, typer.Argument(help="FILE.kvlog to write; it must not exist", metavar="FILE.kvlog")],
    rotate_mb: Annotated[
        float | None, typer.Option(min=0.001, help="Begin FILE.0001.kvlog and so on when a file has this size")
    ] = None,
    rotate_minutes: Annotated[float | None, typer.Option(min=0.001, help="... or this age")] = None,
    once: Annotated[bool, typer.Option("--once", help="Record what is there now, then stop")] = False,
) -> None:
    """Record a ledger's log, compressed, into self-contained files.

    Runs until the ledger ends, or Ctrl-C. The files hold users' prompts: mode 0600; kvledger redact takes them out.
    Exit code 1: the ledger contradicts itself; it is recorded all the same.
    """
    with until_asked(not once):
        _record(name, file, rotate_mb, rotate_minutes, once)


def _record(name: str, file: Path, rotate_mb: float | None, rotate_minutes: float | None, once: bool) -> None:
    from ipc import LedgerError
    from workers.followers.recorder import Recorder

    recorder: Recorder | None = None
    interrupted = False
    try:
        recorder = Recorder(
            name,
            file,
            rotate_bytes=None if rotate_mb is None else int(rotate_mb * 1e6),
            rotate_s=None if rotate_minutes is None else rotate_minutes * 60,
        )
        try:
            with until_signal() as stopped, working("") as say_now:
                while not stopped():
                    if not recorder.step(0 if once else 0.25) and (once or recorder.follower.ended()):
                        break
                    say_now(f"event {recorder.follower.sequence:,} in {recorder.files[-1].name}")
                interrupted = once and stopped()
        finally:
            recorder.close()
    except (LedgerError, OSError) as error:
        if recorder is not None:
            note(f"{recorder.files[-1]} can be read up to the last whole transaction in it")
        raise CommandFailed(cannot_follow(name, error) if isinstance(error, LedgerError) else error) from error
    for skipped in recorder.skipped:
        note(f"events {skipped.first} to {skipped.last} were gone before they could be recorded")
    if recorder.follower.missed_from:
        note(f"the ledger was removed before its events from {recorder.follower.missed_from} on could be read")
    line(f"{count(recorder.events, 'event')} in {', '.join(map(str, recorder.files))}")
    if recorder.broken:
        say("FAILED", f"this ledger contradicts itself and cannot be replayed to its end: {recorder.broken}")
        raise typer.Exit(FAILED)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
