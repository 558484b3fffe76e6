"""``kvledger what-if``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from kvledger.cli.sources import Json, Src, in_json, reading
from kvledger.cli.terminal import line, output
from kvledger.cli.whole_log import reached
from kvledger.debugger import Source, SourceError
from kvledger.debugger.explain.wording import count
from statemachine.events import HostPolicy

if TYPE_CHECKING:
    from kvledger.debugger.whatif.plot import Line
    from kvledger.debugger.whatif.whatif import Answers, Result, Scenario

_LARGEST = 2**31 - 1
_Choice = TypeVar("_Choice", bound=Enum)


class Log(NamedTuple):
    """The log, and whom to tell how far the work is."""

    source: Source
    reached: Callable[[int], None]


def what_if(
    src: Src = None,
    device_blocks: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Blocks of the device pool; default: as recorded")
    ] = None,
    host_blocks: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Blocks of the host pool, 0 = none; default: as recorded")
    ] = None,
    host_policy: Annotated[
        str | None,
        typer.Option(metavar="POLICY[,...]", help="off, exclusive, write-through; default: as recorded, or exclusive"),
    ] = None,
    hints: Annotated[
        str | None,
        typer.Option(
            metavar="HINTS[,...]",
            help="What the cache is told when a request ends: recorded (default), none, or perfect: final where no "
            "later request of the log continues the prompt",
        ),
    ] = None,
    curve: Annotated[
        bool, typer.Option("--curve", help="The hit-rate curve over device blocks in one pass: device tier, no hints")
    ] = False,
    sample: Annotated[
        float | None, typer.Option(metavar="RATE", help="With --curve: remember this share of the unused blocks")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw hit rates over device blocks")] = None,
    as_json: Json = False,
) -> None:
    """What would the recorded traffic have come to in another cache?

    Requests come, grow, publish and end in the order of the log; everything else is decided anew by the real state
    machine. Lists multiply: every combination is a scenario, all of them run in one pass.
    Exit code 2, after the answer, if the log is damaged or cut off.
    """
    with reading(src, to_the_end=True) as (source, report):
        log = Log(source, reached(source, report))
        if not curve:
            if sample is not None:
                raise SourceError("--sample goes with --curve")
            _scenarios(log, _combinations(log, device_blocks, host_blocks, host_policy, hints), plot, as_json)
        elif host_blocks or host_policy or hints:
            raise SourceError("--curve is about the device tier without hints: leave the other settings out")
        else:
            rate = 1.0 if sample is None else sample
            if not 0 < rate <= 1:
                raise SourceError(f"--sample must be more than 0 and at most 1, not {rate:g}")
            _curve(log, _numbers("--device-blocks", device_blocks, 1) if device_blocks else [], rate, plot, as_json)


def _numbers(option: str, text: str, least: int) -> list[int]:
    numbers = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not least <= int(part) <= _LARGEST:
            raise SourceError(f"{option} takes whole numbers from {least} to {_LARGEST} with commas, not {text!r}")
        numbers.append(int(part))
    return numbers


def _choices(option: str, text: str, choices: type[_Choice]) -> list[_Choice]:
    names = {choice.name.lower().replace("_", "-"): choice for choice in choices}
    chosen = [part.strip() for part in text.split(",")]
    if wrong := [part for part in chosen if part not in names]:
        raise SourceError(f"{option} takes {', '.join(names)} with commas between, not {wrong[0]!r}")
    return [names[part] for part in chosen]


def _combinations(
    log: Log, device_blocks: str | None, host_blocks: str | None, host_policy: str | None, hints: str | None
) -> list[Scenario]:
    from kvledger.debugger.whatif.whatif import Hints, Scenario

    recorded = log.source.at(log.source.first)
    devices = _numbers("--device-blocks", device_blocks, 1) if device_blocks else [recorded.device.pool.capacity]
    hosts = _numbers("--host-blocks", host_blocks, 0) if host_blocks else [recorded.host.limit]
    policies: list[HostPolicy] = [recorded.policy if recorded.policy != HostPolicy.OFF else HostPolicy.EXCLUSIVE]
    if host_policy:
        policies = _choices("--host-policy", host_policy, HostPolicy)
    told = _choices("--hints", hints, Hints) if hints else [Hints.RECORDED]
    scenarios: dict[Scenario, None] = {}
    for hint, policy, host, device in itertools.product(told, policies, hosts, devices):
        tier = (host, policy) if host and policy != HostPolicy.OFF else (0, HostPolicy.OFF)
        scenarios[Scenario(device_blocks=device, host_blocks=tier[0], host_policy=tier[1], hints=hint)] = None
    return list(scenarios)


def _traffic(requests: int, blocks: int) -> str:
    return f"{count(requests, 'request')} for {count(blocks, 'block')}"


def _tiers(scenario: Scenario) -> str:
    if not scenario.host_blocks:
        return "no host tier"
    return f"{scenario.host_blocks:,} host blocks, {scenario.host_policy.name.lower().replace('_', '-')}"


def _scenarios(log: Log, scenarios: list[Scenario], plot: Path | None, as_json: bool) -> None:
    from kvledger.debugger.whatif.plot import Line
    from kvledger.debugger.whatif.whatif import what_if

    answers = what_if(log.source, scenarios, log.reached)
    if plot is not None:
        groups: dict[str, list[Result]] = {}
        for result in answers.results:
            groups.setdefault(f"{_tiers(result.scenario)}, hints: {result.scenario.hints}", []).append(result)
        lines = []
        for label, results in groups.items():
            results.sort(key=lambda result: result.scenario.device_blocks)
            rates = [result.device_hit_rate + result.host_hit_rate for result in results]
            lines.append(Line(label, [result.scenario.device_blocks for result in results], rates))
        _draw(log, lines, plot)
    if as_json:
        line(in_json(log.source, {"scenarios": [_as_json(result) for result in answers.results]}))
        return
    _print(log, answers)


def _print(log: Log, answers: Answers) -> None:

    first = answers.results[0]
    table = Table(
        title=f"what if: {log.source.name}, {_traffic(first.requests, first.blocks)}",
        title_justify="left",
        caption=Text(_remarks(answers)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    host = any(result.scenario.host_blocks for result in answers.results)
    names = ["device\nblocks", "hints", "device\nhits", "device\nevicted"]
    if host:
        names[1:1] = ["host\nblocks", "policy"]
        names += ["host\nhits", "host\nevicted", "copied\nout", "copied\nin"]
    for name in [*names, "stalls", "ended\nearly"]:
        table.add_column(Text(name), justify="left" if name in ("hints", "policy") else "right", no_wrap=True)
    for result in answers.results:
        scenario = result.scenario
        row = [
            f"{scenario.device_blocks:,}",
            str(scenario.hints),
            f"{result.device_hit_rate:.2%}",
            f"{result.device_evicted_blocks:,}",
        ]
        if host:
            row[1:1] = [f"{scenario.host_blocks:,}", scenario.host_policy.name.lower().replace("_", "-")]
            row += [
                f"{result.host_hit_rate:.2%}",
                f"{result.host_evicted_blocks:,}",
                f"{result.swapped_out_blocks + result.backed_up_blocks:,}",
                f"{result.swapped_in_blocks:,}",
            ]
        table.add_row(*row, f"{result.stalls:,}", f"{result.early_releases:,}")
    output().print(table)


def _as_json(result: Result) -> dict[str, object]:
    values = dataclasses.asdict(result)
    scenario = values.pop("scenario")
    scenario["host_policy"] = result.scenario.host_policy.name.lower().replace("_", "-")
    rates = {"device_hit_rate": result.device_hit_rate, "host_hit_rate": result.host_hit_rate}
    return {**scenario, **values, **rates}


def _remarks(answers: Answers) -> str:
    results = answers.results
    remarks = ["evicted and copied count blocks"]
    if answers.refused:
        refused = f"the recorded cache refused {count(answers.refused, 'time')}"
        remarks.append(f"{refused}: what the engine did about it is in this traffic too")
    if any(result.stalls for result in results):
        remarks.append("stalls: no room for a request or a step of one; the oldest requests were ended early for it")
    if any(result.too_large for result in results):
        most = max(result.too_large for result in results)
        remarks.append(f"longer than the device pool: up to {count(most, 'request')}, which ran without being cached")
    return "\n".join(remarks)


def _curve(log: Log, capacities: list[int], rate: float, plot: Path | None, as_json: bool) -> None:
    from kvledger.debugger.whatif.curve import curve
    from kvledger.debugger.whatif.plot import Line

    found = curve(log.source, capacities, rate, log.reached)
    if plot is not None:
        label = "device tier" if rate == 1 else f"device tier, {rate:g} of the blocks sampled"
        _draw(log, [Line(label, found.capacities, found.hit_rates)], plot)
    if as_json:
        line(in_json(log.source, dataclasses.asdict(found)))
        return
    table = Table(
        title=f"hit-rate curve: {log.source.name}, {_traffic(found.requests, found.blocks)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("device blocks", justify="right")
    table.add_column("hit rate", justify="right")
    table.add_column("")
    for capacity, hit_rate in zip(found.capacities, found.hit_rates):
        table.add_row(f"{capacity:,}", f"{hit_rate:.2%}", "█" * round(60 * hit_rate))
    output().print(table)


def _draw(log: Log, lines: list[Line], path: Path) -> None:
    from kvledger.debugger.whatif.plot import plot

    plot(lines, path, f"{Path(log.source.name).name}: what if")
