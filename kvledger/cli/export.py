"""``kvledger export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A .kvlog file, or the name of a ledger")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (must not exist)")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="parquet, jsonl, csv or perfetto")],
    words: Annotated[
        bool, typer.Option("--words", help="With the tokens of prompts and outputs, which are what users wrote")
    ] = False,
) -> None:
    """Write a log for other tools: one row per event (parquet, csv, jsonl), or a timeline for ui.perfetto.dev."""
    from kvledger.cli.reading import BadInput, reading
    from kvledger.debugger.export import Format, export
    from kvledger.debugger.output import CannotWrite

    with reading(source, (CannotWrite,)) as log:
        if to not in list(Format):
            raise BadInput(f"--to takes {', '.join(Format)}, not {to!r}")
        export(log.source, Format(to), out, words=words, progress=log.reached)
