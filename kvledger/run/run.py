"""``kvledger run``: drive a trace through a real manager, real workers and real bytes, and verify every byte."""

from __future__ import annotations

import heapq
import json
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ipc import KvlogWriter, LogReader
from kvledger.config import CacheConfig
from kvledger.manager.manager import CacheManager
from kvledger.run.pattern import PatternEngine, Seeds, chain
from kvledger.run.traces import Trace, TraceRequest
from statemachine.content import words_of
from statemachine.errors import OutOfBlocks
from statemachine.events import HostPolicy
from statemachine.records import codec
from statemachine.records.replay import replay
from statemachine.records.snapshot import state_digest

_RECORD_EVERY = 256
_CHECK_EVERY = 5_000
_SHOW_EVERY = 16
_SEGMENT_BYTES = 4 << 20
_TRANSFER_WAIT_S = 120.0


class Interrupted(Exception):
    """The user wants to stop."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line of ``run`` says."""

    device_blocks: int = 1024
    host_blocks: int = 2048
    host_policy: HostPolicy = HostPolicy.EXCLUSIVE
    block_size: int = 16
    ranks: int = 2
    layers: int = 4
    block_bytes: int = 1024
    checksums: bool = False
    data: bool = True
    in_flight: int = 64
    trace_clock: bool = False
    prefill_ms: float = 1000.0
    token_ms: float = 30.0
    per_request: Path | None = None
    record: Path | None = None
    keep: bool = False


@dataclass
class Crashes:
    """Kills and what became of them."""

    engine: int = 0
    workers: int = 0
    followers: int = 0
    not_reached: list[str] = field(default_factory=list)
    """Crashes that were asked for at events that never came."""
    recovery_ms: list[float] = field(default_factory=list)
    """From the start of ``CacheManager.open`` to its return, once per engine killed."""
    lost_events: int = 0
    """Events that were published, and that the next engine did not know."""


@dataclass
class Summary:
    """What a run did. Blocks are counted once per request that uses them."""

    trace: str = ""
    ledger: str = ""
    interrupted: bool = False
    requests: int = 0
    blocks: int = 0
    device_hit_blocks: int = 0
    host_hit_blocks: int = 0
    bypassed: int = 0
    """Requests that are larger than the device pool: nothing is cached for them."""
    early_releases: int = 0
    """Requests that were ended before their time, for want of room for another one."""
    seconds: float = 0.0
    data_seconds: float = 0.0
    """Spent by the run's engine in writing and verifying patterns."""
    events: int = 0
    stats: dict[str, int] = field(default_factory=dict)
    moved_blocks: dict[str, int] = field(default_factory=dict)
    """Blocks copied per direction."""
    moved_gb_per_s: float = 0.0
    """Bytes that all workers copied, over the wall time of the run."""
    verified_bytes: int = 0
    written_bytes: int = 0
    phases_us: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per phase of a request's life: microseconds p50 and p99."""
    invariants_checked: int = 0
    digest: str = ""
    replay_digest: str = ""
    crashes: Crashes | None = None
    """What was killed, in a run with crashes."""

    @property
    def device_hit_rate(self) -> float:
        """Share of the blocks that were on the device."""
        return self.device_hit_blocks / max(self.blocks, 1)

    @property
    def host_hit_rate(self) -> float:
        """Share of the blocks that were on the host."""
        return self.host_hit_blocks / max(self.blocks, 1)


class _Live(NamedTuple):
    """A request in flight."""

    finish: float
    number: int
    request: TraceRequest
    seeds: Seeds


class _InFlight:
    """Requests in flight, in the order in which they are released: by arrival, or by (finish, index)."""

    def __init__(self, by_finish: bool) -> None:
        self._by_finish = by_finish
        self._heap: list[_Live] = []
        self._queue: deque[_Live] = deque()

    def __len__(self) -> int:
        return len(self._heap) + len(self._queue)

    def add(self, live: _Live) -> None:
        if self._by_finish:
            heapq.heappush(self._heap, live)
        else:
            self._queue.append(live)

    def first(self) -> _Live:
        return self._heap[0] if self._by_finish else self._queue[0]

    def pop(self) -> _Live:
        return heapq.heappop(self._heap) if self._by_finish else self._queue.popleft()


class Run:
    """One run. :meth:`execute` does it all; ``stop`` asks it to end early, from any thread or signal handler."""

    def __init__(self, trace: Trace, options: RunOptions, progress: Callable[[int], None] = lambda done: None) -> None:
        self.trace = trace
        self.options = options
        self.summary = Summary(trace=trace.name)
        self.stop = False
        self.progress = progress
        self._block_size = trace.block_size or options.block_size
        self._in_flight = _InFlight(options.trace_clock)
        self._now = 0.0
        self._times: dict[str, list[int]] = {"admit": [], "wait": [], "cache": [], "release": []}
        self._engine: PatternEngine | None = None
        self._per_request: IO[str] | None = None
        self._recording: KvlogWriter | None = None
        self._recorder: LogReader | None = None

    def config(self) -> CacheConfig:
        """The cache that the run creates. Raises :class:`kvledger.ConfigError`."""
        options = self.options
        longest = max(len(request.tokens) + len(request.output) for request in self.trace.requests)
        wanted = max(_SEGMENT_BYTES, 32 * longest)
        host = options.host_blocks if options.host_policy != HostPolicy.OFF else 0
        return CacheConfig(
            block_size=self._block_size,
            device_blocks=options.device_blocks,
            host_blocks=host,
            host_policy=options.host_policy if host else HostPolicy.OFF,
            host_staging_blocks=-(-longest // self._block_size),
            ranks=options.ranks if options.data else 0,
            layers=options.layers,
            block_bytes=options.block_bytes,
            checksums=options.checksums,
            segment_bytes=wanted + -wanted % 4096,
            retain_bytes=None,
        )

    def execute(self, name: str | None = None) -> Summary:
        """Run the trace, verify, replay, and leave nothing behind (unless asked to).

        Raises:
            WrongBytes, InvariantViolation: the run failed; the message names block, request and event.
            OSError, ipc.LedgerError, WorkerFailed, ConfigError: it could not start or go on.
        """
        name = name or f"run-{os.getpid()}"
        self.summary.ledger = name
        config = self.config()
        with ExitStack() as stack:
            manager = self.manager(name, config)
            stack.callback(manager.close, keep=self.options.keep)
            if self.options.per_request is not None:
                self._per_request = stack.enter_context(open(self.options.per_request, "x"))
            if self.options.record is not None:
                self._recording = stack.enter_context(KvlogWriter(self.options.record, schema_hash=codec.SCHEMA_HASH))
                self._recorder = LogReader(name)
                stack.callback(self._recorder.close)
                stack.callback(self._record)  # also when the run fails: then the log matters most
            if manager.pools:
                self._engine = PatternEngine(manager.pools)
            begun = time.perf_counter()
            try:
                for request in self.trace.requests:
                    if self.is_served(request.number):
                        continue
                    self._serve(manager, request)
                    if not request.number % _RECORD_EVERY:
                        self._record()
                    if not request.number % _SHOW_EVERY:
                        self.progress(request.number + 1)
                while self._in_flight:
                    self._release(manager)
            except Interrupted:
                self.summary.interrupted = True
            self.summary.seconds = time.perf_counter() - begun
            self._finish(manager)
        return self.summary

    def manager(self, name: str, config: CacheConfig) -> CacheManager:
        """The manager of the run."""
        return CacheManager.create(name, config)

    def is_served(self, number: int) -> bool:
        """Whether a request was served in an earlier life of this run."""
        return False

    def _record(self) -> None:
        if self._recorder is not None and self._recording is not None:
            while records := self._recorder.poll():
                self._recording.write(records)

    def _serve(self, manager: CacheManager, request: TraceRequest) -> None:
        self._make_room_in_window(manager, request)
        words = words_of(request.tokens, items=request.items)
        count = len(words) // (4 * self._block_size)
        total = -(-(len(request.tokens) + len(request.output)) // self._block_size)
        summary = self.summary
        # Mooncake paths are matched completely; of a real prompt one token is left to compute
        limit = None if self.trace.capped else count
        if total > self.options.device_blocks:
            while self._in_flight:
                self._release(manager)
            device, host = manager.peek(
                request.tokens, items=request.items, namespace=request.namespace, max_blocks=limit
            )
            summary.bypassed += 1
            self._count(request, count, device, host, bypassed=True)
            return
        key = str(request.number)
        while True:
            begun = time.perf_counter_ns()
            try:
                admission = manager.admit(
                    key,
                    request.tokens,
                    items=request.items,
                    namespace=request.namespace,
                    max_blocks=limit,
                    blocks=total,
                )
                break
            except OutOfBlocks:
                if manager.state.transfers:
                    self._wait(manager, lambda: not manager.state.transfers)
                elif not self._in_flight:
                    raise
                else:
                    self._now = max(self._now, self._in_flight.first().finish)
                    summary.early_releases += 1
                    self._release(manager)
        self._times["admit"].append(time.perf_counter_ns() - begun)
        if not admission.ready:
            begun = time.perf_counter_ns()
            self._wait(manager, lambda: manager.ready(key))
            self._times["wait"].append(time.perf_counter_ns() - begun)
        else:
            manager.poll()
        self._count(request, count, admission.device_blocks, admission.host_blocks)
        seeds = self._compute(manager, request, words)
        begun = time.perf_counter_ns()
        blocks = (manager.known(key) + len(request.output)) // self._block_size
        manager.cache(key, blocks, generated=request.output if len(request.output) else None)
        self._times["cache"].append(time.perf_counter_ns() - begun)
        finish = self._now + self.options.prefill_ms + self.options.token_ms * request.output_length
        self._in_flight.add(_Live(finish, request.number, request, seeds))

    def _compute(self, manager: CacheManager, request: TraceRequest, words: memoryview) -> Seeds:
        """Prefill and decode: write the KV of what was not cached, attend to everything."""
        engine = self._engine
        if engine is None:
            return np.empty(0, np.uint64)
        begun = time.perf_counter()
        key = str(request.number)
        if len(request.output):
            words = memoryview(bytes(words) + request.output.tobytes())
        seeds = chain(words, 4 * self._block_size, request.namespace)
        table = manager.block_table(key)
        valid = manager.cached_blocks(key)
        engine.write(table[valid : len(seeds)], seeds[valid:])
        self._attend(manager, key, seeds)
        self.summary.data_seconds += time.perf_counter() - begun
        return seeds

    def _attend(self, manager: CacheManager, key: str, seeds: Seeds) -> None:
        if self._engine is not None:
            table = manager.block_table(key)
            self._engine.verify(key, table[: len(seeds)], seeds, manager.next_sequence - 1)

    def _release(self, manager: CacheManager) -> None:
        live = self._in_flight.pop()
        key = str(live.number)
        if self._engine is not None:
            begun = time.perf_counter()
            self._attend(manager, key, live.seeds)  # the last decode step
            self.summary.data_seconds += time.perf_counter() - begun
        begun_ns = time.perf_counter_ns()
        manager.release(key, final=live.request.final)
        self._times["release"].append(time.perf_counter_ns() - begun_ns)

    def _make_room_in_window(self, manager: CacheManager, request: TraceRequest) -> None:
        if self.stop:
            raise Interrupted
        flying = self._in_flight
        if self.options.trace_clock:
            self._now = request.timestamp_ms
            while flying and flying.first().finish <= self._now:
                self._release(manager)
        while len(flying) >= self.options.in_flight:
            self._now = max(self._now, flying.first().finish)
            self._release(manager)

    def _wait(self, manager: CacheManager, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _TRANSFER_WAIT_S
        pause = 0.0
        while not done():
            manager.poll()
            if self.stop:
                raise Interrupted
            if time.monotonic() > deadline:
                raise TimeoutError(f"transfers {[*manager.state.transfers]} do not end")
            time.sleep(pause)
            pause = min(pause + 5e-6, 1e-3)

    def _count(self, request: TraceRequest, blocks: int, device: int, host: int, *, bypassed: bool = False) -> None:
        summary = self.summary
        summary.requests += 1
        summary.blocks += blocks
        summary.device_hit_blocks += device
        summary.host_hit_blocks += host
        if self._per_request is not None:
            row = {
                "request": request.number,
                "blocks": blocks,
                "device_hit": device,
                "host_hit": host,
                "bypassed": bypassed,
            }
            self._per_request.write(json.dumps(row) + "\n")

    def _finish(self, manager: CacheManager) -> None:
        """Digest, replay check, numbers."""
        summary = self.summary
        summary.stats = manager.stats()
        stats = summary.stats
        summary.moved_blocks = {
            "swap_out": stats["swapped_out_blocks"],
            "swap_in": stats["swapped_in_blocks"],
            "backup": stats["backed_up_blocks"],
        }
        config = manager.config
        block = config.ranks * config.layers * config.block_bytes
        summary.moved_gb_per_s = sum(summary.moved_blocks.values()) * block / max(summary.seconds, 1e-9) / 1e9
        if self._engine is not None:
            summary.verified_bytes = self._engine.verified_bytes
            summary.written_bytes = self._engine.written_bytes
        for phase, times in self._times.items():
            if times:
                p50, p99 = np.percentile(times, (50, 99)) / 1e3
                summary.phases_us[phase] = {"p50": round(float(p50), 1), "p99": round(float(p99), 1)}
        summary.digest = manager.take_digest().hex()
        summary.events = manager.next_sequence - 1
        reader = LogReader(manager.name)
        try:
            replayed = replay(reader, check_every=_CHECK_EVERY)
        finally:
            reader.close()
        summary.invariants_checked = replayed.checks
        summary.replay_digest = state_digest(replayed.state).hex()
