"""A log as a timeline for the Perfetto UI, in Perfetto's own protobuf format (``TracePacket``).

Tracks: one per request (what it waits for, and when it runs), one per transfer in the lanes of its direction, evictions
and refusals as instants, and counters: who has the blocks of each tier, and the hit rate. Tracks of one kind share a
name, by which the UI folds them into as few lanes as there are at a time.

The packets are made with the ``perfetto`` package, from the extra ``export``; it is imported when it is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, assert_never

from kvledger.debugger.export.occupancy import occupancy
from kvledger.debugger.export.output import CannotWrite
from kvledger.debugger.source.source import Entry, Source
from kvledger.debugger.source.steps import stepped
from kvledger.text import printable
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksChosen,
    BlocksComputed,
    BlocksDistrusted,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    CopiesReplaced,
    DigestTaken,
    Direction,
    EngineDeparted,
    EpochStarted,
    EvictReason,
    LedgerOpened,
    Outcome,
    PoolResized,
    QuarantineEnded,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    SideAllocated,
    SideFreed,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.state.state import State

_ROOT, _REQUESTS, _TRANSFERS, _BLOCKS = 1, 2, 3, 4
_EVICTIONS, _REFUSALS, _HIT_RATE = 10, 12, 13
_COUNTERS = 20
_FIRST_REQUEST, _FIRST_TRANSFER = 1 << 32, 1 << 48
"""Track ids: a request's and a transfer's own number come on top."""
_REALTIME, _BOOTTIME = 1, 6
"""Builtin clocks of Perfetto. A trace's own clock is boot time; a snapshot says what wall-clock time that was."""
_STATE_CLEARED = 1
_RECENT = 100


class _Packets:
    """Writes packets, one at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import CounterDescriptor, TrackDescriptor, TrackEvent
            from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder
        except ImportError:
            raise CannotWrite("a timeline needs the perfetto package: pip install 'kvledger[export]'") from None
        self._builder = StreamingTraceProtoBuilder(file)
        self._types = TrackEvent.Type
        self._units = CounterDescriptor.Unit
        self._orders = TrackDescriptor.ChildTracksOrdering

    def _packet(self) -> Any:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = 1
        return packet

    def start(self, time_ns: int) -> None:
        """The first packet: which clock this is."""
        packet = self._packet()
        packet.sequence_flags = _STATE_CLEARED
        packet.clock_snapshot.primary_trace_clock = _BOOTTIME
        for clock in (_BOOTTIME, _REALTIME):
            packet.clock_snapshot.clocks.add(clock_id=clock, timestamp=time_ns)
        self._builder.write_packet(packet)

    def track(self, id: int, parent: int, name: str, *, unit: str = "") -> None:
        """Declare a track, with ``unit`` a counter."""
        packet = self._packet()
        descriptor = packet.track_descriptor
        descriptor.uuid = id
        descriptor.name = name
        if parent:
            descriptor.parent_uuid = parent
        if unit:
            descriptor.counter.unit_name = unit
        else:
            descriptor.child_ordering = self._orders.EXPLICIT if not parent else self._orders.CHRONOLOGICAL
        descriptor.sibling_order_rank = id if id < _FIRST_REQUEST else 0
        self._builder.write_packet(packet)

    def _event(self, track: int, time_ns: int, type: int) -> tuple[Any, Any]:
        packet = self._packet()
        packet.timestamp = time_ns
        packet.timestamp_clock_id = _BOOTTIME
        packet.track_event.type = type
        packet.track_event.track_uuid = track
        return packet, packet.track_event

    def begin(self, track: int, time_ns: int, name: str, **values: int | str) -> None:
        """A slice begins."""
        self._named(track, time_ns, self._types.TYPE_SLICE_BEGIN, name, values)

    def instant(self, track: int, time_ns: int, name: str, **values: int | str) -> None:
        """Something happened."""
        self._named(track, time_ns, self._types.TYPE_INSTANT, name, values)

    def end(self, track: int, time_ns: int, **values: int | str) -> None:
        """The innermost slice ends."""
        self._named(track, time_ns, self._types.TYPE_SLICE_END, "", values)

    def _named(self, track: int, time_ns: int, type: int, name: str, values: dict[str, int | str]) -> None:
        packet, event = self._event(track, time_ns, type)
        if name:
            event.name = name
        for key, value in values.items():
            if isinstance(value, int):
                event.debug_annotations.add(name=key, int_value=value)
            else:
                event.debug_annotations.add(name=key, string_value=value)
        self._builder.write_packet(packet)

    def count(self, track: int, time_ns: int, value: int | float) -> None:
        """A counter has a new value."""
        packet, event = self._event(track, time_ns, self._types.TYPE_COUNTER)
        if isinstance(value, int):
            event.counter_value = value
        else:
            event.double_counter_value = value
        self._builder.write_packet(packet)


class _Timeline:
    """Turns events into packets."""

    def __init__(self, packets: _Packets, name: str, time_ns: int) -> None:
        self._packets = packets
        self._phases: dict[int, str] = {}
        """By living request: the slice that is open inside its own."""
        self._counted: dict[int, float] = {}
        """By counter track."""
        self._recent: deque[list[int]] = deque(maxlen=_RECENT)
        """Of the last requests: blocks found, blocks asked for."""
        self._hits: dict[int, list[int]] = {}
        """The same by living request."""
        packets.start(time_ns)
        packets.track(_ROOT, 0, f"kvledger {printable(name)}")
        packets.track(_REQUESTS, _ROOT, "requests")
        packets.track(_TRANSFERS, _ROOT, "transfers")
        packets.track(_BLOCKS, _ROOT, "blocks")
        for tier in Tier:
            packets.track(_EVICTIONS + tier, _ROOT, f"{tier.name.lower()} evictions")
        packets.track(_REFUSALS, _ROOT, "refused allocations")
        packets.track(_HIT_RATE, _ROOT, f"hit rate, last {_RECENT} requests", unit="%")

    def resume(self, state: State, time_ns: int) -> None:
        """A log that begins in the middle: what lives already."""
        for request in state.requests.values():
            self._open_request(request.number, request.request_id, time_ns, table=len(request.table))
            self._phase(state, request.number, time_ns)
        for transfer in state.transfers.values():
            self._open_transfer(transfer.id, transfer.direction, time_ns, len(transfer.targets))
            if transfer.quarantined:
                self._packets.begin(_FIRST_TRANSFER + transfer.id, time_ns, "quarantined")
        self.count(state, time_ns)

    def event(self, entry: Entry, state: State) -> None:
        """An event, and the state after its transaction."""
        packets, time = self._packets, entry.time_ns
        match entry.event:
            case RequestMatched() as event:
                asked = state.requests[event.request].leaf.end + len(event.words) // state.block_bytes
                self._hits[event.request] = [event.device_blocks + event.host_blocks, asked]
                self._recent.append(self._hits[event.request])
                values = {"device_hit_blocks": event.device_blocks, "host_hit_blocks": event.host_blocks}
                self._open_request(event.request, event.key, time, asked_blocks=asked, step=entry.step, **values)
            case RequestExtended() as event:
                if event.request in self._hits:
                    self._hits[event.request][0] += event.device_blocks
                values = {"device_hit_blocks": event.device_blocks, "given_back_blocks": len(event.blocks)}
                packets.instant(_FIRST_REQUEST + event.request, time, "goes on along cached blocks", **values)
            case RequestReleased() as event:
                self._hits.pop(event.request, None)
                if self._phases.pop(event.request):
                    packets.end(_FIRST_REQUEST + event.request, time)
                reason = ReleaseReason(event.reason).name.lower()
                packets.end(_FIRST_REQUEST + event.request, time, reason=reason, final_runs=event.final)
            case AllocationRefused() as event:
                name = f"{event.wanted} blocks wanted, {event.available} available"
                packets.instant(_REFUSALS, time, name, request=printable(event.key), sequence=entry.sequence)
            case BlocksEvicted() as event:
                name = f"{len(event.blocks)} blocks ({EvictReason(event.reason).name.lower()})"
                packets.instant(_EVICTIONS + event.tier, time, name, runs=len(event.nodes), sequence=entry.sequence)
            case TransferStarted() as event:
                self._open_transfer(event.transfer, Direction(event.direction), time, len(event.targets))
            case TransferFinished() as event:
                track = _FIRST_TRANSFER + event.transfer
                outcome = Outcome(event.outcome)
                if outcome == Outcome.TIMED_OUT:
                    packets.begin(track, time, "quarantined")
                else:
                    packets.end(track, time, outcome=outcome.name.lower(), valid_blocks=event.valid)
            case QuarantineEnded() as event:
                packets.end(_FIRST_TRANSFER + event.transfer, time)
                packets.end(_FIRST_TRANSFER + event.transfer, time, outcome="timed_out")
            case BlocksAllocated() | BlocksCached() | BlocksComputed() | BlocksReassigned() | BlocksTrimmed():
                pass  # the counters show what they come to
            case LedgerOpened() | BlocksDistrusted() | CacheCleared() | CopiesReplaced() | PoolResized() | TierLost():
                pass  # likewise
            case WorkerJoined() | WorkerLost() | EpochStarted() | DigestTaken() | WeightsLoaded() | EngineDeparted():
                pass
            case SideAllocated() | WindowPassed() | SideFreed() | BlocksChosen():
                pass
            case _:
                assert_never(entry.event)

    def transaction(self, state: State, time_ns: int) -> None:
        """After the last event of a transaction: who waits, who runs, and how much there is."""
        for request in state.requests:
            self._phase(state, request, time_ns)
        self.count(state, time_ns)

    def count(self, state: State, time_ns: int) -> None:
        """Write the counters that have changed."""
        for tier in Tier:
            if state.pool(tier).capacity:
                for index, (name, value) in enumerate(occupancy(state, tier)._asdict().items()):
                    if name != "private" or tier == Tier.DEVICE:
                        label = f"{tier.name.lower()} {name.replace('_', ' ')}"
                        self._count(_COUNTERS + 10 * tier + index, label, time_ns, value)
        asked = sum(asked for _, asked in self._recent)
        if asked:
            rate = 100.0 * sum(found for found, _ in self._recent) / asked
            self._count(_HIT_RATE, "", time_ns, rate)

    def _count(self, track: int, label: str, time_ns: int, value: float) -> None:
        if track not in self._counted and label:
            self._packets.track(track, _BLOCKS, label, unit="blocks")
        if self._counted.get(track) != value:
            self._counted[track] = value
            self._packets.count(track, time_ns, value)

    def _open_request(self, request: int, key: str, time_ns: int, **values: int | str) -> None:
        self._packets.track(_FIRST_REQUEST + request, _REQUESTS, "request")
        self._packets.begin(_FIRST_REQUEST + request, time_ns, f"request {printable(key)}", request=request, **values)
        self._phases[request] = ""

    def _phase(self, state: State, request: int, time_ns: int) -> None:
        waits = state.requests[request].waits_for
        phase = "running"
        if waits:
            directions = {state.transfers[id].direction for id in waits}
            arriving = Direction.SWAP_IN in directions
            phase = "waiting for blocks to arrive" if arriving else "waiting for blocks to leave"
        if self._phases[request] != phase:
            if self._phases[request]:
                self._packets.end(_FIRST_REQUEST + request, time_ns)
            self._packets.begin(_FIRST_REQUEST + request, time_ns, phase)
            self._phases[request] = phase

    def _open_transfer(self, transfer: int, direction: Direction, time_ns: int, blocks: int) -> None:
        name = direction.name.lower().replace("_", " ")
        self._packets.track(_FIRST_TRANSFER + transfer, _TRANSFERS, name)
        self._packets.begin(
            _FIRST_TRANSFER + transfer, time_ns, f"{name} of {blocks} blocks", transfer=transfer, blocks=blocks
        )


def write_timeline(source: Source, path: Path, progress: Callable[[int], None] = lambda done: None) -> None:
    """Write a log as a Perfetto trace.

    Raises:
        CannotWrite: the ``perfetto`` package is missing.
        SourceError, Contradiction: the log cannot be read.
    """
    with open(path, "wb") as file:
        packets = _Packets(file)
        timeline: _Timeline | None = None
        before = source.before(source.first)
        for transaction, state in stepped(source):
            time_ns = transaction[-1].time_ns
            if timeline is None:
                timeline = _Timeline(packets, Path(source.name).name, transaction[0].time_ns)
                if before is not None:
                    timeline.resume(before, transaction[0].time_ns)
            for entry in transaction:
                timeline.event(entry, state)
            timeline.transaction(state, time_ns)
            progress(transaction[-1].sequence)
