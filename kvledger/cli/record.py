"""``kvledger record``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.debugging import errors, say
from kvledger.cli.exits import BAD_INPUT, INTERRUPTED
from kvledger.cli.following import cannot_follow
from kvledger.cli.stopping import until_asked, until_signal
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
            with until_signal() as stopped, errors.status("") as status:
                while not stopped():
                    if not recorder.step(0 if once else 0.25) and (once or recorder.follower.ended()):
                        break
                    status.update(f"event {recorder.follower.sequence:,} in {recorder.files[-1].name}")
                interrupted = once and stopped()
        finally:
            recorder.close()
    except (LedgerError, OSError) as error:
        say("error", cannot_follow(name, error) if isinstance(error, LedgerError) else error)
        if recorder is not None:
            errors.print(f"{recorder.files[-1]} can be read up to the last whole transaction in it")
        raise typer.Exit(BAD_INPUT) from error
    for skipped in recorder.skipped:
        errors.print(f"events {skipped.first} to {skipped.last} were gone before they could be recorded")
    if recorder.follower.missed_from:
        errors.print(f"the ledger was removed before its events from {recorder.follower.missed_from} on could be read")
    if recorder.broken:
        errors.print(f"this ledger cannot be replayed to its end: {recorder.broken}")
    print(f"{count(recorder.events, 'event')} in {', '.join(map(str, recorder.files))}")
    if interrupted:
        raise typer.Exit(INTERRUPTED)
