"""Metrics: derived as an independent count says, exported as Prometheus reads them, named as the documents say."""

from __future__ import annotations

import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ipc import KvlogReader, Record, snapshots
from kvledger import CacheConfig, CacheManager, OutOfBlocks
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from kvledger.telemetry import METRICS, Derivation, Kind
from kvledger.telemetry.collectors import ManagerCollector
from kvledger.telemetry.derivation import Histogram, TimedRecord
from kvledger.telemetry.exporter import Exporter
from kvledger.telemetry.table import BY_NAME, label_sets
from statemachine.apply import apply, genesis
from statemachine.commands import Admit, Backup, Cache, Clear, FinishTransfer, LoseTier, Release
from statemachine.decide import decide
from statemachine.errors import CommandRejected
from statemachine.events import (
    AllocationRefused,
    BlocksCached,
    CopiesReplaced,
    Direction,
    Event,
    HostPolicy,
    LedgerOpened,
    Outcome,
    QuarantineEnded,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TransferFinished,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records import codec
from statemachine.records.replay import event_of
from statemachine.records.snapshot import snapshot, state_digest
from statemachine.state.nodes import Node
from statemachine.state.ownership import owners
from statemachine.state.state import State
from tests.waiting import PATIENCE_S, wait_until
from workers import PoolLayout
from workers.followers.auditor import Auditor

ROOT = Path(__file__).parents[2]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
LAYOUT = PoolLayout(ranks=2, layers=3, block_bytes=64, device_blocks=12, host_blocks=12).text()


def record_of(sequence: int, event: Event, time_ns: int) -> Record:
    kind, subject, args, head, tail = codec.ENCODERS[type(event)](event)
    return Record(sequence, time_ns, kind, 3, 0, subject, args.ljust(24, b"\0"), head + tail)


def traffic(policy: HostPolicy, seed: int, failures: bool = True, steps: int = 600) -> Iterator[list[Record]]:
    """Transactions of seeded random commands of all kinds, a second per event."""
    rng = random.Random(seed)
    host = (0, 0) if policy == HostPolicy.OFF else (8, 4)
    opened = LedgerOpened(1, 12, *host, policy, 2, LAYOUT, "")
    state = genesis(opened)
    sequence = 1
    yield [record_of(sequence, opened, 10**18)]
    for number in range(steps):
        command = GENERATE["_command"](state, rng, number)
        if command is None:
            continue
        if isinstance(command, FinishTransfer) and not failures:
            command = FinishTransfer(command.transfer, Outcome.DONE, len(state.transfers[command.transfer].targets))
        try:
            events = decide(state, command)
        except OutOfBlocks as refused:
            events = [refused.event] if refused.event is not None else []
        except CommandRejected:
            continue
        transaction = []
        for event in events:
            apply(state, event)
            sequence += 1
            transaction.append(record_of(sequence, event, 10**18 + sequence * 10**9 + rng.randrange(10**9)))
        yield transaction


class Recount:
    """The same numbers the slow way: whole-state comparisons before and after each event."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.events: Counter[str] = Counter()
        self.refused = 0
        self.released: Counter[int] = Counter()
        self.outcomes: Counter[tuple[int, int]] = Counter()
        self.bytes: Counter[int] = Counter()
        self.residency: dict[Tier, list[float]] = {tier: [] for tier in Tier}
        self.gaps: list[float] = []
        self.swaps: Counter[int] = Counter()
        self._there: dict[tuple[Tier, int], int] = {}
        self._unused: dict[tuple[int, bytes], int] = {}

    def feed(self, record: TimedRecord) -> None:
        event = event_of(record)
        self.events[type(event).__name__] += 1
        if self.state is None:
            self.state = genesis(event)
            return
        state, now = self.state, record.time_ns
        before, held_before = self._copies(state), self._pins(state)
        direction = state.transfers[event.transfer].direction if isinstance(event, TransferFinished) else None
        apply(state, event)
        held = self._pins(state)
        if isinstance(event, CopiesReplaced):  # the content stays where it is as long as before
            for old, new in zip(reversed(event.freed), event.blocks, strict=True):
                self._there[Tier.DEVICE, new] = self._there.pop((Tier.DEVICE, old))
        else:
            self._residency(before, self._copies(state), now, isinstance(event, BlocksCached))
        if isinstance(event, RequestMatched | RequestExtended):
            for block, pins in held.items():
                if pins and not held_before.get(block) and block in self._unused:
                    self.gaps.append((now - self._unused[block]) / 1e9)
        if isinstance(event, RequestReleased | TransferFinished):
            for block, pins in held.items():
                if not pins and held_before.get(block):
                    self._unused[block] = now
        self._unused = {block: since for block, since in self._unused.items() if block in held}
        if isinstance(event, AllocationRefused):
            self.refused += 1
        elif isinstance(event, RequestReleased):
            self.released[event.reason] += 1
        elif isinstance(event, TransferFinished) and direction is not None:
            self.outcomes[direction, event.outcome] += 1
            self.bytes[direction] += 2 * 3 * 64 * event.valid
            self.swaps[direction] += event.outcome == 0

    @staticmethod
    def _copies(state: State) -> set[tuple[Tier, int]]:
        found: set[tuple[Tier, int]] = set()
        for node in state.nodes.values():
            if node.device is not None and node.device.ready:
                found.update((Tier.DEVICE, block) for block in node.device.ids)
            if node.host is not None and node.host.ready:
                found.update((Tier.HOST, block) for block in node.host.ids)
        return found

    @staticmethod
    def _pins(state: State) -> dict[tuple[int, bytes], int]:
        """By block, named by its root and all content up to its end: whether somebody holds it."""
        found: dict[tuple[int, bytes], int] = {}
        stack: list[tuple[Node, int, bytes]] = [(root, id(root), b"") for root in state.all_roots()]
        while stack:
            node, root, prefix = stack.pop()
            for block in range(node.size):
                bad = b"bad %d " % node.id if node.distrusted else b""  # another run may have the same content
                found[root, prefix + bad + node.words[: 4 * (block + 1)]] = node.pins
            if node.parent is not None:
                prefix += node.words
            stack += [(child, root, prefix) for child in node.children.values()]
        return found

    def _residency(self, before: set[tuple[Tier, int]], after: set[tuple[Tier, int]], now: int, cached: bool) -> None:
        for copy in before - after:
            since = self._there.pop(copy)
            if not (cached and copy[0] == Tier.HOST):  # replaced by a computed block: nothing was evicted
                self.residency[copy[0]].append((now - since) / 1e9)
        for copy in after - before:
            self._there[copy] = now


def same(histogram: Histogram, values: list[float]) -> bool:
    expected = Histogram(histogram.bounds)
    for value in values:
        expected.observe(value)
    return histogram.counts == expected.counts and histogram.sum == pytest.approx(expected.sum)


@pytest.mark.parametrize("policy", HostPolicy)
@pytest.mark.parametrize("failures", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_derived_metrics_agree_with_an_independent_count(policy: HostPolicy, seed: int, failures: bool) -> None:
    derivation, recount = Derivation(None), Recount()
    for transaction in traffic(policy, seed, failures, 1000):
        derivation.feed(transaction)
        for record in transaction:
            recount.feed(record)
        assert_levels_are_those_of_the_state(derivation)
    state = derivation.state
    assert state is not None and recount.state is not None
    totals, counters = derivation.totals, state.counters

    def total(name: str, *labels: str) -> int:
        """Summed over what ``labels`` leave open."""
        return sum(n for (of, values), n in totals.items() if of == name and values[: len(labels)] == labels)

    for name in ("requests", "queried_blocks", "allocated_blocks", "cached_blocks", "duplicate_blocks"):
        assert total(f"kvledger_{name}_total") == getattr(counters, name), name
    for tier in ("device", "host"):
        assert total("kvledger_hit_blocks_total", tier) == getattr(counters, f"{tier}_hit_blocks")
        assert total("kvledger_evicted_blocks_total", tier) == getattr(counters, f"{tier}_evicted_blocks")
    assert total("kvledger_swapped_blocks_total", "swap_in") == counters.swapped_in_blocks
    assert total("kvledger_swapped_blocks_total", "swap_out") == counters.swapped_out_blocks
    assert total("kvledger_swapped_blocks_total", "backup") == counters.backed_up_blocks
    assert total("kvledger_refused_allocations_total") == recount.refused
    assert {labels[0]: n for (name, labels), n in totals.items() if name == "kvledger_events_total"} == recount.events
    assert total("kvledger_released_requests_total", "finished") == recount.released[0] == recount.released.total()
    for direction in Direction:
        label = direction.name.lower()
        for outcome, name in enumerate(("done", "failed", "corrupt", "timed_out")):
            assert total("kvledger_transfers_total", label, name) == recount.outcomes[direction, outcome]
        assert total("kvledger_swap_bytes_total", label) == recount.bytes[direction]
        assert sum(derivation.histograms["kvledger_swap_seconds", (label,)].counts) == recount.swaps[direction]
    assert same(derivation.histograms["kvledger_reuse_gap_seconds", ()], recount.gaps) and recount.gaps
    assert recount.residency[Tier.DEVICE]
    assert same(derivation.histograms["kvledger_residency_seconds", ("device",)], recount.residency[Tier.DEVICE])
    if not failures:  # what a failed copy takes with it was not evicted
        assert same(derivation.histograms["kvledger_residency_seconds", ("host",)], recount.residency[Tier.HOST])
        assert policy == HostPolicy.OFF or recount.residency[Tier.HOST]


def assert_levels_are_those_of_the_state(derivation: Derivation) -> None:
    state = derivation.state
    assert state is not None
    levels = {(sample.name, sample.labels): sample.value for sample in derivation.samples(2 * 10**18)}
    for tier in Tier:
        label = tier.name.lower()
        found: Counter[str] = Counter()
        for owner, blocks in owners(state, state.place(tier)):
            if owner.startswith("run "):
                node = state.nodes[int(owner[4:])]
                kind = "cached" if tier == Tier.HOST else "pinned" if node.pins else "evictable"
            else:
                kind = {"free": "free", "request": "private", "transfer": "in_transfer"}.get(
                    owner.split()[0], "quarantined"
                )
            found[kind] += len(blocks)
        given = {of[1]: n for (name, of), n in levels.items() if name == "kvledger_pool_blocks" and of[0] == label}
        assert {kind: n for kind, n in given.items() if n} == {kind: n for kind, n in found.items() if n}
        assert sum(given.values()) == levels["kvledger_pool_capacity_blocks", (label,)]
    assert levels["kvledger_live_requests", ()] == len(state.requests)
    assert levels["kvledger_waiting_requests", ()] == sum(bool(r.waits_for) for r in state.requests.values())


def test_what_random_traffic_does_not_do() -> None:
    opened = LedgerOpened(1, 12, 8, 4, HostPolicy.WRITE_THROUGH, 2, LAYOUT, "")
    events: list[Event] = [opened, WorkerJoined(0, 1, 11), WorkerJoined(1, 1, 12), WorkerLost(1, 1, "killed")]
    derivation = Derivation(None)
    derivation.feed(record_of(number, event, 10**18) for number, event in enumerate(events, 1))

    def values(name: str) -> dict[tuple[str, ...], float]:
        return {sample.labels: sample.value for sample in derivation.samples(10**18) if sample.name == name}

    assert values("kvledger_workers") == {(): 1} and values("kvledger_expected_workers") == {(): 2}
    assert values("kvledger_lost_workers_total") == {("0",): 0, ("1",): 1}
    derivation.feed([record_of(5, WorkerJoined(1, 2, 13), 10**18)])
    assert values("kvledger_workers") == {(): 2}
    state = genesis(opened)
    sequence = 5
    for command in [
        Admit("a", memoryview(bytes(16)), b"", 9, 4),
        Cache("a", 4, b""),
        Backup(1),
        FinishTransfer(1, Outcome.DONE, 4),
        Release("a", ReleaseReason.ABORTED, False),
        LoseTier(Tier.HOST, "gone", ""),
        Clear(False),
    ]:
        for event in decide(state, command):
            apply(state, event)
            sequence += 1
            derivation.feed([record_of(sequence, event, 10**18 + sequence * 10**9)])
    assert values("kvledger_evicted_blocks_total")["host", "tier_lost"] == 4
    assert values("kvledger_lost_tiers_total") == {("device",): 0, ("host",): 1}
    assert values("kvledger_cleared_caches_total") == {(): 1}
    assert values("kvledger_released_requests_total")[("aborted",)] == 1
    host = derivation.histograms["kvledger_residency_seconds", ("host",)]
    assert sum(host.counts) == 4 and host.sum == 4 * 2.0


def test_a_recorded_run_with_workers_gives_the_totals_of_its_manager(tmp_path: Path) -> None:
    record = tmp_path / "run.kvlog"
    options = RunOptions(device_blocks=400, host_blocks=800, layers=2, block_bytes=64, in_flight=4, record=record)
    summary = Run(sample.generate(200, seed=1), options).execute()
    derivation = Derivation(None)
    reader = KvlogReader(record)
    while records := reader.poll(500):
        derivation.feed(records)
    reader.close()
    stats = summary.stats
    totals: Counter[str] = Counter()
    for (name, _), value in derivation.totals.items():
        totals[name] += value
    assert totals["kvledger_hit_blocks_total"] == stats["device_hit_blocks"] + stats["host_hit_blocks"] > 0
    assert totals["kvledger_evicted_blocks_total"] == stats["device_evicted_blocks"] + stats["host_evicted_blocks"] > 0
    moved = sum(summary.moved_blocks.values())
    assert totals["kvledger_swapped_blocks_total"] == moved > 0
    assert totals["kvledger_swap_bytes_total"] == 2 * 2 * 64 * moved
    assert totals["kvledger_events_total"] == summary.events
    seconds = derivation.histograms["kvledger_swap_seconds", ("swap_out",)]
    assert sum(seconds.counts) and 0 < seconds.sum / sum(seconds.counts) < 60


def scraped(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Name → label values (without the ledger's) → value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            order = [*BY_NAME[next(iter(bases({each.name})))].labels, "le"]
            labels = tuple(each.labels[name] for name in order if name in each.labels)
            found.setdefault(each.name, {})[labels] = each.value
    return found


def bases(names: set[str]) -> set[str]:
    """Metrics of the table that these names of samples belong to."""
    suffixes = ("", "_bucket", "_count", "_sum")
    return {name.removesuffix(suffix) for name in names for suffix in suffixes} & {metric.name for metric in METRICS}


def small(name: str, **settings: Any) -> CacheManager:
    config = {"block_size": 4, "device_blocks": 32, **settings}
    return CacheManager.create(f"{name}-{os.getpid()}", CacheConfig(**config))


def serve(manager: CacheManager, number: int) -> None:
    manager.admit(str(number), np.arange(number // 2 % 7, number // 2 % 7 + 40, dtype=np.int32))
    manager.wait(str(number))
    manager.cache(str(number))
    manager.release(str(number))


def test_the_engines_own_collector_is_read_while_the_scheduler_works() -> None:
    with small("collector") as manager:
        registry = CollectorRegistry()
        registry.register(ManagerCollector(manager))
        done = threading.Event()
        errors: list[BaseException] = []

        def scrape() -> None:
            try:
                while not done.is_set():
                    scraped(generate_latest(registry).decode())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=scrape)
        thread.start()
        for number in range(1000):
            serve(manager, number)
        done.set()
        thread.join()
        assert not errors
        found = scraped(generate_latest(registry).decode())
        assert bases(set(found)) == {metric.name for metric in METRICS if metric.engine}
        stats = manager.stats()
        assert found["kvledger_requests_total"] == {(): 1000}
        assert found["kvledger_hit_blocks_total"][("device",)] == stats["device_hit_blocks"] > 0
        assert found["kvledger_evicted_blocks_total"][("device",)] == stats["device_evicted_blocks"] > 0
        assert found["kvledger_pool_blocks"]["device", "free"] == stats["device_free_blocks"]


def test_two_managers_share_a_registry() -> None:
    with small("one") as one, small("two") as two:
        registry = CollectorRegistry()
        for manager in (one, two):
            registry.register(ManagerCollector(manager))
        serve(one, 1)
        text = generate_latest(registry).decode()
        assert f'kvledger_requests_total{{ledger="{one.name}"}} 1.0' in text
        assert f'kvledger_requests_total{{ledger="{two.name}"}} 0.0' in text


class Served:
    """``kvledger metrics`` as a process."""

    def __init__(self, ledger: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "kvledger.cli", "metrics", ledger, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("serving "), line
        self.url = line.split()[1]

    def text(self) -> str:
        with urllib.request.urlopen(self.url, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())

    def until(self, wanted: Callable[[dict[str, dict[tuple[str, ...], float]]], bool]) -> str:
        def found() -> str:
            text = self.text()
            return text if wanted(scraped(text)) else ""

        return wait_until("the exporter says so", found, pause_s=0.05)

    def end(self) -> int:
        assert self.process.stderr is not None
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.stderr.close()


def test_the_exporter_follows_a_living_ledger_until_it_is_removed() -> None:
    host: dict[str, Any] = {"host_blocks": 64, "host_policy": HostPolicy.EXCLUSIVE, "ranks": 2, "block_bytes": 64}
    with small("exported", **host) as manager:
        serve(manager, 0)
        exporter = Served(manager.name)
        for number in range(1, 200):
            serve(manager, number)
            manager.poll()
        manager.admit("secret", np.arange(8, dtype=np.int32))
        assert manager._ranks is not None
        os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
        wait_until(
            "the killed worker is replaced, and nothing is in flight",
            lambda: manager.state.workers[1] > 1 and not manager.state.transfers,
            meanwhile=manager.poll,
        )
        last = manager.next_sequence - 1
        text = exporter.until(lambda found: found["kvledger_exporter_sequence"][()] == last)
        found, stats = scraped(text), manager.stats()
        for name in ("requests", "queried_blocks", "cached_blocks", "allocated_blocks"):
            assert found[f"kvledger_{name}_total"][()] == stats[name]
        assert found["kvledger_hit_blocks_total"] == {
            ("device",): stats["device_hit_blocks"],
            ("host",): stats["host_hit_blocks"],
        }
        assert found["kvledger_evicted_blocks_total"]["device", "swapped_out"] == stats["swapped_out_blocks"] > 0
        assert found["kvledger_swap_bytes_total"][("swap_out",)] == 2 * 64 * stats["swapped_out_blocks"]
        assert found["kvledger_lost_workers_total"] == {("0",): 0, ("1",): 1}
        assert found["kvledger_workers"][()] == found["kvledger_expected_workers"][()] == 2
        assert found["kvledger_live_requests"][()] == 1 and found["kvledger_oldest_pin_seconds"][()] > 0
        assert found["kvledger_writer_up"][()] == 1 and found["kvledger_contradiction_event"][()] == 0
        assert set(found["kvledger_worker_lag_events"]) == {("0",), ("1",)}
        assert found["kvledger_log_bytes"][()] >= manager.config.segment_bytes
        missing = {metric.name for metric in METRICS} - bases(set(found))
        pushes = {metric.name for metric in METRICS if metric.pushes}
        assert missing == {"kvledger_log_limit_bytes", *AUDIT, *pushes}
        for metric in METRICS:
            if (
                metric.kind == Kind.COUNTER and not metric.pushes
            ):  # from the start, so that rate() sees the first one too
                assert set(found[metric.name]) == set(label_sets(metric, 2)), metric.name
        buckets = [(float(labels[-1]), n) for labels, n in found["kvledger_reuse_gap_seconds_bucket"].items()]
        counts = [count for _, count in sorted(buckets)]
        assert counts == sorted(counts) and counts[-1] == found["kvledger_reuse_gap_seconds_count"][()] > counts[0]
        assert "secret" not in text  # no request is named
        if promtool := shutil.which("promtool"):
            checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
            assert checked.returncode == 0 and not checked.stderr, checked.stderr
    assert exporter.end() == 0


AUDIT = ("kvledger_auditor_up", "kvledger_auditor_lag_events", "kvledger_audit_broken_event")


def test_what_the_auditor_says_is_exported() -> None:
    with small("audited") as manager:
        serve(manager, 0)
        auditor, exporter = Auditor(manager.name), Exporter(manager.name)
        while auditor.step() or exporter.step():
            pass
        serve(manager, 1)
        exporter.step()
        assert audit(exporter) == {"up": 1, "lag": manager.next_sequence - 1 - auditor.follower.sequence, "broken": 0}
        manager._writer.append([codec.encode(QuarantineEnded(99))])
        auditor.step()
        assert audit(exporter)["broken"] == manager.next_sequence - 1
        auditor.close()
        exporter.close()


def audit(exporter: Exporter) -> dict[str, float]:
    found = {sample.name: sample.value for sample in exporter._take().samples}
    return {name: found[metric] for name, metric in zip(("up", "lag", "broken"), AUDIT, strict=True)}


DYING = """
import os, signal, sys
import numpy as np
from kvledger import CacheConfig, CacheManager
manager = CacheManager.create(sys.argv[1], CacheConfig(block_size=4, device_blocks=32))
manager.admit("a", np.arange(40, dtype=np.int32))
manager.cache("a")
manager.release("a")
manager.admit("b", np.arange(40, dtype=np.int32))
print("ready", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_exporter_outlives_the_engine_and_goes_on_with_its_successor() -> None:
    name = f"restarted-{os.getpid()}"
    engine = subprocess.Popen(
        [sys.executable, "-c", DYING, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert engine.stdin is not None and engine.stdout is not None and engine.stdout.readline() == "ready\n"
    exporter = Served(name)
    exporter.until(
        lambda found: found.get("kvledger_live_requests") == {(): 1} and found["kvledger_writer_up"][()] == 1
    )
    engine.communicate("go\n")
    exporter.until(lambda found: found["kvledger_writer_up"][()] == 0)
    with CacheManager.open(name) as manager:
        serve(manager, 0)
        found = scraped(exporter.until(lambda found: found["kvledger_requests_total"] == {(): 3}))
        assert found["kvledger_epoch"] == {(): 2} and found["kvledger_writer_up"] == {(): 1}
        assert found["kvledger_released_requests_total"][("engine_restarted",)] == 1
        assert found["kvledger_hit_blocks_total"][("device",)] == 18  # the cache is warm
        assert found["kvledger_contradiction_event"] == {(): 0}
    assert exporter.end() == 0


def test_the_exporter_begins_with_what_is_there_and_stops_when_asked() -> None:
    with small("late") as manager:
        for number in range(50):
            serve(manager, number)
        exporter = Served(manager.name)
        exporter.until(lambda found: found.get("kvledger_requests_total", {}).get(()) == 50)
        exporter.process.send_signal(signal.SIGTERM)
        assert exporter.end() == 0


def test_an_event_that_does_not_fit_stops_the_derivation_and_is_named() -> None:
    with small("contradiction") as manager:
        serve(manager, 0)
        last = manager.next_sequence - 1
        manager._writer.append([codec.encode(QuarantineEnded(99))])
        exporter = Exporter(manager.name)
        while exporter.step(0.01):
            pass
        wait_until(
            "the event that does not fit is named",
            lambda: any(
                sample.name == "kvledger_contradiction_event" and sample.value == last + 1
                for sample in exporter.picture()[1]
            ),
            meanwhile=lambda: exporter.step(0.01),
        )
        values = {sample.name: sample.value for sample in exporter.picture()[1]}
        assert values["kvledger_exporter_sequence"] == last and values["kvledger_requests_total"] == 1
        exporter.close()


def test_an_exporter_that_was_overrun_says_how_much_it_missed() -> None:
    config = CacheConfig(block_size=4, device_blocks=64, segment_bytes=64 << 10, retain_bytes=128 << 10)
    with CacheManager.create(f"overrun-{os.getpid()}", config) as manager:
        serve(manager, 0)
        exporter = Exporter(manager.name)
        exporter.step()
        for number in range(1, 2000):
            serve(manager, number)
            if number % 500 == 490:  # what a snapshot covers may go
                snapshots.write(manager.name, manager.next_sequence - 1, snapshot(manager.state))
        wait_until(
            "the exporter has read to the end",
            lambda: exporter.derivation.sequence == manager.next_sequence - 1,
            meanwhile=lambda: exporter.step(0.01),
            pause_s=0,
        )
        totals = exporter.derivation.totals
        counted = sum(count for (name, _), count in totals.items() if name == "kvledger_events_total")
        assert totals["kvledger_skipped_events_total", ()] == manager.next_sequence - 1 - counted > 1000
        assert exporter.derivation.state is not None
        assert state_digest(exporter.derivation.state) == manager.digest()
        exporter.close()


def kvledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvledger.cli", *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_one_exporter_for_all_ledgers_of_a_host() -> None:
    """Those that are there, those that come, and no more those that are gone."""

    def requests(text: str) -> dict[str, float]:
        return {
            name: float(value)
            for name, value in re.findall(r'^kvledger_requests_total.ledger="(.*?)". (.*)$', text, re.M)
        }

    with small("host-a") as one:
        serve(one, 0)
        exporter = Served(one.name.replace("host-a", "host-*"))
        try:
            wait_until("the first is there", lambda: requests(exporter.text()) == {one.name: 1}, pause_s=0.05)
            with small("host-b") as two, small("other") as other:
                serve(two, 0)
                serve(two, 1)
                serve(other, 0)
                both = {one.name: 1.0, two.name: 2.0}
                wait_until("the second is there", lambda: requests(exporter.text()) == both, pause_s=0.05)
                text = exporter.text()
                assert text.count("# TYPE kvledger_requests_total counter") == 1
                promtool = shutil.which("promtool")
                if promtool is not None:
                    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
                    assert checked.returncode == 0, checked.stdout + checked.stderr
            wait_until("the second is gone", lambda: requests(exporter.text()) == {one.name: 1}, pause_s=0.05)
        finally:
            exporter.process.send_signal(signal.SIGINT)
            assert exporter.end() == 0


def test_bad_input_is_one_line() -> None:
    with small("taken") as manager, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments in (
            ["no-such-ledger"],
            ["a/b"],
            [manager.name, "--port", str(taken.getsockname()[1])],
            [manager.name, "--port", "70000"],
            [manager.name, "--address", "nowhere.invalid"],
        ):
            done = kvledger("metrics", *arguments)
            assert done.returncode == 2, (arguments, done)
            assert done.stderr.strip() and "Traceback" not in done.stderr, done.stderr


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert metric.name.startswith("kvledger_") and metric.text.endswith(".")
        assert metric.name.endswith("_total") == (metric.kind == Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind == Kind.HISTOGRAM)
        assert len(label_sets(metric, 8)) <= 32
    assert len(BY_NAME) == len(METRICS)
