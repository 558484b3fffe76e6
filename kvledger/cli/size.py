"""``kvledger size``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvledger.cli.exits import CommandFailed
from kvledger.cli.terminal import line, output
from kvledger.models import ModelError, ModelShape, Sizing, shape_of, size
from kvledger.text import printable_json

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def _bytes(text: str) -> int:
    """``64GiB``, ``64GB``, ``500M`` or plain bytes."""
    found = _AMOUNT.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no amount of memory: write 64GiB, 80GB or a number of bytes")
    unit = (found[2] or "").capitalize()
    return int(float(found[1]) * (_UNITS | _BINARY)[unit])


def size_command(
    model: Annotated[Path, typer.Option(help="A local config.json, or the folder it lies in")],
    memory: Annotated[str, typer.Option(help="Device memory of one rank for the cache, e.g. 64GiB")],
    host_memory: Annotated[str, typer.Option(help="Host memory of one rank for a host tier")] = "0",
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Element type of the cache; default: the model's")] = None,
    retain: Annotated[str, typer.Option(help="How much of the log is kept (retain_bytes)")] = "256MiB",
    as_json: Annotated[bool, typer.Option("--json", help="For machines")] = False,
) -> None:
    """Say how many blocks of a model's KV cache fit in so much memory, and what the ledger takes beside them.

    Reads the model's configuration from this machine; nothing is downloaded. For a model with layers of several kinds
    it counts as if every layer kept every token: what an engine needs that gives all layers one block table.
    """
    device, host, kept = _bytes(memory), _bytes(host_memory), _bytes(retain)
    try:
        shape = shape_of(model, block_size=block_size, ranks=ranks, dtype=dtype)
        sizing = size(shape, block_size=block_size, memory=device, host_memory=host, retain_bytes=kept)
    except ModelError as error:
        raise CommandFailed(error) from error
    if as_json:
        kinds = {layers.kind: layers.number for layers in shape.layers}
        told = {"model_type": shape.model_type, "dtype": shape.dtype, "layers": kinds, **sizing._asdict()}
        told["shared_bytes"] = sizing.shared_bytes(ranks)
        line(printable_json(told))
    else:
        _print(shape, sizing, ranks)


def _print(shape: ModelShape, sizing: Sizing, ranks: int) -> None:
    table = Table(title=f"{shape.model_type}, {shape.dtype}, {ranks} rank(s)", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for layers in shape.layers:
        kind = f"window of {layers.window:,} tokens" if layers.window else "full attention"
        table.add_row("layers", f"{layers.number} x {kind}, {layers.block_bytes:,} bytes per block and rank")
    table.add_row("a block", f"{sizing.block_bytes:,} bytes per rank")
    table.add_row("device_blocks", f"{sizing.device_blocks:,} ({_shown(sizing.device_bytes)} per rank)")
    table.add_row("tokens on the device", _of_longest(sizing.tokens, shape.longest))
    if sizing.host_blocks:
        staging = f"{sizing.host_blocks:,} + {sizing.host_staging_blocks:,} staging"
        table.add_row("host_blocks", f"{staging} ({_shown(sizing.host_bytes)} per rank)")
    table.add_row("/dev/shm for the log", f"{_shown(sizing.log_bytes)} at most (retain_bytes and two segments)")
    table.add_row("/dev/shm for snapshots", f"{_shown(sizing.snapshot_bytes)} with every block cached")
    whole = f"{_shown(sizing.shared_bytes(ranks))} for the host pools of {ranks} rank(s), log and snapshots"
    table.add_row("/dev/shm in all", whole)
    output().print(table)


def _of_longest(tokens: int, longest: int) -> str:
    return f"{tokens:,}" + (f" ({tokens / longest:.1f} prompts of {longest:,})" if longest else "")


def _shown(amount: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount >= factor:
            return f"{amount / factor:.1f} {unit}"
    return f"{amount} bytes"
