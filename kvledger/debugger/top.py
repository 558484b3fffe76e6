"""What a living ledger is doing right now, observed from its log, unnoticed by its engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, assert_never

from ipc import Control, LedgerError, LedgerNotFound, Overrun, memory
from kvledger.debugger.export.occupancy import Occupancy, occupancy
from kvledger.debugger.source import open_source
from kvledger.debugger.source.source import Entry, Source, SourceError, Tail
from statemachine.apply import apply
from statemachine.errors import Contradiction
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
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
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
from statemachine.records.replay import MISFITS, misfit_text
from statemachine.state.state import State
from workers.processes import acknowledgements, loop

_SECOND = 1_000_000_000
MINUTE_S = 60


class HitRate(NamedTuple):
    """Blocks that requests asked for, and where they were found."""

    asked: int
    device: int
    host: int


class OldestPin(NamedTuple):
    """The request that has held its blocks longest."""

    key: str
    age_s: float | None
    """``None``: since before this observer can tell."""
    blocks: int
    waits: bool


class InFlight(NamedTuple):
    """A transfer."""

    transfer: int
    direction: str
    blocks: int
    age_s: float | None
    quarantined: bool


class Reader(NamedTuple):
    """A process that the ledger knows to read its log."""

    name: str
    pid: int
    alive: bool
    lag: int
    """Events it has not read yet."""
    heartbeat_s: float | None
    """Since it last said that it lives; ``None``: it does not say."""


class Frame(NamedTuple):
    """One look at a ledger."""

    ledger: str
    time_ns: int
    sequence: int
    last_event_s: float | None
    """Since the last event."""
    writer: int
    writer_alive: bool
    epoch: int
    events_per_s: float
    """Over the last ten seconds."""
    device: Occupancy
    device_evictable: int
    host: Occupancy
    total: HitRate
    """Since the ledger was created."""
    minute: HitRate
    """In the last minute, as far as the log reaches back."""
    requests: int
    waiting: int
    """Of the requests: those that wait for a transfer."""
    oldest: OldestPin | None
    transfers: list[InFlight]
    """Oldest first."""
    refusals_minute: int
    refusals: int
    """Totals since the oldest event that is still there."""
    evicted_minute: tuple[int, int]
    """Blocks evicted from the device and from the host in the last minute."""
    readers: list[Reader]


class _Minute:
    """Sums of what happened in the last minute."""

    def __init__(self, width: int) -> None:
        self._seconds: deque[tuple[int, list[int]]] = deque()
        self._width = width

    def add(self, time_ns: int, *values: int) -> None:
        """Count ``values`` at a moment. Moments come in order, nearly."""
        second = time_ns // _SECOND
        if not self._seconds or self._seconds[-1][0] < second:
            self._seconds.append((second, [0] * self._width))
            while self._seconds[0][0] < second - MINUTE_S:
                self._seconds.popleft()
        sums = self._seconds[-1][1]
        for index, value in enumerate(values):
            sums[index] += value

    def sums(self, now_ns: int, seconds: int = MINUTE_S) -> list[int]:
        """Sums over the last so many seconds."""
        since = now_ns // _SECOND - seconds
        kept = [sums for second, sums in self._seconds if second >= since]
        return [sum(column) for column in zip(*kept)] or [0] * self._width


class Top:
    """An observer of one ledger: :meth:`poll` now and then, :meth:`frame` to look, :meth:`close` at the end.

    Args:
        progress: see :func:`kvledger.debugger.open_source`.

    Raises:
        SourceError: there is no such ledger, or its state cannot be known.
        Contradiction: an event contradicts the state that it meets.
    """

    def __init__(self, name: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        if "/" in name or name.endswith(".kvlog"):
            raise SourceError(f"{name} is a recording, nothing happens in it: name a living ledger")
        self.ledger = name
        self._source: Source = open_source(name, progress)
        self._control = Control.open(name)
        self._tail: Tail
        self._state: State
        self._sequence = 0
        self._last_ns = 0
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Take up the newest state; what the log still tells about the time before is read for its times only."""
        self._events = _Minute(1)
        self._hits = _Minute(3)
        self._evicted = _Minute(2)
        self._refused = _Minute(1)
        self._refusals = 0
        self._request_times: dict[int, int] = {}
        self._transfer_times: dict[int, int] = {}
        last = self._source.last
        self._state = self._source.at(last)
        self._sequence = last
        for entry in self._source.entries(None, last):
            self._note(entry)
        self._tail = self._source.tail(last + 1)

    def poll(self) -> int:
        """Take in what was written since. Returns the number of events.

        Raises:
            SourceError: the ledger went on faster than this observer, and there is no snapshot to go on from.
            Contradiction
        """
        seen = 0
        try:
            while entries := self._tail.poll():
                for entry in entries:
                    try:
                        apply(self._state, entry.event)
                    except MISFITS as error:
                        raise Contradiction(entry.sequence, f"event {entry.sequence}: {misfit_text(error)}") from error
                    self._sequence = entry.sequence
                    self._note(entry)
                seen += len(entries)
        except Overrun:
            self._tail.close()
            self._begin()
        except LedgerNotFound:  # it was removed while we read on
            return seen
        except LedgerError as error:
            raise SourceError(str(error)) from error
        return seen

    def _note(self, entry: Entry) -> None:
        time_ns = self._last_ns = entry.time_ns
        self._events.add(time_ns, 1)
        match entry.event:
            case RequestMatched() as event:
                self._request_times[event.request] = time_ns
                asked = event.device_blocks + event.host_blocks + len(event.words) // self._state.block_bytes
                self._hits.add(time_ns, asked, event.device_blocks, event.host_blocks)
            case RequestExtended() as event:
                self._hits.add(time_ns, 0, event.device_blocks, 0)
            case RequestReleased() as event:
                self._request_times.pop(event.request, None)
            case TransferStarted() as event:
                self._transfer_times[event.transfer] = time_ns
                if event.direction == Direction.SWAP_OUT:
                    self._evicted.add(time_ns, len(event.sources), 0)
            case TransferFinished() as event:
                if event.transfer not in self._state.transfers:  # else it is quarantined
                    self._transfer_times.pop(event.transfer, None)
            case BlocksEvicted() as event:
                device = event.tier == Tier.DEVICE
                self._evicted.add(time_ns, len(event.blocks) * device, len(event.blocks) * (not device))
            case AllocationRefused():
                self._refusals += 1
                self._refused.add(time_ns, 1)
            case BlocksAllocated() | BlocksCached() | BlocksComputed() | BlocksReassigned() | BlocksTrimmed():
                pass
            case LedgerOpened() | QuarantineEnded() | CacheCleared() | PoolResized() | TierLost():
                pass
            case BlocksDistrusted() | CopiesReplaced() | BlocksChosen() | EngineDeparted():
                pass
            case WorkerJoined() | WorkerLost() | EpochStarted() | DigestTaken() | WeightsLoaded():
                pass
            case SideAllocated() | WindowPassed() | SideFreed():
                pass
            case _:
                assert_never(entry.event)

    @property
    def ended(self) -> bool:
        """Whether nothing can come any more: the ledger was removed, or nobody writes it."""
        return not self._control.exists() or not self._control.writer_alive()

    def frame(self) -> Frame:
        """What is known now."""
        state, now = self._state, time.time_ns()
        counters = state.counters
        evicted = self._evicted.sums(now)
        return Frame(
            ledger=self.ledger,
            time_ns=now,
            sequence=self._sequence,
            last_event_s=self._age(self._last_ns or None, now),
            writer=self._control.owner.pid,
            writer_alive=self._control.writer_alive(),
            epoch=state.epoch,
            events_per_s=self._events.sums(now, 10)[0] / 10,
            device=occupancy(state, Tier.DEVICE),
            device_evictable=state.device.evictable,
            host=occupancy(state, Tier.HOST),
            total=HitRate(counters.queried_blocks, counters.device_hit_blocks, counters.host_hit_blocks),
            minute=HitRate(*self._hits.sums(now)),
            requests=len(state.requests),
            waiting=sum(bool(request.waits_for) for request in state.requests.values()),
            oldest=self._oldest(now),
            transfers=[
                InFlight(
                    id,
                    one.direction.name.lower(),
                    len(one.targets),
                    self._age(self._transfer_times.get(id), now),
                    one.quarantined,
                )
                for id, one in state.transfers.items()
            ],
            refusals_minute=self._refused.sums(now)[0],
            refusals=self._refusals,
            evicted_minute=(evicted[0], evicted[1]),
            readers=self._readers(now),
        )

    def _oldest(self, now: int) -> OldestPin | None:
        request = next(iter(self._state.requests.values()), None)
        if request is None:
            return None
        age = self._age(self._request_times.get(request.number), now)
        return OldestPin(request.request_id, age, len(request.table), bool(request.waits_for))

    def _readers(self, now: int) -> list[Reader]:
        heartbeats = {f"transfer {rank}": self._heartbeat(rank, now) for rank in self._state.workers}
        return [
            Reader(line.name, line.pid, line.alive, max(self._sequence + 1 - line.cursor, 0), heartbeats.get(line.name))
            for line in self._control.readers()
        ]

    def _heartbeat(self, rank: int, now: int) -> float | None:
        name = acknowledgements.signals_name(self.ledger, rank, self._state.workers[rank])
        try:
            map = memory.attach(name, write=False)
        except LedgerError:
            return None
        beat = int.from_bytes(map[loop.HEARTBEAT * 8 : loop.HEARTBEAT * 8 + 8], "little")
        map.close()
        return self._age(beat or None, now)

    @staticmethod
    def _age(since_ns: int | None, now: int) -> float | None:
        return None if since_ns is None else max((now - since_ns) / _SECOND, 0.0)

    def close(self) -> None:
        """Let go of everything."""
        if hasattr(self, "_tail"):
            self._tail.close()
        self._control.close()
        self._source.close()
