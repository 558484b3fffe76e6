"""What a log does over time, in rows: how many events of each kind, and how full the pools are afterwards.

A row stands for up to 128 consecutive events, so that ten million of them are 80,000 rows and any zoom of them is a few
array operations. A recording keeps its timeline in its index.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from statemachine.events import KINDS
from statemachine.state.state import State

ROW_EVENTS = 128
_KINDS = max(KINDS) + 1
_SAMPLES = ("device_blocks", "device_free", "device_evictable", "host_blocks", "host_free", "requests", "transfers")
_TOTALS = (
    "queried_blocks",
    "device_hit_blocks",
    "host_hit_blocks",
    "device_evicted_blocks",
    "host_evicted_blocks",
    "failed_transfers",
)
_COLUMNS = 3 + _KINDS + len(_SAMPLES) + len(_TOTALS)
_SAMPLE, _TOTAL = 3 + _KINDS, 3 + _KINDS + len(_SAMPLES)
_LARGEST = 1 << 30
"""Bytes: more than any timeline that this module writes."""

Rows = npt.NDArray[np.int64]


class Timeline:
    """Rows of a log, oldest first: last sequence and its time, events, events per kind, samples, totals.

    Args:
        data: rows that there are already.
        before: the state before the first row; ``None``: it begins with the first event of a ledger.
    """

    def __init__(self, data: bytes = b"", before: State | None = None) -> None:
        self._data = array("q", data)
        self._before = [0] * len(_TOTALS) if before is None else _totals(before)

    def __len__(self) -> int:
        return len(self._data) // _COLUMNS

    @property
    def last(self) -> int:
        """The last event that is in a row; 0: there is none."""
        return self._data[-_COLUMNS] if self._data else 0

    def add(self, last: int, time_ns: int, kinds: Sequence[int], state: State) -> None:
        """One more row: these ``kinds`` of events, the last of them with this sequence, led to ``state``."""
        counts = Counter(kinds)
        device, host = state.device, state.host
        self._data.extend((last, time_ns, len(kinds)))
        self._data.extend([counts[kind] for kind in range(_KINDS)])
        self._data.extend(
            (
                device.pool.capacity,
                len(device.pool.free),
                device.evictable,
                host.pool.capacity,
                len(host.pool.free),
                len(state.requests),
                len(state.transfers),
            )
        )
        self._data.extend(_totals(state))

    def pack(self) -> bytes:
        """The rows as one compressed frame."""
        return zstandard.ZstdCompressor(level=3).compress(self._data.tobytes())

    @classmethod
    def unpack(cls, frame: bytes, before: State | None = None) -> Timeline:
        """What :meth:`pack` made. Raises :class:`ValueError`: it is damaged."""
        try:
            data = zstandard.ZstdDecompressor().decompress(frame, max_output_size=_LARGEST)
        except zstandard.ZstdError as error:
            raise ValueError(f"the timeline is damaged: {error}") from error
        if len(data) % (8 * _COLUMNS):
            raise ValueError("the timeline has half a row")
        return cls(data, before)

    def buckets(self, start: int, stop: int, number: int) -> dict[str, Any]:
        """The events ``start`` to ``stop`` (included) in at most ``number`` buckets of whole rows.

        Per bucket: its last sequence and time; events by kind; pools and totals as they were at its end, and
        ``device_room_min``, the fewest free or evictable blocks of the device in it. The first bucket may begin
        before ``start``, the last end behind ``stop``.
        """
        rows: Rows = np.frombuffer(self._data, np.int64).reshape(-1, _COLUMNS)
        first = int(np.searchsorted(rows[:, 0], start))
        end = min(int(np.searchsorted(rows[:, 0], stop)) + 1, len(rows))
        before = rows[first - 1, _TOTAL:].tolist() if first else self._before
        rows = rows[first:end].copy()  # the array may grow while a view of it does not exist
        if not len(rows):
            return {"start": start, "last": [], "time_ms": [], "kinds": {}, "device_room_min": []}
        edges = np.unique(np.linspace(0, len(rows), min(number, len(rows)) + 1).astype(np.int64))
        begins, ends = edges[:-1], edges[1:] - 1
        at_end = rows[ends]
        kinds = np.add.reduceat(rows[:, 3:_SAMPLE], begins)
        free = _SAMPLE + _SAMPLES.index("device_free")
        totals = np.diff(at_end[:, _TOTAL:], axis=0, prepend=[before])
        found: dict[str, Any] = {
            "start": int(rows[0, 0] - rows[0, 2] + 1),
            "last": at_end[:, 0].tolist(),
            "time_ms": (at_end[:, 1] / 1e6).tolist(),
            "kinds": {kind.__name__: kinds[:, number].tolist() for number, kind in KINDS.items()},
            "device_room_min": np.minimum.reduceat(rows[:, free] + rows[:, free + 1], begins).tolist(),
        }
        found |= {name: at_end[:, _SAMPLE + i].tolist() for i, name in enumerate(_SAMPLES)}
        found |= {name: totals[:, i].tolist() for i, name in enumerate(_TOTALS)}
        return found


def _totals(state: State) -> list[int]:
    return [getattr(state.counters, name) for name in _TOTALS]
