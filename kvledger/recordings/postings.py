"""Which stretches of a recording mention a block, a request, a run, a transfer or a content: tables in its index.

A question about one block among millions of events then reads only the stretches that speak of it. Blocks, which are
few and mentioned everywhere, are kept as one bit per stretch and block; what is numbered without end, as sorted lists.
The tables of 64 stretches are one *volume*, so that neither writing nor asking takes much memory.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import zstandard
from crc32c import crc32c

from kvledger.recordings.origins import Origins
from statemachine.events import (
    AllocationRefused,
    BlocksCached,
    CacheCleared,
    Direction,
    Event,
    Outcome,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
)
from statemachine.mentions import mentions
from statemachine.state.nodes import Node
from statemachine.state.state import State

Kind = Literal["device", "host", "request", "key", "node", "transfer", "hash"]
"""``key``: a request by its name, see :func:`key_number`; ``hash``: a content by the first bytes of its hash, see
:func:`kvledger.recordings.origins.hash_number`, where a request brings it along."""

_VOLUME = 64
_KINDS: tuple[Kind, ...] = get_args(Kind)
_BLOCKS: dict[Tier, Kind] = {Tier.DEVICE: "device", Tier.HOST: "host"}


def key_number(key: str) -> int:
    """A request's name as the number that stands for it in the table. Others may share it."""
    return int(crc32c(key.encode()))


class Postings:
    """The tables, while they are built stretch by stretch.

    A request mentions all runs and blocks of its path, from its match to its end, and the transfers that it waits
    for when they end; a transfer its blocks, also when it ends; what sweeps a whole tier, all of its blocks.

    Args:
        before: the state that the first event meets; ``None``: it is the first of its ledger.
        write: called with the name of a volume and its bytes.
    """

    def __init__(self, before: State | None, write: Callable[[str, bytes], None]) -> None:
        self._write = write
        self._origins = Origins(before)
        self._stretches = 0
        self._done: dict[Kind, list[npt.NDArray[Any]]] = {kind: [] for kind in _KINDS}
        self._blocks: dict[Kind, list[bytes]] = {kind: [] for kind in _BLOCKS.values()}
        self._numbers: dict[Kind, list[int]] = {kind: [] for kind in _KINDS}
        self._leaves: dict[int, Node] = {}
        """By living request: the last run of its path. After its end, no event says which that was."""
        self._flying: dict[int, tuple[bytes, bytes]] = {}
        """By transfer that has not ended: its device blocks and its host blocks."""
        self._waiting: dict[int, set[int]] = {}
        """By transfer that has not ended: requests that wait for its end."""
        self._most = dict.fromkeys(Tier, 0)
        """Blocks that a tier has ever had."""
        if before is not None:
            self._leaves = {id: request.leaf for id, request in before.requests.items()}
            for id, transfer in before.transfers.items():
                self._fly(id, transfer.direction, transfer.sources.tobytes(), transfer.targets.tobytes())
                self._waiting[id] = set(transfer.waiters)
            self._measure(before)

    def add(self, event: Event, state: State) -> None:
        """An event of the present stretch, and the state after it."""
        found = mentions(event)
        numbers, blocks = self._numbers, self._blocks
        if found.device:
            blocks["device"].append(_bytes(found.device))
        if found.host:
            blocks["host"].append(_bytes(found.host))
        numbers["request"] += found.requests
        numbers["node"] += found.nodes
        numbers["transfer"] += found.transfers
        for id in found.requests:
            request = state.requests.get(id)
            if request is not None and request.waits_for:
                for transfer in request.waits_for:
                    self._waiting.setdefault(transfer, set()).add(id)
        self._origins.add(event, state)
        if isinstance(event, RequestMatched | RequestExtended | BlocksCached):
            leaf = self._leaves[event.request] = state.requests[event.request].leaf
            if not isinstance(event, BlocksCached):
                self._path(leaf)
        elif isinstance(event, RequestReleased):
            self._path(self._leaves.pop(event.request))
        elif isinstance(event, TransferStarted):
            self._fly(event.transfer, event.direction, event.sources.tobytes(), event.targets.tobytes())
        elif isinstance(event, TransferFinished | QuarantineEnded):
            self._land(event)
        elif isinstance(event, CacheCleared | PoolResized | TierLost):
            self._measure(state)
            for tier, name in _BLOCKS.items():
                blocks[name].append(np.arange(self._most[tier], dtype=np.int32).tobytes())
        if isinstance(event, AllocationRefused | RequestMatched):
            numbers["key"].append(key_number(event.key))

    def _path(self, leaf: Node) -> None:
        nodes, device, host = self._numbers["node"], self._blocks["device"], self._blocks["host"]
        node = leaf
        while node.parent is not None:
            nodes.append(node.id)
            if node.device is not None:
                device.append(node.device.ids.tobytes())
            if node.host is not None:
                host.append(node.host.ids.tobytes())
            node = node.parent

    def _fly(self, transfer: int, direction: int, sources: bytes, targets: bytes) -> None:
        self._flying[transfer] = (targets, sources) if direction == Direction.SWAP_IN else (sources, targets)

    def _land(self, event: TransferFinished | QuarantineEnded) -> None:
        if isinstance(event, TransferFinished) and event.outcome == Outcome.TIMED_OUT:
            device, host = self._flying[event.transfer]
        else:
            device, host = self._flying.pop(event.transfer)
        self._blocks["device"].append(device)
        self._blocks["host"].append(host)
        self._numbers["request"] += self._waiting.pop(event.transfer, ())

    def _measure(self, state: State) -> None:
        for tier in Tier:
            self._most[tier] = max(self._most[tier], state.pool(tier).capacity)

    def end_stretch(self, state: State | None) -> None:
        """The next event begins another stretch, with this state; ``None``: there was no event that has one."""
        if state is not None:
            self._measure(state)
        for kind in _BLOCKS.values():
            ids = np.frombuffer(b"".join(self._blocks[kind]), np.int32)
            bits = np.zeros(int(ids.max(initial=-1)) + 1, np.bool_)
            bits[ids] = True
            self._done[kind].append(np.packbits(bits, bitorder="little"))
            self._blocks[kind].clear()
        for kind in ("request", "key", "node", "transfer"):
            numbers = np.unique(np.array(self._numbers[kind], np.uint64))
            small = not len(numbers) or int(numbers[-1]) < 1 << 32
            self._done[kind].append(numbers.astype(np.uint32) if small else numbers)
            self._numbers[kind].clear()
        self._done["hash"].append(self._origins.end_stretch(state))
        self._stretches += 1
        if not self._stretches % _VOLUME:
            self._write_volume()

    def close(self) -> None:
        """Write the last volume, after the last stretch has ended."""
        if self._stretches % _VOLUME:
            self._write_volume()

    def _write_volume(self) -> None:
        number = (self._stretches - 1) // _VOLUME
        for kind, parts in self._done.items():
            if kind == "hash":
                for first in range(16):
                    self._write(_name(kind, number, first), _lists([part[part >> 28 == first] for part in parts]))
            else:
                self._write(_name(kind, number), _rows(parts) if kind in _BLOCKS.values() else _lists(parts))
            parts.clear()


def stretches(read: Callable[[str], bytes], count: int, kind: Kind, id: int) -> list[int]:
    """Numbers of the stretches, of ``count``, that mention ``id``, ascending.

    Args:
        read: gives the volume of a name.

    Raises:
        KeyError: there is no such volume.
        ValueError: its bytes are not those of one.
    """
    found: list[int] = []
    for number in range((count + _VOLUME - 1) // _VOLUME):
        packed = read(_name(kind, number, id >> 28 if kind == "hash" else None))
        try:
            file = io.BytesIO(zstandard.ZstdDecompressor().decompress(packed))
            ids, ends = np.load(file, allow_pickle=False), np.load(file, allow_pickle=False)
        except (zstandard.ZstdError, EOFError, OSError) as error:
            raise ValueError(f"not a table of mentions: {error}") from error
        if id < 0:
            within = _NONE
        elif ids.ndim == 2:
            within = np.flatnonzero(ids[:, id >> 3] >> (id & 7) & 1) if id >> 3 < ids.shape[1] else _NONE
        else:
            within = np.unique(np.searchsorted(ends, np.flatnonzero(ids == id), side="right"))
        found += (number * _VOLUME + within).tolist()
    if found and found[-1] >= count:
        raise ValueError("not a table of mentions: it names stretches that do not exist")
    return found


_NONE = np.empty(0, np.int64)


def _name(kind: Kind, volume: int, first: int | None = None) -> str:
    """Hashes are many and spread evenly: those that begin with one digit are a table of their own."""
    return f"mentioned.{kind}.{volume}" + (f".{first:x}" if first is not None else "")


def _bytes(ids: Any) -> bytes:
    return ids.tobytes() if isinstance(ids, array) else array("i", ids).tobytes()


def _rows(parts: list[npt.NDArray[np.uint8]]) -> bytes:
    """One row of bits per stretch."""
    rows = np.zeros((len(parts), max(len(bits) for bits in parts)), np.uint8)
    for row, bits in zip(rows, parts):
        row[: len(bits)] = bits
    return _packed(rows, _NONE)


def _lists(parts: list[npt.NDArray[Any]]) -> bytes:
    """The lists one behind the other, and where each ends."""
    return _packed(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))


def _packed(*arrays: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    for values in arrays:
        np.save(file, values, allow_pickle=False)
    return zstandard.ZstdCompressor(level=1).compress(file.getvalue())
