"""``kvledger spans``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvledger.cli.exits import BAD_INPUT, FAILED


def spans(
    name: Annotated[str, typer.Argument(help="Name of a ledger on this machine")],
    endpoint: Annotated[
        str | None,
        typer.Option(help="OTLP over HTTP, like http://127.0.0.1:4318/v1/traces; default: OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = None,
) -> None:
    """Follow a ledger and send a span per request, with its phases, to an OpenTelemetry collector.

    Begins with the requests that are matched from now on; the names of requests are attributes. Runs until the ledger
    is removed, or Ctrl-C.
    """
    from ipc import LedgerError, Overrun
    from kvledger.cli.stopping import until_signal

    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from kvledger.telemetry import RequestSpans
    except ModuleNotFoundError as error:
        errors.print("[bold red]error[/] this needs OpenTelemetry: pip install 'kvledger\\[otel]'")
        raise typer.Exit(BAD_INPUT) from error
    from statemachine.codec import CodecError
    from statemachine.errors import InvariantViolation
    from workers.follow import Follower

    try:
        follower = Follower(name)
        while old := follower.poll():  # what ended before is not told again at each start
            follower.apply(old)
    except (LedgerError, InvariantViolation, CodecError) as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT if isinstance(error, LedgerError) else FAILED) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "kvledger", "kvledger.ledger": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    found = RequestSpans(provider.get_tracer("kvledger"), follower.state)
    errors.print(f"following {name} from event {follower.sequence + 1:,} on")
    try:
        with until_signal() as stopped:
            while not stopped():
                try:
                    records = follower.poll(0.25)
                except Overrun:
                    skipped = follower.resynchronise()
                    errors.print(f"events {skipped.first:,} to {skipped.last:,} were gone before they were read")
                    found.go_on(follower.state)
                    continue
                found.feed(records)
                if not records and not follower.reader.exists():
                    break
    except (InvariantViolation, CodecError) as error:
        errors.print(f"[bold red]FAILED[/] {error}")
        raise typer.Exit(FAILED) from error
    except LedgerError as error:
        errors.print(f"[bold red]error[/] {error}")
        raise typer.Exit(BAD_INPUT) from error
    finally:
        provider.shutdown()
        follower.close()
