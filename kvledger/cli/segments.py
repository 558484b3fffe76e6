"""``kvledger segments``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvledger.cli.debugging import say
from kvledger.cli.exits import BAD_INPUT


def segments(
    names: Annotated[list[str] | None, typer.Argument(help="Only these ledgers")] = None,
    remove: Annotated[
        bool, typer.Option("--remove-dead", help="Remove your ledgers whose engine and workers are dead")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List the ledgers in /dev/shm: who owns them, how large and old they are, alive or dead.

    Exit code 2 if one that is named is not there; nothing is removed then.
    """
    from kvledger.doctor.ledgers import ledgers, remove_dead

    found = ledgers()
    unknown = sorted(set(names or ()) - {ledger.name for ledger in found})
    if unknown:
        what = "is no ledger" if len(unknown) == 1 else "are no ledgers"
        listed = ", ".join(map(repr, unknown))
        say("error", f"there {what} {listed} in /dev/shm: kvledger segments lists what is there")
        raise typer.Exit(BAD_INPUT)
    removed = remove_dead(names or ()) if remove else []
    gone_names = {gone.name for gone in removed}
    left = [ledger for ledger in found if ledger.name not in gone_names and (not names or ledger.name in names)]
    if as_json:
        print(json.dumps({"ledgers": [entry._asdict() for entry in left], "removed": sorted(gone_names)}))
        return
    console = Console()
    for gone in removed:
        console.print(f"removed {gone.name}: {gone.bytes:,} bytes", highlight=False)
    if remove and names and left:
        console.print(f"not removed: {', '.join(f'{entry.name} is {entry.state}' for entry in left)}", highlight=False)
    if not left:
        if not removed:
            console.print("there is no ledger in /dev/shm")
        return
    table = Table("ledger", "state", "epoch", "bytes", "age", "uid", "engine", "workers")
    for entry in left:
        numbers = f"{entry.epoch}", f"{entry.bytes:,}", _age(entry.age_s), f"{entry.uid}", f"{entry.writer}"
        table.add_row(entry.name, entry.state, *numbers, " ".join(map(str, entry.workers)))
    console.print(table)


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
