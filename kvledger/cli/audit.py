"""``kvledger audit``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from kvledger.cli.exits import BAD_INPUT, FAILED
from kvledger.cli.stopping import until_signal


def audit(
    name: Annotated[str, typer.Argument(help="Name of a ledger on this machine")],
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
    from ipc import LedgerError
    from workers.auditor import Auditor, AuditorRunning

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        try:
            auditor = Auditor(name, check_every=check_every)
        except AuditorRunning as running:
            errors.print(f"{running}; this one only checks, that one writes the snapshots")
            auditor = Auditor(name, check_every=check_every, publish=False)
    except LedgerError as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
    first = auditor.follower.sequence + 1
    if first > 1:
        errors.print(f"going on from the snapshot after event {first - 1}")
    try:
        with until_signal() as stopped, errors.status("") as status:
            while not stopped() and auditor.verdict is None:
                if not auditor.step(0 if once else 0.25) and (once or auditor.follower.ended()):
                    break
                status.update(f"event {auditor.follower.sequence:,}: {auditor.checks:,} checks, all well")
            auditor.check()
    except LedgerError as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
    finally:
        auditor.close()
    verdict = auditor.verdict
    if as_json:
        print(
            json.dumps(
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
        errors.print(f"events {skipped.first} to {skipped.last} were gone before they could be audited")
    if auditor.follower.missed_from:
        errors.print(f"the ledger was removed before its events from {auditor.follower.missed_from} on could be read")
    if verdict is not None:
        errors.print(f"[bold red]FAILED[/] {verdict.reason}")
        raise typer.Exit(FAILED)
    if not as_json:
        print(
            f"{auditor.events:,} events audited up to event {auditor.follower.sequence:,}: all invariants hold "
            f"({auditor.checks:,} checks), {auditor.digests:,} digests agree"
        )
