"""The KV pools of the embedded (NumPy) backend: shared-memory arrays, one device and one host pool per rank.

The device pool is layer-first, ``uint8[layers, blocks, block_bytes]``, as an engine's attention kernels want it; the
host pool is block-first, ``uint8[blocks, layers, block_bytes]``, so that one block is one contiguous piece. A pool
carries a random id: an engine that opens a ledger again sees whether it is still the same memory.
"""

from __future__ import annotations

import mmap
import secrets
import struct
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ipc import LedgerError, LedgerNotFound, memory
from ipc.names import unlink
from workers.layout import PoolLayout

Bytes = npt.NDArray[np.uint8]
_HEADER_BYTES = 4096
_HEADER = struct.Struct("<8sQ16s")
MAGIC = b"kvlpool1"


class PoolMismatch(LedgerError):
    """A pool in shared memory does not have the layout that was expected."""


class Pools:
    """The pools of one rank, mapped. ``id`` is the random name of their memory."""

    def __init__(self, ledger: str, rank: int, layout: PoolLayout, *, create: bool = False) -> None:
        self.rank = rank
        self.layout = layout
        names = pool_names(ledger, rank)
        if create:
            for name, size in zip(names, _sizes(layout), strict=True):
                _create(name, size, layout)
        maps = []
        for name, size in zip(names, _sizes(layout), strict=True):
            maps.append(memory.attach(name, write=True))
            if _id_in(maps[-1], size, layout) is None:
                raise PoolMismatch(f"{name} does not have the layout {layout.text()}: the ledger was created anew?")
        self.id = ",".join(_HEADER.unpack(map[: _HEADER.size])[2].hex() for map in maps)
        device, host = (np.frombuffer(map, np.uint8, offset=_HEADER_BYTES) for map in maps)
        self.device: Bytes = device.reshape(layout.layers, layout.device_blocks, layout.block_bytes)
        """``uint8[layers, blocks, block_bytes]``."""
        self.host: Bytes = host.reshape(layout.host_blocks, layout.layers, layout.block_bytes)
        """``uint8[blocks, layers, block_bytes]``."""


def pool_names(ledger: str, rank: int) -> list[str]:
    """Shared-memory names of a rank's device and host pool."""
    return [f"/{ledger}.pool.device.{rank}", f"/{ledger}.pool.host.{rank}"]


def _sizes(layout: PoolLayout) -> list[int]:
    """Bytes of a rank's device and host pool."""
    block = layout.layers * layout.block_bytes
    return [_HEADER_BYTES + block * layout.device_blocks, _HEADER_BYTES + block * layout.host_blocks]


def _create(name: str, size: int, layout: PoolLayout) -> None:
    map = memory.create(name, size)
    map[: _HEADER.size] = _HEADER.pack(MAGIC, layout.fingerprint, secrets.token_bytes(16))
    map.close()


def _id_in(map: mmap.mmap, size: int, layout: PoolLayout) -> str | None:
    """Id of a pool; ``None``: it does not have this layout."""
    if len(map) != size:
        return None
    magic, fingerprint, id = _HEADER.unpack(map[: _HEADER.size])
    return id.hex() if magic == MAGIC and fingerprint == layout.fingerprint else None


def ids_of(pools: Iterable[Pools]) -> str:
    """Ids of all pools, rank by rank, as they stand in the log."""
    return ";".join(pool.id for pool in pools)


def reopen_pools(ledger: str, layout: PoolLayout, ids: str) -> tuple[list[Pools], dict[str, str]]:
    """Attach the pools that a ledger had, with the ``ids`` that stand in its log; replace those that are not the same.

    Returns the pools, and for each tier (``device``, ``host``) that is not what it was the reason.

    Raises:
        ipc.SharedMemoryFull: a pool cannot be replaced.
    """
    lost: dict[str, str] = {}
    known = [rank_ids.split(",") for rank_ids in ids.split(";")]
    for rank in range(layout.ranks):
        tiers = zip(("device", "host"), pool_names(ledger, rank), _sizes(layout), known[rank], strict=True)
        for tier, name, size, id in tiers:
            try:
                map = memory.attach(name, write=True)
            except LedgerNotFound:
                lost.setdefault(tier, f"{name} is gone")
            else:
                found = _id_in(map, size, layout)
                map.close()
                if found == id:
                    continue
                lost.setdefault(tier, f"{name} is not the memory that it was")
                unlink(name)
            _create(name, size, layout)
    return [Pools(ledger, rank, layout) for rank in range(layout.ranks)], lost


def create_pools(ledger: str, layout: PoolLayout) -> list[Pools]:
    """Create the pools of all ranks.

    Raises:
        ipc.SharedMemoryFull: nothing is left behind.
    """
    pools: list[Pools] = []
    try:
        for rank in range(layout.ranks):
            pools.append(Pools(ledger, rank, layout, create=True))
    except BaseException:
        for rank in range(len(pools) + 1):
            for name in pool_names(ledger, rank):
                unlink(name)
        raise
    return pools
