"""``kvledger misses``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from kvledger.cli.sources import From, Json, Src, To, in_json, reading, span
from kvledger.cli.terminal import line, output
from kvledger.cli.whole_log import reached
from kvledger.debugger import SourceError
from kvledger.debugger.explain.wording import count, namespace_name
from kvledger.debugger.source.places import clock
from kvledger.text import printable

if TYPE_CHECKING:
    from kvledger.debugger.misses.misses import Cause, Family, Misses


def misses(
    src: Src = None,
    begin: From = None,
    end: To = None,
    most: Annotated[int, typer.Option("--most", min=1, help="So many lines of each list, the largest")] = 5,
    words: Annotated[bool, typer.Option("--words", help="Show the tokens with which prompts depart")] = False,
    as_json: Json = False,
) -> None:
    """Tell why blocks were not in the cache when requests asked for them.

    Each block that a request asked for when it began is a hit or has one cause; what was before --from is read too,
    since it is why they miss. Lists say where prompts depart from those before, and whose blocks were evicted for whom.
    Exit code 2, after the answer, if the log is damaged or cut off.
    """
    from kvledger.debugger.misses.misses import misses as found_in

    with reading(src, to_the_end=True) as (source, report):
        start, stop = span(source, begin, end)
        stop = min(stop, source.last_state)
        if start > stop:
            raise SourceError(f"nothing from event {start} on has a state")
        found = found_in(source, start, stop, reached(source, report))
        if as_json:
            line(in_json(source, _as_json(found, words)))
            return
        asked = f"{count(found.blocks, 'block')} by {count(found.requests, 'request')}"
        line(f"asked for from event {start} to {stop}: {asked}")
        if found.blocks:
            _print(found, most, words)


def _print(found: Misses, most: int, words: bool) -> None:
    totals = found.by_cause()
    table = _table("", "blocks", "share")
    for cause, blocks in totals.items():
        if blocks:
            table.add_row(cause, f"{blocks:,}", f"{blocks / found.blocks:.1%}")
    output().print(table)
    _over_time(found)
    _families(found, most)
    for departure in found.departures[:most]:
        behind = f"{count(departure.departing, 'block')} that were there before or in part, {departure.new:,} new ones"
        run = f", behind run {departure.run}" if departure.run else ""
        tokens = " (token {}, not {})".format(*departure.tokens) if words else ""
        line(
            f"{count(departure.requests, 'prompt')} {'departs' if departure.requests == 1 else 'depart'} at token "
            f"{departure.token:,}{run}, from event {departure.since} on: {behind}; the last is request "
            f"{departure.request!r}, which departs from request {departure.other!r}{tokens}"
        )
    _spaces(found)
    for pushed in found.pushed[:most]:
        by = "ahead of need" if pushed.by is None else f"for those of {_family(found, pushed.by)}"
        shortest, middle, longest = pushed.ages_s
        line(
            f"{count(pushed.blocks, 'block')} of {_family(found, pushed.family)} had been evicted {by}, "
            f"{middle:.1f} s before ({shortest:.1f} to {longest:.1f}); the last at event {pushed.event}"
        )


def _over_time(found: Misses) -> None:
    times: dict[int, Counter[Cause]] = {}
    for (time, _, cause), blocks in found.counts.items():
        times.setdefault(time, Counter())[cause] += blocks
    table = _table("from", "blocks", "hits", "most misses")
    for time in sorted(times):
        table.add_row(clock(found.times_ns[time]), *_row(times[time]))
    output().print(table)


def _families(found: Misses, most: int) -> None:
    families: dict[Family, Counter[Cause]] = {}
    for (_, family, cause), blocks in found.counts.items():
        families.setdefault(family, Counter())[cause] += blocks
    if len(families) < 2:
        return
    table = _table("requests that begin as", "blocks", "hits", "most misses")
    for family in sorted(families, key=lambda family: (-families[family].total(), family))[:most]:
        table.add_row(_family(found, family), *_row(families[family]))
    output().print(table)


def _spaces(found: Misses) -> None:
    """Who pushes whom out, where several adapters or tenants share the cache."""
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    for pushed in found.pushed:
        if pushed.by is not None:
            pairs[pushed.family.namespace, pushed.by.namespace] += pushed.blocks
    if len({namespace for pair in pairs for namespace in pair}) < 2:
        return
    for (namespace, other), blocks in sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0])):
        by = "itself" if other == namespace else namespace_name(other)
        line(f"{namespace_name(namespace)}: {count(blocks, 'block')} had been evicted for {by}")


def _row(causes: Counter[Cause]) -> tuple[str, str, str]:
    from kvledger.debugger.misses.misses import HITS

    hits = sum(causes[cause] for cause in HITS)
    missed = [(blocks, cause) for cause, blocks in causes.items() if cause not in HITS]
    worst = max(missed, default=None)
    return f"{causes.total():,}", f"{hits / causes.total():.1%}", f"{worst[1]} ({worst[0]:,})" if worst else ""


def _family(found: Misses, family: Family) -> str:
    space = f" ({namespace_name(family.namespace)})" if family.namespace else ""
    return f"{found.names[family]!r}{space}"


def _table(first: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="left" if name == "most misses" else "right", no_wrap=True)
    return table


def _as_json(found: Misses, words: bool) -> dict[str, object]:
    def named(family: Family | None) -> dict[str, str] | None:
        if family is None:
            return None
        space = printable(namespace_name(family.namespace))
        return {"namespace": space, "first_block": family.first, "begun_by": found.names[family]}

    counts: Iterable[tuple[tuple[int, Family, Cause], int]] = sorted(found.counts.items())
    return {
        "requests": found.requests,
        "blocks": found.blocks,
        "causes": {str(cause): blocks for cause, blocks in found.by_cause().items()},
        "counts": [
            {"from_ns": found.times_ns[time], "family": named(family), "cause": str(cause), "blocks": blocks}
            for (time, family, cause), blocks in counts
        ],
        "departures": [
            {name: value for name, value in departure._asdict().items() if words or name != "tokens"}
            for departure in found.departures
        ],
        "evicted_for": [
            {**pushed._asdict(), "family": named(pushed.family), "by": named(pushed.by)} for pushed in found.pushed
        ],
    }
