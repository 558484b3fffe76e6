"""``kvledger spans``."""

from __future__ import annotations

import os
from typing import Annotated
from urllib.parse import urlsplit

import typer

from kvledger.cli.exits import FAILED, CommandFailed
from kvledger.cli.interrupts import until_asked, until_signal
from kvledger.cli.ledgers import Name, cannot_follow, the_one
from kvledger.cli.terminal import note


def spans(
    name: Name = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="OTLP over HTTP, like http://127.0.0.1:4318/v1/traces; default: OTEL_EXPORTER_OTLP_ENDPOINT"),
    ] = None,
) -> None:
    """Follow a ledger and send a span per request, with its phases, to an OpenTelemetry collector.

    Begins with the requests that are matched from now on; the names of requests are attributes. Runs until the ledger
    is removed, or Ctrl-C.
    """
    with until_asked():
        _spans(the_one(name), endpoint)


def _spans(name: str, endpoint: str | None) -> None:
    from ipc import LedgerError, Overrun

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        from kvledger.telemetry.spans import RequestSpans
    except ModuleNotFoundError as error:
        raise CommandFailed("this needs OpenTelemetry: pip install 'kvledger[otel]'") from error
    from statemachine.errors import InvariantViolation
    from statemachine.records.codec import CodecError
    from workers.followers.follow import Follower

    if wrong := _wrong_endpoint(endpoint):
        raise CommandFailed(wrong)
    try:
        follower = Follower(name)
        while old := follower.poll():  # what ended before is not told again at each start
            follower.apply(old)
    except LedgerError as error:
        raise CommandFailed(cannot_follow(name, error)) from error
    except (InvariantViolation, CodecError) as error:
        raise CommandFailed(error, FAILED) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "kvledger", "kvledger.ledger": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    found = RequestSpans(provider.get_tracer("kvledger"), follower.state)
    note(f"following {name} from event {follower.sequence + 1:,} on")
    try:
        with until_signal() as stopped:
            while not stopped():
                try:
                    records = follower.poll(0.25)
                except Overrun:
                    skipped = follower.resynchronise()
                    note(f"events {skipped.first:,} to {skipped.last:,} were gone before they were read")
                    found.go_on(follower.state)
                    continue
                found.feed(records)
                if not records and not follower.reader.exists():
                    break
    except (InvariantViolation, CodecError) as error:
        raise CommandFailed(error, FAILED) from error
    finally:
        provider.shutdown()
        follower.close()


_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def _wrong_endpoint(option: str | None) -> str:
    """What is wrong with where spans are to be sent; the exporter itself would only drop them. Empty: nothing."""
    given = {"--endpoint": option, **{name: os.environ.get(name) or None for name in _VARIABLES}}
    name, url = next(((name, url) for name, url in given.items() if url is not None), ("", ""))
    if not name:
        return ""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return ""
    except ValueError:
        pass
    return f"{name} {url!r} is no URL of a collector: it looks like http://127.0.0.1:4318/v1/traces"
