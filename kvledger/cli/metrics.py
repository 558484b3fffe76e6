"""``kvledger metrics``."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from kvledger.cli.exits import FAILED, CommandFailed
from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import Name, cannot_follow, the_one
from kvledger.cli.terminal import note, say

if TYPE_CHECKING:
    from kvledger.telemetry.collectors import Picture


def metrics(
    name: Name = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 9477,
    address: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
) -> None:
    """Follow a ledger and serve its metrics to Prometheus, without touching the engine.

    Runs until the ledger is removed, or Ctrl-C; it outlives the engine, and goes on when that is started again.
    A NAME with * (in quotes: '*', 'chat-*') stands for every ledger of this machine that fits, those to come included;
    that runs until Ctrl-C.
    Exit code 1: an event contradicts the state before it (the last metrics name it).
    """
    with until_asked():
        if name is not None and "*" in name:
            _metrics_of_all(name, port, address)
        else:
            _metrics(the_one(name), port, address)


def _metrics(name: str, port: int, address: str) -> None:
    from ipc import LedgerError

    _expect_prometheus()
    from kvledger.telemetry.exporter import Exporter

    try:
        exporter = Exporter(name)
    except LedgerError as error:
        raise CommandFailed(cannot_follow(name, error)) from error
    with (
        closing(exporter),
        _served(lambda: [exporter.picture()], port, address),
        until_signal() as stopped,
    ):
        told = False
        while not stopped() and (exporter.step(0.25) or exporter.follower.reader.exists()):
            if exporter.contradiction and not told:
                told = True
                what = f"the last metrics are served on: kvledger check {name} shows more"
                say("FAILED", f"{name} contradicts itself at event {exporter.contradiction}, {what}")
    if exporter.contradiction:
        raise typer.Exit(FAILED)


def _metrics_of_all(pattern: str, port: int, address: str) -> None:
    _expect_prometheus()
    from kvledger.telemetry.host import HostExporter

    with (
        closing(HostExporter(pattern)) as exporter,
        _served(exporter.pictures, port, address),
        until_signal() as stopped,
    ):
        while not stopped():
            exporter.step(0.25)


def _expect_prometheus() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise CommandFailed("this needs prometheus_client: pip install 'kvledger[metrics]'") from error


@contextmanager
def _served(pictures: Callable[[], Iterable[Picture]], port: int, address: str) -> Iterator[None]:
    """Inside, what is pictured is served to Prometheus."""
    from prometheus_client import CollectorRegistry, start_http_server

    from kvledger.telemetry.collectors import PictureCollector

    registry = CollectorRegistry()
    registry.register(PictureCollector(pictures))
    try:
        server, thread = start_http_server(port, address, registry)
    except (OSError, UnicodeError) as error:
        raise CommandFailed(_cannot_listen(address, port, error)) from error
    note(f"serving http://{address}:{server.server_port}/metrics")
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _cannot_listen(address: str, port: int, error: OSError | UnicodeError) -> str:
    """Which of the two is at fault."""
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"cannot listen on {address}: port {port} is in use; choose another --port, or 0 for any that is free"
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return f"cannot listen on {address}: port {port} is not for everybody; choose a --port from 1024 on"
    why = error.strerror if isinstance(error, OSError) else "no name of a host"
    return f"cannot listen on --address {address}: {why}; it must be one of this machine, like 127.0.0.1 or 0.0.0.0"
