"""The KV pools of the embedded (NumPy) backend: shared-memory arrays, one device and one host pool per rank.

The device pool is layer-first, ``uint8[layers, blocks, block_bytes]``, as an engine's attention kernels want it; the
host pool is block-first, ``uint8[blocks, layers, block_bytes]``, so that one block is one contiguous piece. A pool
carries a random id: an engine that opens a ledger again sees whether it is still the same memory.
"""

from __future__ import annotations

import secrets
import struct

import numpy as np
import numpy.typing as npt

from ipc import LedgerError, memory
from ipc.names import unlink
from workers.layout import PoolLayout

Bytes = npt.NDArray[np.uint8]
_HEADER_BYTES = 4096
_HEADER = struct.Struct("<8sQ16s")
_MAGIC = b"kvlpool1"


class PoolMismatch(LedgerError):
    """A pool in shared memory does not have the layout that was expected."""


class Pools:
    """The pools of one rank, mapped. ``id`` is the random name of their memory."""

    def __init__(self, ledger: str, rank: int, layout: PoolLayout, *, create: bool = False) -> None:
        self.rank = rank
        self.layout = layout
        names = pool_names(ledger, rank)
        block = layout.layers * layout.block_bytes
        sizes = [_HEADER_BYTES + block * layout.device_blocks, _HEADER_BYTES + block * layout.host_blocks]
        maps = []
        for name, size in zip(names, sizes, strict=True):
            maps.append(memory.create(name, size) if create else memory.attach(name, write=True))
        if create:
            for map in maps:
                map[: _HEADER.size] = _HEADER.pack(_MAGIC, layout.fingerprint, secrets.token_bytes(16))
        ids = []
        for name, map, size in zip(names, maps, sizes, strict=True):
            magic, fingerprint, id = _HEADER.unpack(map[: _HEADER.size])
            if magic != _MAGIC or fingerprint != layout.fingerprint or len(map) != size:
                raise PoolMismatch(f"{name} does not have the layout {layout.text()}: the ledger was created anew?")
            ids.append(id.hex())
        self.id = ",".join(ids)
        device, host = (np.frombuffer(map, np.uint8, offset=_HEADER_BYTES) for map in maps)
        self.device: Bytes = device.reshape(layout.layers, layout.device_blocks, layout.block_bytes)
        """``uint8[layers, blocks, block_bytes]``."""
        self.host: Bytes = host.reshape(layout.host_blocks, layout.layers, layout.block_bytes)
        """``uint8[blocks, layers, block_bytes]``."""


def pool_names(ledger: str, rank: int) -> list[str]:
    """Shared-memory names of a rank's device and host pool."""
    return [f"/{ledger}.pool.device.{rank}", f"/{ledger}.pool.host.{rank}"]


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
