"""``kvledger top``."""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import Name, the_one
from kvledger.cli.terminal import line, output, working
from kvledger.text import printable_json

if TYPE_CHECKING:
    from kvledger.debugger.export.occupancy import Occupancy
    from kvledger.debugger.top import Frame, HitRate, Top

_EVERY_S = 0.5
_MOST_TRANSFERS = 8
_BAR = 24
_COLOURS = {"cached": "blue", "private": "green", "in_flight": "yellow", "free": "bright_black"}


def top(
    name: Name = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame, then stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one frame as JSON")] = False,
) -> None:
    """What a ledger is doing right now: pools, hit rates, transfers, the oldest pin, who lags behind.

    A read-only observer: its engine notices nothing. Ends with the ledger, on q, or on Ctrl-C.
    """
    from kvledger.debugger.top import Top

    with until_asked(not once and not as_json):
        with working("reading the log"):
            observer = Top(the_one(name))
        try:
            observer.poll()  # what came while the log was read
            if as_json:
                line(printable_json(_as_json(observer.frame())))
            elif once:
                output().print(_render(observer.frame()))
            else:
                _watch(observer)
        finally:
            observer.close()


def _watch(observer: Top) -> None:
    with (
        until_signal() as stopped,
        _keys() as pressed,
        Live(_render(observer.frame()), console=output(), auto_refresh=False, screen=sys.stdout.isatty()) as live,
    ):
        while not stopped() and pressed(_EVERY_S) not in ("q", "Q"):
            ended = observer.ended
            seen = observer.poll()
            live.update(_render(observer.frame()), refresh=True)
            if ended and not seen:
                break
    output().print(_render(observer.frame()))
    if observer.ended:
        line(f"ledger {observer.ledger!r} has ended")


@contextmanager
def _keys() -> Iterator[Any]:
    """Inside, the yielded function waits so many seconds for a key, and returns it, or nothing."""
    import termios
    import time
    import tty

    if not sys.stdin.isatty():
        yield time.sleep
        return

    def pressed(timeout: float) -> str:
        return sys.stdin.read(1) if select.select([sys.stdin], [], [], timeout)[0] else ""

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _as_json(frame: Frame) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(part) for name, part in value._asdict().items()}
        return [plain(part) for part in value] if isinstance(value, list | tuple) else value

    found: dict[str, Any] = plain(frame)
    return found


def _render(frame: Frame) -> Group:
    head = Text.assemble(
        ("kvledger top", "bold"),
        f"  {frame.ledger}, written by ",
        f"process {frame.writer}" if frame.writer_alive else (f"process {frame.writer}, dead", "red"),
        f", epoch {frame.epoch}\n",
        f"   event {frame.sequence:,}, {frame.events_per_s:,.0f} events/s, the last one {_age(frame.last_event_s)} ago",
    )
    return Group(head, _pools(frame), _rates(frame), _pins(frame), _transfers(frame), _readers(frame))


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    return table


def _pools(frame: Frame) -> Table:
    table = _table("pool", "blocks", "free", "cached", "private", "in flight", "")
    for name, pool in (("device", frame.device), ("host", frame.host)):
        if pool.total:
            private = f"{pool.private:,}" if name == "device" else ""
            row = (f"{pool.total:,}", f"{pool.free:,}", f"{pool.cached:,}", private, f"{pool.in_flight:,}")
            table.add_row(name, *row, _bar(pool))
    return table


def _bar(pool: Occupancy) -> Text:
    bar = Text()
    cells = _BAR
    for name in ("private", "in_flight", "cached"):
        width = min(-(-getattr(pool, name) * _BAR // pool.total), cells)
        bar.append("█" * width, _COLOURS[name])
        cells -= width
    bar.append("░" * cells, _COLOURS["free"])
    return bar


def _rates(frame: Frame) -> Table:
    table = _table("hits", "asked for", "device", "host", "device evicted", "host evicted", "refused")
    device, host = frame.evicted_minute
    table.add_row("last minute", *_hits(frame.minute), f"{device:,}", f"{host:,}", f"{frame.refusals_minute:,}")
    table.add_row("in all", *_hits(frame.total), "", "", f"{frame.refusals:,}")
    return table


def _hits(rate: HitRate) -> tuple[str, str, str]:
    if not rate.asked:
        return "0", "", ""
    return f"{rate.asked:,}", f"{rate.device / rate.asked:.1%}", f"{rate.host / rate.asked:.1%}"


def _pins(frame: Frame) -> Text:
    text = f"   requests {frame.requests:,} ({frame.waiting:,} waiting), evictable blocks {frame.device_evictable:,}"
    if frame.oldest is not None:
        pin = frame.oldest
        waits = ", waiting" if pin.waits else ""
        text += f"\n   oldest pin: request {pin.key!r}, {_age(pin.age_s)}, {pin.blocks:,} blocks{waits}"
    return Text(text + "\n")


def _transfers(frame: Frame) -> Table | Text:
    if not frame.transfers:
        return Text("   no transfer in flight\n")
    table = _table("transfer", "direction", "blocks", "age")
    for one in frame.transfers[:_MOST_TRANSFERS]:
        direction = one.direction.replace("_", " ") + (", quarantined" if one.quarantined else "")
        table.add_row(f"{one.transfer}", direction, f"{one.blocks:,}", _age(one.age_s))
    if len(frame.transfers) > _MOST_TRANSFERS:
        table.add_row(f"and {len(frame.transfers) - _MOST_TRANSFERS:,} more", "", "", "")
    return table


def _readers(frame: Frame) -> Table | Text:
    if not frame.readers:
        return Text("   no worker or follower is registered")
    table = _table("reader", "process", "events behind", "heartbeat")
    for reader in frame.readers:
        beat = "" if reader.heartbeat_s is None else f"{_age(reader.heartbeat_s)} ago"
        pid = Text(f"{reader.pid}") if reader.alive else Text(f"{reader.pid}, dead", "red")
        table.add_row(reader.name, pid, f"{reader.lag:,}", beat)
    return table


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "longer than the log tells"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
