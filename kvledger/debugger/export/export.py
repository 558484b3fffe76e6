"""A log in the formats of other tools: Parquet, CSV and JSON lines, one row per event. Memory stays bounded.

Parquet needs pyarrow, from the extra ``export``; it is imported when it is asked for.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from kvledger.debugger.export.output import CannotWrite, complete
from kvledger.debugger.export.perfetto import write_timeline
from kvledger.debugger.export.rows import COLUMNS, rows
from kvledger.debugger.source.source import Source
from kvledger.text import printable, printable_json

_ROW_GROUP = 10_000


class Format(StrEnum):
    """Where a log can be exported to."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    CSV = "csv"
    PERFETTO = "perfetto"


def export(
    source: Source,
    format: Format,
    path: Path,
    *,
    words: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a whole log to ``path``, which appears when it is complete.

    Args:
        words: with the content words (tokens) of prompts and outputs. They are what users wrote, and most of the bytes.
        progress: called with the sequence of the event that was reached.

    Raises:
        CannotWrite: the file exists, or cannot be written, or a package is missing.
        SourceError, Contradiction: the log cannot be read.
    """
    if words and format == Format.PERFETTO:
        raise CannotWrite("a Perfetto timeline holds no words")
    with complete(path) as partial:
        if format == Format.PARQUET:
            _parquet(source, partial, words, progress)
        elif format == Format.JSONL:
            _jsonl(source, partial, words, progress)
        elif format == Format.CSV:
            _csv(source, partial, words, progress)
        else:
            write_timeline(source, partial, progress)


def _jsonl(source: Source, path: Path, words: bool, progress: Callable[[int], None]) -> None:
    with open(path, "w") as file:
        for row in rows(source, words=words):
            file.write(printable_json(row) + "\n")
            progress(row["sequence"])


def _csv(source: Source, path: Path, words: bool, progress: Callable[[int], None]) -> None:
    """Lists are written as JSON, texts printable (see :mod:`kvledger.text`); what an event does not have is empty."""
    names = [column.name for column in COLUMNS if words or column.name != "words"]
    lists = {column.name for column in COLUMNS if column.type.startswith("list")}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows(source, words=words):
            for name, value in row.items():
                if name in lists:
                    row[name] = json.dumps(value)
                elif isinstance(value, str):
                    row[name] = printable(value)
            writer.writerow(row)
            progress(row["sequence"])


def _parquet(source: Source, path: Path, words: bool, progress: Callable[[int], None]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise CannotWrite("Parquet needs pyarrow: pip install 'kvledger[export]'") from None
    types = {
        "u32": pyarrow.uint32(),
        "u64": pyarrow.uint64(),
        "i64": pyarrow.int64(),
        "text": pyarrow.string(),
        "list<i32>": pyarrow.list_(pyarrow.int32()),
        "list<u32>": pyarrow.list_(pyarrow.uint32()),
        "list<u64>": pyarrow.list_(pyarrow.uint64()),
    }
    columns = [column for column in COLUMNS if words or column.name != "words"]
    schema = pyarrow.schema([(column.name, types[column.type]) for column in columns])
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        found = rows(source, words=words)
        while batch := list(itertools.islice(found, _ROW_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))
            progress(batch[-1]["sequence"])
