"""``kvledger explain``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from kvledger.cli.sources import At, Json, Log, in_json, place, reading
from kvledger.cli.terminal import line
from kvledger.cli.tiers import TierName
from kvledger.debugger import SourceError
from kvledger.debugger.explain import explain
from kvledger.debugger.source.places import clock


class What(StrEnum):
    """What can be explained."""

    BLOCK = "block"
    REQUEST = "request"
    HASH = "hash"
    TRANSFER = "transfer"


def explain_command(
    src: Log,
    what: Annotated[What, typer.Argument()],
    which: Annotated[
        str, typer.Argument(metavar="N|R|H|T", help="Block, request (its name, or #NUMBER), hash, transfer")
    ],
    at: At = None,
    tier: Annotated[TierName, typer.Option(help="Tier of a block")] = TierName.DEVICE,
    most: Annotated[int, typer.Option("--most", min=1, help="So many facts, the newest")] = explain.MOST_FACTS,
    as_json: Json = False,
) -> None:
    """Tell the history of a block, a request, a transfer or a content: who did what to it, and why."""
    with reading(src) as (source, report):
        sequence = place(source, at)
        match what:
            case What.BLOCK:
                told = explain.explain_block(source, _number(which), tier.tier, sequence, most)
            case What.REQUEST:
                told = explain.explain_request(source, which, sequence, most)
            case What.HASH:
                told = explain.explain_hash(source, which, sequence, most, report)
            case What.TRANSFER:
                told = explain.explain_transfer(source, _number(which), sequence, most)
        if as_json:
            line(in_json(source, {**told._asdict(), "history": [fact._asdict() for fact in told.history]}))
            return
        line(f"{told.subject}, after event {told.at}:")
        for sentence in told.now:
            line(f"  {sentence}")
        line("how that came about:" if told.history else "nothing in the log is about it")
        if told.omitted:
            line(f"  … {told.omitted}")
        for fact in told.history:
            step = f"step {fact.step:<6}" if fact.step else ""
            line(f"  {fact.sequence:>8}  {clock(fact.time_ns)}  {step}{fact.text}")


def _number(text: str) -> int:
    if not text.isdecimal():
        raise SourceError(f"{text!r} is no number")
    return int(text)
