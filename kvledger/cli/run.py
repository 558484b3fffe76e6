"""``kvledger run``."""

from __future__ import annotations

import dataclasses
import os
import signal
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvledger.cli.exits import FAILED, INTERRUPTED
from kvledger.cli.terminal import errors, line, output, say
from kvledger.config import ConfigError
from kvledger.debugger.explain.wording import count
from kvledger.run import sample, traces
from kvledger.run.run import Crashes, Run, RunOptions, Summary
from kvledger.run.traces import Trace
from kvledger.text import printable_json
from statemachine.events import HostPolicy

if TYPE_CHECKING:
    from kvledger.run.crashes import CrashRun


_HOST_BLOCKS = 2048
_OWN_DIGEST = " (this run's own: pools have random ids, copies end when they end; the same each time with --no-data)"


class Policy(StrEnum):
    """Host policies as they are typed."""

    OFF = "off"
    EXCLUSIVE = "exclusive"
    WRITE_THROUGH = "write-through"


class Clock(StrEnum):
    """When requests end."""

    WINDOW = "window"
    TRACE = "trace"


_TracePath = Annotated[
    Path | None, typer.Argument(help="Token trace or Mooncake trace (docs/traces.md); default: a sample")
]
_HostBlocks = Annotated[
    int | None, typer.Option(min=0, help="Blocks of the host pool; 0 = no host tier; default: 2048")
]
_HostPolicy = Annotated[
    Policy | None,
    typer.Option(help="When blocks are copied to the host; off = no host tier; default: exclusive"),
]
_Clock = Annotated[Clock, typer.Option(help="window: the oldest ends when one arrives; trace: virtual clock")]
_PerRequest = Annotated[Path | None, typer.Option(help="Write hits per request to this JSONL file (must not exist)")]
_Kills = Annotated[
    list[str] | None,
    typer.Option(help="Kill engine@EVENT, worker:RANK@EVENT or follower@EVENT, and go on; repeatable"),
]


def run(
    trace: _TracePath = None,
    device_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the device pool")] = 1024,
    host_blocks: _HostBlocks = None,
    host_policy: _HostPolicy = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block (Mooncake traces: 4)")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks, one worker process each")] = 2,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    block_bytes: Annotated[int, typer.Option(min=8, help="Bytes per block, layer and rank")] = 1024,
    checksums: Annotated[bool, typer.Option("--checksums", help="Look at host blocks before they return")] = False,
    requests: Annotated[int | None, typer.Option(min=1, help="Only so many requests; sample: how many")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample")] = 0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests in flight at most")] = 64,
    clock: _Clock = Clock.WINDOW,
    prefill_ms: Annotated[float, typer.Option(min=0, help="With --clock trace")] = 1000.0,
    token_ms: Annotated[float, typer.Option(min=0, help="With --clock trace")] = 30.0,
    no_data: Annotated[bool, typer.Option("--no-data", help="Decisions and log only: no pools, no workers")] = False,
    per_request: _PerRequest = None,
    record: Annotated[Path | None, typer.Option(help="Write the log to this .kvlog file (must not exist)")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the ledger in /dev/shm for inspection")] = False,
    name: Annotated[str | None, typer.Option(help="Name of the ledger; default run-PID")] = None,
    crash: _Kills = None,
    chaos: Annotated[int | None, typer.Option(help="Kill engine and workers at random events, drawn from SEED")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON")] = False,
) -> None:
    """Drive a trace through a real manager, log and worker processes; verify every byte; summarise.

    A request that is larger than the device pool bypasses the cache: what is cached of it is counted, and nothing is
    cached for it. Where there is no room for a request, requests in flight are ended early, the oldest first, as many
    as it takes. The formats of traces are in docs/traces.md.
    """
    blocks, policy = _host_tier(host_blocks, host_policy)
    _expect_new("--per-request", per_request)
    _expect_new("--record", record)
    options = RunOptions(
        device_blocks=device_blocks,
        host_blocks=blocks,
        host_policy=policy,
        block_size=block_size,
        ranks=ranks,
        layers=layers,
        block_bytes=block_bytes,
        checksums=checksums,
        data=not no_data,
        in_flight=in_flight,
        trace_clock=clock == Clock.TRACE,
        prefill_ms=prefill_ms,
        token_ms=token_ms,
        per_request=per_request,
        record=record,
        keep=keep,
    )
    loaded = _load(trace, requests, seed)
    if crash or chaos is not None:
        source = {"path": str(trace) if trace else None, "requests": len(loaded.requests), "seed": seed}
        job: Run | CrashRun = _with_crashes(source, options, crash or [], chaos)
    else:
        job = Run(loaded, options)
    _report(_execute(loaded, job, name), options, as_json)


def _with_crashes(source: dict[str, Any], options: RunOptions, kills: list[str], chaos: int | None) -> CrashRun:
    from kvledger.run.crashes import Crash, CrashRun

    return CrashRun(source, source["requests"], options, [Crash.parse(text) for text in kills], chaos)


def _report(summary: Summary, options: RunOptions, as_json: bool) -> None:
    """Print what a run came to. Raises :class:`typer.Exit` unless all went well."""
    if as_json:
        rates = {"device_hit_rate": summary.device_hit_rate, "host_hit_rate": summary.host_hit_rate}
        line(printable_json(dataclasses.asdict(summary) | rates))
    else:
        _print(summary, options)
    if summary.replay_digest != summary.digest:
        say("FAILED", "the replay of the log has another digest than the run")
        raise typer.Exit(FAILED)
    if summary.crashes is not None and summary.crashes.lost_events:
        say("FAILED", "events were lost that had been published")
        raise typer.Exit(FAILED)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)


def _host_tier(blocks: int | None, policy: Policy | None) -> tuple[int, HostPolicy]:
    """The host tier; either option alone decides whether there is one. Raises :class:`ConfigError`."""
    if blocks and policy == Policy.OFF:
        raise ConfigError(f"--host-policy off does not go with --host-blocks {blocks}: leave one of them out")
    if blocks == 0 and policy not in (None, Policy.OFF):
        raise ConfigError(f"--host-blocks 0 does not go with --host-policy {policy}: leave one of them out")
    if blocks == 0 or policy == Policy.OFF:
        return 0, HostPolicy.OFF
    chosen = Policy.EXCLUSIVE if policy is None else policy
    return _HOST_BLOCKS if blocks is None else blocks, HostPolicy[chosen.name]


def _expect_new(option: str, path: Path | None) -> None:
    """Look at a file that is to be written before anything is started. Raises :class:`ConfigError`."""
    if path is None:
        return
    if path.exists():
        raise ConfigError(f"{option}: {path} exists: remove it, or choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{option}: nothing can be written to {path.parent}")


def _load(path: Path | None, requests: int | None, seed: int) -> Trace:
    if path is None:
        return sample.generate(400 if requests is None else requests, seed)
    trace = traces.load(path)
    return trace if requests is None else trace._replace(requests=trace.requests[:requests])


def _execute(trace: Trace, job: Run | CrashRun, name: str | None) -> Summary:
    progress = Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        console=errors(),
        transient=True,
    )
    task = progress.add_task("requests", total=len(trace.requests), rate="")

    def show(done: int) -> None:
        speed = progress.tasks[0].speed
        progress.update(task, completed=done, rate=f"{speed:.0f}/s" if speed else "")

    job.progress = show

    def stop(number: int, frame: FrameType | None) -> None:
        job.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            return job.execute(name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(summary: Summary, options: RunOptions) -> None:
    table = Table(title=f"kvledger run: {summary.trace}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    state = "all served"
    if summary.bypassed:
        served = summary.requests - summary.bypassed
        state = f"{served:,} served, {summary.bypassed:,} bypassed"
    if summary.interrupted:
        state = f"interrupted, so far {state}" if summary.bypassed else "interrupted, so far"
    rate = summary.requests / max(summary.seconds, 1e-9)
    stats = summary.stats
    table.add_row("requests", f"{summary.requests:,} ({state}) in {summary.seconds:.1f} s, {rate:,.0f}/s")
    table.add_row("blocks asked for", f"{summary.blocks:,}")
    table.add_row("device hits", f"{summary.device_hit_blocks:,} ({summary.device_hit_rate:.1%})")
    table.add_row("host hits", f"{summary.host_hit_blocks:,} ({summary.host_hit_rate:.1%})")
    if summary.bypassed:
        table.add_row("bypassed", f"{summary.bypassed:,}: larger than the device pool, nothing is cached for them")
    if summary.early_releases:
        table.add_row(
            "left the window early",
            f"{summary.early_releases:,} served requests, to make room: at most {options.in_flight} are in flight",
        )
    evicted = f"{stats['device_evicted_blocks']:,} device, {stats['host_evicted_blocks']:,} host blocks"
    table.add_row("evicted", evicted)
    moved = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in summary.moved_blocks.items() if count)
    speed = f" ({_speed(summary.moved_gb_per_s)} over the run)" if options.data and moved else ""
    table.add_row("blocks moved", (moved or "none") + speed)
    for phase, times in summary.phases_us.items():
        table.add_row(f"{phase} µs", f"p50 {times['p50']:,}  p99 {times['p99']:,}")
    if options.data:
        table.add_row("bytes written / verified", f"{summary.written_bytes:,} / {summary.verified_bytes:,}")
    table.add_row("events", f"{summary.events:,}")
    table.add_row("invariants", f"all hold, checked {count(summary.invariants_checked, 'time')} in the replay")
    table.add_row("digest", summary.digest + (_OWN_DIGEST if options.data else ""))
    agree = "equal" if summary.replay_digest == summary.digest else f"DIFFERENT: {summary.replay_digest}"
    table.add_row("replay from the log", agree)
    if summary.crashes is not None:
        _add_crashes(table, summary.crashes)
    if options.keep:
        table.add_row("kept", f"ledger {summary.ledger!r} in /dev/shm")
    output().print(table)


def _speed(gb_per_s: float) -> str:
    """Bytes per second in the unit that shows three digits of it."""
    return f"{gb_per_s:.2f} GB/s" if gb_per_s >= 0.1 else f"{gb_per_s * 1e3:.3g} MB/s"


def _add_crashes(table: Table, crashes: Crashes) -> None:
    kills = f"engine {crashes.engine:,}, workers {crashes.workers:,}, followers {crashes.followers:,}"
    table.add_row("killed", kills)
    if crashes.recovery_ms:
        times = sorted(crashes.recovery_ms)
        table.add_row("recovery ms", f"median {times[len(times) // 2]:,}  longest {times[-1]:,}")
    table.add_row("published events lost", f"{crashes.lost_events:,}")
    if crashes.not_reached:
        table.add_row("not reached", ", ".join(crashes.not_reached))
