"""OpenTelemetry spans of requests, made from the log: the engine pays nothing, whether somebody wants them or not.

One span per request, from the moment it was matched to its release, with what it hit as attributes, and below it one
span per phase:

* ``kvledger.queued``: refused for want of room, until it was admitted (only if it was refused);
* ``kvledger.manager.wait``: until the copies that it waited for had ended (whenever it waited);
* ``kvledger.computing``: until its first blocks were cached;
* ``kvledger.caching``: until it was released.

Refusals while it runs (growth for which there was no room) are events of its span. Needs the extra ``otel``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode, Tracer, set_span_in_context

from kvledger.telemetry.derivation import TimedRecord
from kvledger.text import printable
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksTrimmed,
    Event,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    TransferFinished,
    TransferStarted,
)
from statemachine.records.replay import event_of, step
from statemachine.state.state import State

_QUEUED_AT_MOST = 10_000
"""So many requests that were refused and never came back are remembered."""


class _Live:
    """A request: its span, and the phase it is in."""

    def __init__(self, span: Span, now: int) -> None:
        self.span = span
        self.since = now
        """When its present phase began, in ns."""
        self.cached = 0
        self.allocated = 0
        self.extended = 0
        self.refusals = 0

    def phase(self) -> str:
        """What it does when it does not wait."""
        return "caching" if self.cached else "computing"


class RequestSpans:
    """Turns a log into spans.

    ::

        spans = RequestSpans(trace.get_tracer("kvledger"), follower.state)
        while True:
            spans.feed(follower.poll(timeout=1.0))

    Args:
        tracer: where the spans go.
        state: what the records continue; ``None``: they begin with the first event of a ledger. Requests that live in
            it already get no span: their beginning was not seen.
        parent: by name of a request, the context that its span belongs to; default: a trace of its own.
    """

    def __init__(
        self,
        tracer: Tracer,
        state: State | None = None,
        parent: Callable[[str], Context | None] = lambda request: None,
    ) -> None:
        self._tracer = tracer
        self._parent = parent
        self.go_on(state)

    def go_on(self, state: State | None) -> None:
        """Go on from another state: what lies between was not seen, and spans that had begun are given up."""
        self.state = state
        self._live: dict[int, _Live] = {}
        self._waiting: dict[int, None] = {}
        """Those of them that wait for copies."""
        self._queued: dict[str, tuple[int, int]] = {}
        """By name of a request that was refused: when for the first time, and how often."""

    def feed(self, records: Iterable[TimedRecord]) -> None:
        """Follow the log by these records.

        Raises:
            InvariantViolation, statemachine.records.codec.CodecError: an event does not fit.
        """
        for record in records:
            event = event_of(record)
            before, self.state = self.state, step(self.state, event)
            if before is not None:
                self._observe(self.state, event, record.time_ns)

    def _observe(self, state: State, event: Event, now: int) -> None:
        if isinstance(event, RequestMatched):
            self._begin(event, now, state.block_bytes)
        elif isinstance(event, AllocationRefused):
            self._refused(event, now)
        elif isinstance(event, BlocksAllocated):
            for id, count in zip(event.requests, event.counts, strict=True):
                if id in self._live:
                    self._live[id].allocated += count
        elif isinstance(event, RequestExtended):
            if event.request in self._live:
                self._live[event.request].extended += event.device_blocks
        elif isinstance(event, BlocksCached):
            self._cached(event, now)
        elif isinstance(event, RequestReleased):
            self._end(event, now)
        self._look_who_waits(state, event, now)

    def _begin(self, event: RequestMatched, now: int, block_bytes: int) -> None:
        first, refusals = self._queued.pop(event.key, (now, 0))
        found = event.device_blocks + event.host_blocks
        span = self._tracer.start_span(
            "kvledger.request",
            self._parent(event.key),
            start_time=first,
            attributes={
                "kvledger.request": printable(event.key),
                "kvledger.prompt_blocks": found + len(event.words) // block_bytes,
                "kvledger.device_hit_blocks": event.device_blocks,
                "kvledger.host_hit_blocks": event.host_blocks,
            },
        )
        live = self._live[event.request] = _Live(span, first)
        live.refusals = refusals
        if refusals:
            self._phase(live, "queued", now)

    def _refused(self, event: AllocationRefused, now: int) -> None:
        live = self._live.get(event.request)
        if live is None:
            first, times = self._queued.pop(event.key, (now, 0))
            self._queued[event.key] = first, times + 1
            if len(self._queued) > _QUEUED_AT_MOST:
                del self._queued[next(iter(self._queued))]
            return
        live.refusals += 1
        live.span.add_event(
            "refused", {"kvledger.wanted_blocks": event.wanted, "kvledger.available_blocks": event.available}, now
        )

    def _cached(self, event: BlocksCached, now: int) -> None:
        live = self._live.get(event.request)
        if live is not None:
            if not live.cached:
                self._phase(live, "computing", now)
            live.cached += len(event.blocks) + event.duplicates

    def _look_who_waits(self, state: State, event: Event, now: int) -> None:
        """Of the requests that an event is about (all that wait, when a copy ended): who waits for copies now."""
        touched = list(self._waiting) if isinstance(event, TransferFinished) else []
        if isinstance(event, BlocksAllocated):
            touched += event.requests
        elif isinstance(event, RequestMatched | TransferStarted | BlocksTrimmed):
            touched.append(event.request)
        for id in touched:
            live = self._live.get(id)
            if live is None:
                continue
            if state.requests[id].waits_for:
                if id not in self._waiting:
                    self._phase(live, live.phase(), now)
                    self._waiting[id] = None
            elif id in self._waiting:
                del self._waiting[id]
                self._phase(live, "waiting", now)

    def _phase(self, live: _Live, name: str, now: int) -> None:
        """A phase ended; nothing is said of one that took no time."""
        if now <= live.since:
            return
        span = self._tracer.start_span(f"kvledger.{name}", set_span_in_context(live.span), start_time=live.since)
        span.end(now)
        live.since = now

    def _end(self, event: RequestReleased, now: int) -> None:
        live = self._live.pop(event.request, None)
        if live is None:
            return
        reason = ReleaseReason(event.reason)
        waited = event.request in self._waiting
        self._waiting.pop(event.request, None)
        self._phase(live, "waiting" if waited else live.phase(), now)
        live.span.set_attributes(
            {
                "kvledger.cached_blocks": live.cached,
                "kvledger.allocated_blocks": live.allocated,
                "kvledger.extended_blocks": live.extended,
                "kvledger.refusals": live.refusals,
                "kvledger.release_reason": reason.name.lower(),
            }
        )
        if reason in (ReleaseReason.FAILED, ReleaseReason.ENGINE_RESTARTED):
            live.span.set_status(Status(StatusCode.ERROR, reason.name.lower()))
        live.span.end(now)
