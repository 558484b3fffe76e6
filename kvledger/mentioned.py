"""Which stretches of a recording mention a block, a request, a run or a transfer: a table beside its snapshots.

A question about one block among millions of events then reads only the stretches that speak of it. Blocks, which are
few and mentioned everywhere, are kept as one bit per stretch and block; what is numbered without end, as sorted lists.
"""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard
from crc32c import crc32c

from statemachine.events import AllocationRefused, Event, RequestMatched
from statemachine.mentions import mentions
from statemachine.state import State

Kind = Literal["device", "host", "request", "key", "node", "transfer"]
"""``key``: a request by its name, see :func:`key_number`."""

_BLOCKS: tuple[Kind, ...] = ("device", "host")
_NUMBERED: tuple[Kind, ...] = ("request", "key", "node", "transfer")


def key_number(key: str) -> int:
    """A request's name as the number that stands for it in the table. Others may share it."""
    return int(crc32c(key.encode()))


class Mentioned:
    """The table, while it is built stretch by stretch and when it is asked."""

    def __init__(self) -> None:
        self._now: dict[Kind, set[int]] = {kind: set() for kind in (*_BLOCKS, *_NUMBERED)}
        self._bits: dict[Kind, list[npt.NDArray[np.uint8]]] = {kind: [] for kind in _BLOCKS}
        self._lists: dict[Kind, list[npt.NDArray[np.uint64]]] = {kind: [] for kind in _NUMBERED}

    def add(self, event: Event, state: State) -> None:
        """An event of the present stretch, and the state after it. A match mentions every run of its path."""
        now = self._now
        found = mentions(event)
        now["device"].update(found.device)
        now["host"].update(found.host)
        now["request"].update(found.requests)
        now["node"].update(found.nodes)
        now["transfer"].update(found.transfers)
        if type(event) is RequestMatched:
            now["key"].add(key_number(event.key))
            node = state.requests[event.request].leaf
            runs = now["node"]
            while node.parent is not None:
                runs.add(node.id)
                node = node.parent
        elif type(event) is AllocationRefused:
            now["key"].add(key_number(event.key))

    def end_stretch(self) -> None:
        """The next event begins another stretch."""
        for kind in _BLOCKS:
            ids = np.fromiter(self._now[kind], np.int64)
            bits = np.zeros(int(ids.max(initial=-1)) + 1, np.bool_)
            bits[ids] = True
            self._bits[kind].append(np.packbits(bits, bitorder="little"))
        for kind in _NUMBERED:
            self._lists[kind].append(np.sort(np.fromiter(self._now[kind], np.uint64)))
        for ids_now in self._now.values():
            ids_now.clear()

    def pack(self) -> bytes:
        """As bytes, for :meth:`unpack`."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for kind in _BLOCKS:
            width = max((len(bits) for bits in self._bits[kind]), default=0)
            arrays[kind] = np.zeros((len(self._bits[kind]), width), np.uint8)
            for row, bits in zip(arrays[kind], self._bits[kind]):
                row[: len(bits)] = bits
        for kind in _NUMBERED:
            lists = self._lists[kind]
            ids = np.concatenate([*lists, np.empty(0, np.uint64)])
            small = not len(ids) or int(ids.max()) < 1 << 32
            arrays[kind] = ids.astype(np.uint32) if small else ids
            arrays[f"{kind}_ends"] = np.cumsum([len(part) for part in lists], dtype=np.int64)
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **arrays)
        return zstandard.ZstdCompressor(level=1).compress(file.getvalue())

    @staticmethod
    def stretches(packed: bytes, kind: Kind, id: int) -> list[int]:
        """Numbers of the stretches that mention ``id``, ascending.

        Raises:
            ValueError: these are not the bytes of such a table.
        """
        try:
            with np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(packed)), allow_pickle=False) as arrays:
                ids = arrays[kind]
                if kind in _BLOCKS:
                    if id >> 3 >= ids.shape[1]:
                        return []
                    found = np.flatnonzero(ids[:, id >> 3] >> (id & 7) & 1)
                else:
                    at = np.flatnonzero(ids == id) if id >= 0 else np.empty(0, np.int64)
                    found = np.unique(np.searchsorted(arrays[f"{kind}_ends"], at, side="right"))
                return [int(number) for number in found]
        except (zstandard.ZstdError, KeyError, OSError) as error:
            raise ValueError(f"not a table of mentions: {error}") from error
