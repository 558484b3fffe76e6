"""``kvledger metrics``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvledger.cli.exits import BAD_INPUT, FAILED


def metrics(
    name: Annotated[str, typer.Argument(help="Name of a ledger on this machine")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 9477,
    address: Annotated[str, typer.Option(help="Address to listen on")] = "127.0.0.1",
) -> None:
    """Follow a ledger and serve its metrics to Prometheus, without touching the engine.

    Runs until the ledger is removed, or Ctrl-C; it outlives the engine, and goes on when that is started again.
    Exit code 1: an event contradicts the state before it (the last metrics name it).
    """
    from ipc import LedgerError
    from kvledger.cli.stopping import until_signal

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        from prometheus_client import CollectorRegistry, start_http_server

        from kvledger.metrics.collectors import PictureCollector
    except ModuleNotFoundError as error:
        errors.print("[bold red]error[/] this needs prometheus_client: pip install 'kvledger\\[metrics]'")
        raise typer.Exit(BAD_INPUT) from error
    from kvledger.metrics.exporter import Exporter

    try:
        exporter = Exporter(name)
    except LedgerError as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
    registry = CollectorRegistry()
    registry.register(PictureCollector(exporter.picture))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        exporter.close()
        errors.print(f"[bold red]error[/] cannot listen on {address}:{port}: {error.strerror}; choose another --port")
        raise typer.Exit(BAD_INPUT) from error
    errors.print(f"serving http://{address}:{server.server_port}/metrics")
    try:
        with until_signal() as stopped:
            while not stopped() and (exporter.step(0.25) or exporter.follower.reader.exists()):
                pass
    except LedgerError as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        exporter.close()
    if exporter.contradiction:
        raise typer.Exit(FAILED)
