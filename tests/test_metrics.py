"""Metrics: derived as an independent count says, exported as Prometheus reads them, named as the documents say."""

from __future__ import annotations

import random
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import Record
from kvledger import OutOfBlocks
from kvledger.metrics import Derivation
from kvledger.metrics.derivation import Histogram, TimedRecord
from statemachine import codec
from statemachine.apply import apply, genesis
from statemachine.commands import FinishTransfer
from statemachine.decide import decide
from statemachine.errors import CommandRejected
from statemachine.events import (
    AllocationRefused,
    BlocksCached,
    Direction,
    Event,
    HostPolicy,
    LedgerOpened,
    Outcome,
    RequestMatched,
    RequestReleased,
    Tier,
    TransferFinished,
)
from statemachine.ownership import owners
from statemachine.replay import event_of
from statemachine.state import Node, State

ROOT = Path(__file__).parents[1]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
LAYOUT = '{"ranks":2,"layers":3,"block_bytes":64,"device_blocks":12,"host_blocks":12}'


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
        self._residency(before, self._copies(state), now, isinstance(event, BlocksCached))
        if isinstance(event, RequestMatched):
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
            if node.device is not None and node.device_ready:
                found.update((Tier.DEVICE, block) for block in node.device)
            if node.host is not None and node.host_ready:
                found.update((Tier.HOST, block) for block in node.host)
        return found

    @staticmethod
    def _pins(state: State) -> dict[tuple[int, bytes], int]:
        """By block, named by its root and all content up to its end: whether somebody holds it."""
        found: dict[tuple[int, bytes], int] = {}
        stack: list[tuple[Node, int, bytes]] = [(root, id(root), b"") for root in state.all_roots()]
        while stack:
            node, root, prefix = stack.pop()
            for block in range(node.size):
                found[root, prefix + node.words[: 4 * (block + 1)]] = node.pins
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
@pytest.mark.parametrize("seed", range(40))
def test_derived_metrics_agree_with_an_independent_count(policy: HostPolicy, seed: int, failures: bool) -> None:
    derivation, recount = Derivation(None), Recount()
    for transaction in traffic(policy, seed, failures):
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
        for owner, blocks in owners(state, tier):
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
    assert levels["kvledger_waiting_requests", ()] == sum(bool(r.waits) for r in state.requests.values())
