"""``kvledger segments``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from kvledger.cli.exits import CommandFailed
from kvledger.cli.terminal import line, output
from kvledger.text import printable_json


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
        raise CommandFailed(f"there {what} {listed} in /dev/shm: kvledger segments lists what is there")
    removed = remove_dead(names or ()) if remove else []
    gone_names = {gone.name for gone in removed}
    left = [ledger for ledger in found if ledger not in removed and (not names or ledger.name in names)]
    if as_json:
        line(printable_json({"ledgers": [entry._asdict() for entry in left], "removed": sorted(gone_names)}))
        return
    for gone in removed:
        line(f"removed {gone.name}: {gone.bytes:,} bytes")
    if remove and names and left:
        line(f"not removed: {', '.join(f'{entry.name} is {entry.state}' for entry in left)}")
    if not left:
        if not removed:
            line("there is no ledger in /dev/shm")
        return
    table = Table("ledger", "state", "epoch", "bytes", "age", "uid", "engine", "workers")
    for entry in left:
        numbers = f"{entry.epoch}", f"{entry.bytes:,}", _age(entry.age_s), f"{entry.uid}", f"{entry.writer}"
        table.add_row(entry.name, entry.state, *numbers, " ".join(map(str, entry.workers)))
    output().print(table)


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
