"""``kvledger export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvledger.cli.sources import Log, reading
from kvledger.cli.terminal import line
from kvledger.cli.whole_log import reached


def export(
    src: Log,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (must not exist)")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="parquet, jsonl, csv or perfetto")],
    words: Annotated[
        bool, typer.Option("--words", help="With the tokens of prompts and outputs, which are what users wrote")
    ] = False,
) -> None:
    """Write a log for other tools: one row per event (parquet, csv, jsonl), or a timeline for ui.perfetto.dev."""
    from kvledger.debugger import SourceError
    from kvledger.debugger.export.export import Format, export

    with reading(src) as (source, report):
        if to not in list(Format):
            raise SourceError(f"--to takes {', '.join(Format)}, not {to!r}")
        show = reached(source, report)
        last = 0

        def progress(sequence: int) -> None:
            nonlocal last
            last = sequence
            show(sequence)

        export(source, Format(to), out, words=words, progress=progress)
        line(f"{out}: events {source.first:,} to {last:,}, {out.stat().st_size / 1e6:.1f} MB")
