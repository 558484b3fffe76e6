"""``kvledger doctor``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from kvledger.cli.exits import BAD_INPUT, INTERRUPTED
from kvledger.cli.terminal import line, output, working
from kvledger.text import printable, printable_json

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False) -> None:
    """Say whether kvledger can work here, and what to do where it cannot.

    Looks at the installation, shared memory, limits, processes and optional parts, and runs a tiny ledger with a real
    worker from end to end. Leaves nothing behind. A note is no problem: it works, but slower, with less room, or
    without an optional part. Exit code 2 if there is a problem.
    """
    from kvledger.cli.interrupts import until_signal
    from kvledger.doctor import Status, examine

    results = []
    with until_signal() as stopped, working("looking …"):
        for result in examine():
            if stopped():  # each check ends as a whole, and what an interrupted one says counts for nothing
                raise typer.Exit(INTERRUPTED)
            results.append(result)
    problems = sum(result.finding.status == Status.PROBLEM for result in results)
    if as_json:
        checks = [{"check": result.check, **result.finding._asdict()} for result in results]
        line(printable_json({"problems": problems, "checks": checks}))
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for check, (status, found, advice) in results:
            said = Text(printable(found))
            if advice:
                said.append(f"\n→ {printable(advice)}", style="bold" if status == Status.PROBLEM else "dim")
            table.add_row(Text(status, style=_COLOURS[status]), check, said)
        console = output()
        console.print(table)
        console.print(_summary(problems))
    if problems:
        raise typer.Exit(BAD_INPUT)


def _summary(problems: int) -> Text:
    if not problems:
        return Text("kvledger works here", "green")
    said = Text(f"{problems} {'problem' if problems == 1 else 'problems'}", "bold red")
    return said.append(": see the lines with →", "default not bold")
