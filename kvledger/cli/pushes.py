"""``kvledger pushes``."""

from __future__ import annotations

from typing import Annotated

import typer

from kvledger.cli.ledgers import Name, the_one
from kvledger.cli.sources import Json
from kvledger.cli.terminal import line, output
from kvledger.text import printable_json


def pushes(
    name: Name = None,
    most: Annotated[int, typer.Option("--most", min=1, help="So many pushes, the newest")] = 50,
    as_json: Json = False,
) -> None:
    """List what a prefill instance pushes to decode instances, and how it ended."""
    from rich.table import Table

    from kvledger.debugger.pushes import pushes as pushes_of
    from kvledger.debugger.source.places import clock

    found = pushes_of(the_one(name))
    shown = found[-most:]
    if as_json:
        for push in shown:
            line(printable_json(push._asdict()))
        return
    if not found:
        line("nothing has been pushed")
        return
    if len(shown) < len(found):
        line(f"… {len(found) - len(shown)} older ones")
    table = Table()
    for name in ("push", "ordered", "request", "to", "blocks", "step", "ms", "outcome"):
        table.add_column(name, overflow="fold")
    for push in shown:
        taken = f"{push.seconds * 1e3:.1f}" if push.seconds is not None else ""
        outcome = f"{push.outcome}: {push.reason}" if push.reason else push.outcome or "under way"
        numbers = str(push.blocks), str(push.step or ""), taken
        table.add_row(str(push.push), clock(push.started_ns), push.request, push.to, *numbers, outcome)
    output().print(table)
