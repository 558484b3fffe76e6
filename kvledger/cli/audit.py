"""``kvledger audit``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvledger.cli.exits import FAILED, INTERRUPTED, CommandFailed
from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import Name, cannot_follow, the_one
from kvledger.cli.terminal import line, note, say, working
from kvledger.debugger.explain.wording import count
from kvledger.text import printable_json


def audit(
    name: Name = None,
    check_every: Annotated[
        int | None,
        typer.Option(min=1, help="Check all invariants after so many events; default: as often as takes half the time"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Audit what is there now, then stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON")] = False,
) -> None:
    """Replay a ledger live: check its invariants and digests, write its snapshots.

    Runs until the ledger ends, or Ctrl-C. Exit code 1 names the first event that broke something, and what.
    """
    with until_asked(not once):
        _audit(the_one(name), check_every, once, as_json)


def _audit(name: str, check_every: int | None, once: bool, as_json: bool) -> None:
    from ipc import LedgerError
    from workers.followers.auditor import Auditor, AuditorRunning

    try:
        try:
            auditor = Auditor(name, check_every=check_every)
        except AuditorRunning as running:
            note(f"{running}; this one only checks, that one writes the snapshots")
            auditor = Auditor(name, check_every=check_every, publish=False)
    except LedgerError as error:
        raise CommandFailed(cannot_follow(name, error)) from error
    first = auditor.follower.sequence + 1
    if first > 1:
        note(f"going on from the snapshot after event {first - 1}")
    try:
        with until_signal() as stopped, working("") as say_now:
            while not stopped() and auditor.verdict is None:
                if not auditor.step(0 if once else 0.25) and (once or auditor.follower.ended()):
                    break
                say_now(f"event {auditor.follower.sequence:,}: {count(auditor.checks, 'check')}, all well")
            auditor.check()
            interrupted = once and stopped()
    finally:
        auditor.close()
    verdict = auditor.verdict
    if as_json:
        line(
            printable_json(
                {
                    "ledger": name,
                    "first_event": first,
                    "last_event": auditor.follower.sequence,
                    "events": auditor.events,
                    "checks": auditor.checks,
                    "digests": auditor.digests,
                    "skipped": auditor.skipped,
                    "broken_at": None if verdict is None else verdict.event,
                    "reason": "" if verdict is None else verdict.reason,
                }
            )
        )
    for skipped in auditor.skipped:
        note(f"events {skipped.first} to {skipped.last} were gone before they could be audited")
    if auditor.follower.missed_from:
        note(f"the ledger was removed before its events from {auditor.follower.missed_from} on could be read")
    if verdict is not None:
        say("FAILED", verdict.reason)
        raise typer.Exit(FAILED)
    if not as_json:
        line(
            f"{count(auditor.events, 'event')} audited up to event {auditor.follower.sequence:,}: all invariants hold "
            f"({count(auditor.checks, 'check')}), "
            f"{count(auditor.digests, 'digest')} {'agrees' if auditor.digests == 1 else 'agree'}"
        )
    if interrupted:
        raise typer.Exit(INTERRUPTED)
