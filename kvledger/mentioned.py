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

from statemachine.events import AllocationRefused, Event, RequestExtended, RequestMatched
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
        """An event of the present stretch, and the state after it. A match or an extension mentions its whole path."""
        now = self._now
        found = mentions(event)
        now["device"].update(found.device)
        now["host"].update(found.host)
        now["request"].update(found.requests)
        now["node"].update(found.nodes)
        now["transfer"].update(found.transfers)
        if type(event) is AllocationRefused or type(event) is RequestMatched:
            now["key"].add(key_number(event.key))
        if type(event) is RequestMatched or type(event) is RequestExtended:
            node = state.requests[event.request].leaf
            runs = now["node"]
            while node.parent is not None:
                runs.add(node.id)
                node = node.parent

    def end_stretch(self) -> None:
        """The next event begins another stretch."""
        for kind in _BLOCKS:
            ids = np.fromiter(self._now[kind], np.int64)
            bits = np.zeros(int(ids.max(initial=-1)) + 1, np.bool_)
            bits[ids] = True
            self._bits[kind].append(np.packbits(bits, bitorder="little"))
        for kind in _NUMBERED:
            numbers = np.sort(np.fromiter(self._now[kind], np.uint64))
            small = not len(numbers) or int(numbers[-1]) < 1 << 32
            self._lists[kind].append(numbers.astype(np.uint32) if small else numbers)
        for ids_now in self._now.values():
            ids_now.clear()

    def pack(self) -> dict[Kind, bytes]:
        """As bytes for :meth:`stretches`, a piece for each kind of thing: a question needs only one of them."""
        return {
            **{kind: _packed(ids=self._rows(kind)) for kind in _BLOCKS},
            **{kind: self._packed_lists(kind) for kind in _NUMBERED},
        }

    def _rows(self, kind: Kind) -> npt.NDArray[np.uint8]:
        """One row of bits per stretch."""
        rows = np.zeros((len(self._bits[kind]), max((len(bits) for bits in self._bits[kind]), default=0)), np.uint8)
        for row, bits in zip(rows, self._bits[kind]):
            row[: len(bits)] = bits
        return rows

    def _packed_lists(self, kind: Kind) -> bytes:
        lists = self._lists[kind]
        ends = np.cumsum([len(part) for part in lists], dtype=np.int64)
        return _packed(ids=np.concatenate([*lists, np.empty(0, np.uint32)]), ends=ends)

    @staticmethod
    def stretches(packed: bytes, id: int) -> list[int]:
        """Numbers of the stretches that mention ``id``, ascending, from the piece for its kind.

        Raises:
            ValueError: these are not the bytes of such a table.
        """
        try:
            with np.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(packed)), allow_pickle=False) as arrays:
                ids = arrays["ids"]
                if ids.ndim == 2:
                    found = np.flatnonzero(ids[:, id >> 3] >> (id & 7) & 1) if id >> 3 < ids.shape[1] else _NONE
                else:
                    at = np.flatnonzero(ids == id) if id >= 0 else _NONE
                    found = np.unique(np.searchsorted(arrays["ends"], at, side="right"))
                return [int(number) for number in found]
        except (zstandard.ZstdError, KeyError, OSError) as error:
            raise ValueError(f"not a table of mentions: {error}") from error


_NONE = np.empty(0, np.int64)


def _packed(**arrays: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return zstandard.ZstdCompressor(level=1).compress(file.getvalue())
