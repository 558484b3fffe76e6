"""Spans: what OpenTelemetry is told about a request is what happened to it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from ipc import KvlogReader, LogReader, Record
from kvledger import CacheConfig, CacheManager, HostPolicy, OutOfBlocks, ReleaseReason
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from kvledger.telemetry.spans import RequestSpans
from statemachine.records.replay import event_of
from tests.telemetry.test_metrics import traffic
from tests.waiting import PATIENCE_S, wait_until

PROMPT = np.arange(40, dtype=np.int32)


def spans_of(records: list[Record]) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    RequestSpans(provider.get_tracer("test")).feed(records)
    return list(exporter.get_finished_spans())


def roots(spans: list[ReadableSpan]) -> dict[str, ReadableSpan]:
    """By name of the request."""
    return {str((span.attributes or {})["kvledger.request"]): span for span in spans if span.parent is None}


def phases(spans: list[ReadableSpan], root: ReadableSpan) -> list[str]:
    """Names of a request's phases in order; they lie within it, end to end."""
    assert root.context is not None and root.start_time is not None and root.end_time is not None
    below = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    below.sort(key=lambda span: span.start_time or 0)
    at = root.start_time
    for span in below:
        assert span.start_time == at and span.end_time is not None and span.end_time > at
        at = span.end_time
    assert at == root.end_time or not below
    return [span.name.removeprefix("kvledger.") for span in below]


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    config = CacheConfig(block_size=4, device_blocks=16)
    with CacheManager.create(f"spans-{os.getpid()}", config) as manager:
        yield manager


def log_of(manager: CacheManager) -> list[Record]:
    reader = LogReader(manager.name)
    records = reader.poll()
    reader.close()
    return records


def test_hits_refusals_and_phases(manager: CacheManager) -> None:
    manager.admit("first", PROMPT)
    manager.cache("first")
    with pytest.raises(OutOfBlocks):
        manager.admit("second", PROMPT + 100)
    with pytest.raises(OutOfBlocks):
        manager.allocate({"first": 7})
    manager.release("first")
    manager.admit("second", PROMPT + 100)
    manager.release("second", ReleaseReason.FAILED)
    manager.admit("third", PROMPT[:10])
    manager.admit("still running", PROMPT[:4])
    manager.cache("third", 2)
    manager.release("third")
    spans = spans_of(log_of(manager))
    found = roots(spans)
    assert set(found) == {"first", "second", "third"}
    assert phases(spans, found["first"]) == ["computing", "caching"]
    assert phases(spans, found["second"]) == ["queued", "computing"]
    first, second, third = (dict(found[key].attributes or {}) for key in ("first", "second", "third"))
    assert first["kvledger.prompt_blocks"] == 10 and first["kvledger.device_hit_blocks"] == 0
    assert first["kvledger.cached_blocks"] == 10 and first["kvledger.refusals"] == 1
    assert second["kvledger.refusals"] == 1 and second["kvledger.release_reason"] == "failed"
    assert third["kvledger.device_hit_blocks"] == 2 and third["kvledger.allocated_blocks"] == 1
    (event,) = found["first"].events
    assert event.name == "refused" and dict(event.attributes or {})["kvledger.wanted_blocks"] == 7
    assert found["second"].status.status_code == StatusCode.ERROR
    assert found["first"].status.status_code == StatusCode.UNSET


def test_requests_that_wait_for_real_copies(tmp_path: Path) -> None:
    record = tmp_path / "run.kvlog"
    options = RunOptions(device_blocks=400, host_blocks=800, layers=2, block_bytes=64, in_flight=4, record=record)
    summary = Run(sample.generate(200, seed=1), options).execute()
    reader = KvlogReader(record)
    records = reader.poll()
    reader.close()
    spans = spans_of(records)
    found = roots(spans)
    assert len(found) == summary.requests
    waited = 0
    for root in found.values():
        of = phases(spans, root)
        waited += "waiting" in of
        assert of[-1] in ("caching", "computing")
    assert waited
    for name in ("device", "host"):
        hits = sum(int(str((root.attributes or {})[f"kvledger.{name}_hit_blocks"])) for root in found.values())
        assert hits == summary.stats[f"{name}_hit_blocks"]


def test_growth_that_waits_for_blocks_that_are_still_copied_out() -> None:
    host = {"host_blocks": 32, "host_policy": HostPolicy.EXCLUSIVE, "ranks": 1, "block_bytes": 64}
    with CacheManager.create(f"growth-{os.getpid()}", CacheConfig(block_size=4, device_blocks=12, **host)) as manager:  # type: ignore[arg-type]
        manager.admit("old", PROMPT)
        manager.cache("old")
        manager.release("old")
        manager.admit("new", PROMPT[:8] + 100)
        manager.cache("new")
        manager.allocate({"new": 5})
        manager.wait("new")
        manager.release("new")
        spans = spans_of(log_of(manager))
    assert phases(spans, roots(spans)["new"]) == ["computing", "caching", "waiting", "caching"]


@pytest.mark.parametrize("policy", HostPolicy)
def test_any_traffic_gives_one_span_per_request_that_ended(policy: HostPolicy) -> None:
    records = [record for transaction in traffic(policy, 1) for record in transaction]
    spans = spans_of(records)
    ended = [event_of(record) for record in records if record.kind == 8]
    assert len(roots(spans)) == len(ended) > 50
    for root in roots(spans).values():
        phases(spans, root)


class Collector(http.server.ThreadingHTTPServer):
    """What an OpenTelemetry collector does with OTLP over HTTP, without the rest."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.names: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        assert isinstance(self.server, Collector)
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.server.names += [span.name for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_the_command_sends_spans_to_a_collector() -> None:
    collector = Collector()
    name = f"sent-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=16)) as manager:
        manager.admit("before", PROMPT)
        manager.release("before")
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        command = [sys.executable, "-m", "kvledger.cli", "spans", name, "--endpoint", endpoint]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None and process.stderr.readline() == f"following {name} from event 5 on\n"
        manager.admit("after", PROMPT)
        manager.cache("after")
        manager.release("after")
        wait_until(
            "the span of a request arrives, or the command ends",
            lambda: "kvledger.request" in collector.names or process.poll() is not None,
        )
        assert process.poll() is None
    assert process.wait(PATIENCE_S) == 0
    process.stderr.close()
    collector.shutdown()
    collector.server_close()
    assert sorted(collector.names) == ["kvledger.caching", "kvledger.computing", "kvledger.request"]


def test_the_command_refuses_what_is_no_ledger() -> None:
    command = [sys.executable, "-m", "kvledger.cli", "spans", "no-such-ledger"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2 and "no ledger" in done.stderr and "Traceback" not in done.stderr
