"""``kvledger doctor``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvledger.cli.exits import BAD_INPUT, INTERRUPTED

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False) -> None:
    """Say whether kvledger can work here, and what to do where it cannot.

    Looks at the installation, shared memory, limits, processes and optional parts, and runs a tiny ledger with a real
    worker from end to end. Leaves nothing behind. A note is no problem: it works, but slower, with less room, or
    without an optional part. Exit code 2 if there is a problem.
    """
    from kvledger.cli.stopping import until_signal
    from kvledger.doctor import Status, examine

    results = []
    with until_signal() as stopped, Console(stderr=True).status("looking …"):
        for result in examine():
            if stopped():  # each check ends as a whole, and what an interrupted one says counts for nothing
                raise typer.Exit(INTERRUPTED)
            results.append(result)
    problems = sum(result.finding.status == Status.PROBLEM for result in results)
    if as_json:
        checks = [{"check": result.check, **result.finding._asdict()} for result in results]
        print(json.dumps({"problems": problems, "checks": checks}))
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for check, (status, found, advice) in results:
            said = Text(found)
            if advice:
                said.append(f"\n→ {advice}", style="bold" if status == Status.PROBLEM else "dim")
            table.add_row(Text(status, style=_COLOURS[status]), check, said)
        console = Console(highlight=False)
        console.print(table)
        console.print(_summary(problems))
    if problems:
        raise typer.Exit(BAD_INPUT)


def _summary(problems: int) -> str:
    if not problems:
        return "[green]kvledger works here[/]"
    return f"[bold red]{problems} {'problem' if problems == 1 else 'problems'}[/]: see the lines with →"
