"""From events to metrics: a state that follows the log, and totals and histograms of what happened on the way.

Pure: records go in, numbers come out. Time is the time stamps of the records.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvledger.telemetry.table import DIRECTIONS, METRICS, SWAPPED_OUT, Kind, label_sets, value_of
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksEvicted,
    CacheCleared,
    CopiesReplaced,
    Direction,
    Event,
    EvictReason,
    HostPolicy,
    IntArray,
    Outcome,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records.replay import Record, event_of, step
from statemachine.state.nodes import Node, Transfer
from statemachine.state.state import State
from workers.pools.layout import PoolLayout

if TYPE_CHECKING:
    Times = array[int]

_FORGET_FROM = 4096
"""So many release times are kept before those of runs that are gone are looked for."""


class TimedRecord(Record, Protocol):
    """A log record with its time stamp (:class:`ipc.Record` is one)."""

    @property
    def time_ns(self) -> int:
        """When it was written, in nanoseconds since 1970."""
        ...


class Sample(NamedTuple):
    """One number: a metric, the values of its labels, and its value."""

    name: str
    labels: tuple[str, ...]
    value: float


class Histogram:
    """Observations counted by upper bound; one observation may count many times (once per block)."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Per bucket, not cumulative; the last one has no upper bound."""
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times


class Derivation:
    """What the metrics are after the events seen so far.

    Totals and histograms count from the first record that it was fed; levels are those of the whole state.

    Args:
        state: what the records continue; ``None``: they begin with the first event of a ledger.
        sequence: the last event in that state.
    """

    def __init__(self, state: State | None, sequence: int = 0) -> None:
        self.totals: Counter[tuple[str, tuple[str, ...]]] = Counter()
        """By name and labels."""
        self.histograms = {
            (metric.name, labels): Histogram(metric.buckets)
            for metric in METRICS
            if metric.kind == Kind.HISTOGRAM and not metric.pushes
            for labels in label_sets(metric, 0)
        }
        self.go_on(state, sequence)

    def go_on(self, state: State | None, sequence: int) -> None:
        """Go on from another state: what lies between was not seen. Totals and histograms stay."""
        self.state = state
        self.sequence = sequence
        """The last event that is in the state."""
        self._arrived: tuple[Times, Times] = array("q"), array("q")
        """Per tier, by block: when its copy got there, in ns; 0: not known."""
        self._released: dict[int, int] = {}
        """By run: when the last one who used it let go, in ns."""
        self._matched: dict[int, int] = {} if state is None else dict.fromkeys(sorted(state.requests), 0)
        """By live request, oldest first: when it began, in ns; 0: before the first record."""
        self._started: dict[int, int] = {}
        """By transfer in flight: when it was ordered, in ns."""
        self._workers: set[int] = set() if state is None else set(state.workers)
        self._first_ns = 0
        self._block_bytes = 0 if state is None else _block_bytes(state)

    def feed(self, records: Iterable[TimedRecord]) -> None:
        """Count the next records.

        Raises:
            InvariantViolation, statemachine.records.codec.CodecError: an event does not fit; it is not counted.
        """
        for record in records:
            event = event_of(record)
            state = self.state
            if state is None:
                self.state = step(None, event)
                self._block_bytes = _block_bytes(self.state)
            elif (observe := OBSERVERS.get(type(event))) is None:
                step(state, event)
            else:
                steps = observe(self, state, event, record.time_ns)
                next(steps)
                step(state, event)
                next(steps, None)
            self._count("kvledger_events_total", type(event).__name__)
            self.sequence = record.sequence
            self._first_ns = self._first_ns or record.time_ns

    def _count(self, name: str, *labels: str, by: int = 1) -> None:
        self.totals[name, labels] += by

    # One method per event that counts. What stands before the yield sees the state before the event, and counts
    # nothing: the event may turn out not to fit.

    def _request_matched(self, state: State, event: RequestMatched, now: int) -> Iterator[None]:
        unused = self._unused(state, event)
        yield
        self._use(unused, now)
        self._matched[event.request] = now
        found = event.device_blocks + event.host_blocks
        self._count("kvledger_requests_total")
        self._count("kvledger_queried_blocks_total", by=found + len(event.words) // state.block_bytes)
        self._count("kvledger_hit_blocks_total", "device", by=event.device_blocks)
        self._count("kvledger_hit_blocks_total", "host", by=event.host_blocks)

    def _request_extended(self, state: State, event: RequestExtended, now: int) -> Iterator[None]:
        unused = self._unused(state, event)
        yield
        self._use(unused, now)
        self._count("kvledger_hit_blocks_total", "device", by=event.device_blocks)

    def _blocks_allocated(self, state: State, event: BlocksAllocated, now: int) -> Iterator[None]:
        yield
        self._count("kvledger_allocated_blocks_total", by=len(event.blocks))

    def _allocation_refused(self, state: State, event: AllocationRefused, now: int) -> Iterator[None]:
        yield
        self._count("kvledger_refused_allocations_total")

    def _blocks_cached(self, state: State, event: BlocksCached, now: int) -> Iterator[None]:
        yield
        self._count("kvledger_cached_blocks_total", by=len(event.blocks))
        self._count("kvledger_duplicate_blocks_total", by=event.duplicates)
        self._arrive(Tier.DEVICE, event.blocks, now)

    def _copies_replaced(self, state: State, event: CopiesReplaced, now: int) -> Iterator[None]:
        yield
        arrived = self._arrived[Tier.DEVICE]
        since = [arrived[block] if block < len(arrived) else 0 for block in reversed(event.freed)]
        self._arrive(Tier.DEVICE, event.blocks, now)
        for block, old, at in zip(event.blocks, reversed(event.freed), since, strict=True):
            arrived[block] = at  # the content has been there that long
            if at:
                arrived[old] = 0

    def _request_released(self, state: State, event: RequestReleased, now: int) -> Iterator[None]:
        request = state.requests.get(event.request)
        path = state.path(request.leaf) if request is not None else []
        yield
        self._let_go(state, path, now)
        self._matched.pop(event.request, None)
        self._count("kvledger_released_requests_total", value_of(ReleaseReason(event.reason)))

    def _blocks_evicted(self, state: State, event: BlocksEvicted, now: int) -> Iterator[None]:
        yield
        self._inherit(state, event.upper)
        tier = Tier(event.tier)
        self._leave(tier, event.blocks, now)
        reason = value_of(EvictReason(event.reason))
        self._count("kvledger_evicted_blocks_total", value_of(tier), reason, by=len(event.blocks))

    def _tier_lost(self, state: State, event: TierLost, now: int) -> Iterator[None]:
        tier = Tier(event.tier)
        copies = (node.copies[tier] for node in state.nodes.values())
        lost = [copy.ids[:] for copy in copies if copy is not None]
        yield
        for ids in lost:
            self._leave(tier, ids, now)
        reason = value_of(EvictReason.TIER_LOST)
        self._count("kvledger_evicted_blocks_total", value_of(tier), reason, by=sum(map(len, lost)))
        self._count("kvledger_lost_tiers_total", value_of(tier))

    def _transfer_started(self, state: State, event: TransferStarted, now: int) -> Iterator[None]:
        yield
        self._inherit(state, event.upper)
        self._started[event.transfer] = now
        direction = Direction(event.direction)
        self._count("kvledger_swapped_blocks_total", value_of(direction), by=len(event.sources))
        if direction == Direction.SWAP_OUT:
            self._leave(Tier.DEVICE, event.sources, now)
            self._count("kvledger_evicted_blocks_total", "device", SWAPPED_OUT, by=len(event.sources))

    def _transfer_finished(self, state: State, event: TransferFinished, now: int) -> Iterator[None]:
        transfer = state.transfers.get(event.transfer)
        held = state.path(transfer.leaf) if transfer is not None and transfer.leaf is not None else []
        cut = _run_to_cut(transfer, event.valid) if transfer is not None and event.upper else None
        since = None if cut is None else now if cut.pins else self._released.get(cut.id)
        yield
        assert transfer is not None  # or the event would not fit
        self._let_go(state, held, now)
        if since is not None and event.upper in state.nodes:
            self._released[event.upper] = since  # the part that is left of it
        direction, outcome = transfer.direction, Outcome(event.outcome)
        label = value_of(direction)
        self._count("kvledger_transfers_total", label, value_of(outcome))
        self._count("kvledger_swap_bytes_total", label, by=event.valid * self._block_bytes)
        started = self._started.pop(event.transfer, 0)
        if started and outcome == Outcome.DONE:
            self.histograms["kvledger_swap_seconds", (label,)].observe(max(now - started, 0) / 1e9)
        if direction == Direction.SWAP_IN:
            self._arrive(Tier.DEVICE, transfer.targets[: event.valid], now)
            if state.policy == HostPolicy.EXCLUSIVE:
                self._leave(Tier.HOST, transfer.sources[: event.valid], now)
        else:
            self._arrive(Tier.HOST, transfer.targets[: event.valid], now)

    def _cache_cleared(self, state: State, event: CacheCleared, now: int) -> Iterator[None]:
        yield
        self._count("kvledger_cleared_caches_total")

    def _worker_joined(self, state: State, event: WorkerJoined, now: int) -> Iterator[None]:
        yield
        self._workers.add(event.rank)

    def _worker_lost(self, state: State, event: WorkerLost, now: int) -> Iterator[None]:
        yield
        self._workers.discard(event.rank)
        self._count("kvledger_lost_workers_total", str(event.rank))

    # When blocks came, and when runs were let go

    def _arrive(self, tier: Tier, blocks: IntArray, now: int) -> None:
        arrived = self._arrived[tier]
        if blocks and max(blocks) >= len(arrived):
            arrived.extend([0] * (max(blocks) + 1 - len(arrived)))
        for block in blocks:
            arrived[block] = now

    def _leave(self, tier: Tier, blocks: IntArray, now: int) -> None:
        arrived = self._arrived[tier]
        known = len(arrived)
        histogram = self.histograms["kvledger_residency_seconds", (value_of(tier),)]
        for since, count in Counter([arrived[block] for block in blocks if block < known]).items():
            if since:
                histogram.observe(max(now - since, 0) / 1e9, count)
        for block in blocks:
            if block < known:
                arrived[block] = 0

    def _unused(self, state: State, event: RequestMatched | RequestExtended) -> list[tuple[int, int]]:
        """``(since when, blocks)`` of the runs on the path to ``event.leaf`` that nobody uses, where it is known."""
        unused = []
        node = state.nodes.get(event.leaf)
        size = event.cut
        while node is not None and node.parent is not None:
            since = self._released.get(node.id)
            if since is not None and not node.pins:
                unused.append((since, size or node.size))
            node, size = node.parent, 0
        return unused

    def _use(self, unused: list[tuple[int, int]], now: int) -> None:
        for since, blocks in unused:
            self.histograms["kvledger_reuse_gap_seconds", ()].observe(max(now - since, 0) / 1e9, blocks)

    def _let_go(self, state: State, path: list[Node], now: int) -> None:
        """Those of these runs that nobody uses any more can be matched from now on."""
        for node in path:
            if not node.pins and state.nodes.get(node.id) is node:
                self._released[node.id] = now
        if len(self._released) > max(_FORGET_FROM, 2 * len(state.nodes)):
            self._released = {id: since for id, since in self._released.items() if id in state.nodes}

    def _inherit(self, state: State, upper: int) -> None:
        """The upper part of a run that was cut was let go when the lower part was."""
        node = state.nodes.get(upper)
        if node is not None:
            for child in node.children.values():
                if child.id in self._released:
                    self._released[upper] = self._released[child.id]

    # What is there

    def samples(self, now_ns: int) -> Iterator[Sample]:
        """All totals, and the levels of the state. ``now_ns``: what ages are measured against."""
        state = self.state
        if state is None:
            return
        for metric in METRICS:
            if metric.kind == Kind.COUNTER and not metric.pushes and (metric.name != _SWAP_BYTES or self._block_bytes):
                for labels in label_sets(metric, state.opened.ranks):
                    yield Sample(metric.name, labels, self.totals[metric.name, labels])
        for tier in Tier:
            yield Sample("kvledger_pool_capacity_blocks", (value_of(tier),), state.pool(tier).capacity)
            for owner, blocks in _owners(state, tier).items():
                yield Sample("kvledger_pool_blocks", (value_of(tier), owner), blocks)
        flying = Counter(value_of(each.direction) for each in state.transfers.values() if not each.quarantined)
        for direction in DIRECTIONS:
            yield Sample("kvledger_transfers_in_flight", (direction,), flying[direction])
        oldest = next(iter(self._matched.values()), now_ns) or self._first_ns
        for name, value in {
            "kvledger_quarantined_transfers": len(state.transfers) - flying.total(),
            "kvledger_runs": len(state.nodes),
            "kvledger_live_requests": len(state.requests),
            "kvledger_waiting_requests": sum(bool(request.waits_for) for request in state.requests.values()),
            "kvledger_oldest_pin_seconds": max(now_ns - oldest, 0) / 1e9,
            "kvledger_workers": len(self._workers),
            "kvledger_expected_workers": state.opened.ranks,
            "kvledger_epoch": state.epoch,
        }.items():
            yield Sample(name, (), value)


_SWAP_BYTES = "kvledger_swap_bytes_total"
_Observer = Callable[[Derivation, State, Any, int], Iterator[None]]
OBSERVERS: dict[type[Event], _Observer] = {
    RequestMatched: Derivation._request_matched,
    RequestExtended: Derivation._request_extended,
    BlocksAllocated: Derivation._blocks_allocated,
    AllocationRefused: Derivation._allocation_refused,
    BlocksCached: Derivation._blocks_cached,
    CopiesReplaced: Derivation._copies_replaced,
    RequestReleased: Derivation._request_released,
    BlocksEvicted: Derivation._blocks_evicted,
    TierLost: Derivation._tier_lost,
    TransferStarted: Derivation._transfer_started,
    TransferFinished: Derivation._transfer_finished,
    CacheCleared: Derivation._cache_cleared,
    WorkerJoined: Derivation._worker_joined,
    WorkerLost: Derivation._worker_lost,
}


def _run_to_cut(transfer: Transfer, valid: int) -> Node | None:
    """The run in which the blocks of a transfer that arrived end."""
    for part in transfer.parts:
        if valid < part.size:
            return part.node
        valid -= part.size
    return None


def _owners(state: State, tier: Tier) -> dict[str, int]:
    """Blocks of a tier by what they are used for; what is left over is cached (on the device: and pinned)."""
    pool = state.pool(tier)
    found = {"free": len(pool.free)}
    if tier == Tier.DEVICE:
        found["private"] = sum(
            len(request.table) - request.leaf.end + sum(stop - start for start, stop in request.duplicate_ranges)
            for request in state.requests.values()
        )
        found["evictable"] = state.device.evictable
    found["in_transfer"] = found["quarantined"] = 0
    for transfer in state.transfers.values():
        found["quarantined" if transfer.quarantined else "in_transfer"] += len(transfer.own_blocks(tier))
    found["pinned" if tier == Tier.DEVICE else "cached"] = pool.capacity - sum(found.values())
    return found


def _block_bytes(state: State) -> int:
    """Bytes of one block over all layers and ranks; 0: the ledger has no pools (or this version cannot read which)."""
    try:
        layout = PoolLayout.parse(state.opened.layout)
    except ValueError:
        return 0
    return layout.ranks * layout.layers * layout.block_bytes
