"""The shared-memory objects of a rank's pools: their names, sizes and headers.

Two per rank: the host pool, block-first (``[blocks, layers, block_bytes]``), so that one block is one contiguous piece,
behind all of them a checksum per block where the layout has them; and the device pool, which is the memory itself where
the device is shared memory, or else the table in which the owner of the device tensors publishes their handles. Each
carries a random id: an engine that opens a ledger again sees whether it is still the same memory.
"""

from __future__ import annotations

import os
import struct

import numpy as np
import numpy.typing as npt

from ipc import LedgerError, TooManyFiles, memory
from workers.pools.interface import Bytes, PoolMismatch
from workers.pools.layout import PoolLayout

HEADER_BYTES = 4096
HANDLE_ENTRY_BYTES = 80
"""A published tensor: an IPC handle (64), the tensor's offset behind what the handle names (8), its bytes (8)."""
CHECKSUM_BYTES = 8
_HEADER = struct.Struct("<8sQ16s")
MAGIC = b"kvlpool1"


def pool_names(ledger: str, rank: int) -> list[str]:
    """Shared-memory names of a rank's device and host pool."""
    return [f"/{ledger}.pool.device.{rank}", f"/{ledger}.pool.host.{rank}"]


def pool_sizes(layout: PoolLayout) -> list[int]:
    """Bytes of a rank's device and host pool."""
    block = layout.layers * layout.block_bytes
    device = HANDLE_ENTRY_BYTES * len(layout.pieces) if layout.on_gpu else block * layout.device_blocks
    host = (block + CHECKSUM_BYTES * layout.checksums) * layout.host_blocks
    return [HEADER_BYTES + device, HEADER_BYTES + host]


def create(name: str, size: int, layout: PoolLayout) -> None:
    """Create one object, with a new id. Raises :class:`ipc.SharedMemoryFull`."""
    memory.create(name, size, _HEADER.pack(MAGIC, layout.fingerprint, os.urandom(16))).close()


def attach(name: str, size: int, layout: PoolLayout) -> tuple[Bytes, str]:
    """An object and its id; without an id it does not have this layout.

    Raises:
        ipc.LedgerNotFound: it is not there.
        ipc.NotPrivate, ipc.TooManyFiles
    """
    map = memory.attach(name, write=True)
    if len(map) != size:
        return np.frombuffer(map, np.uint8), ""
    magic, fingerprint, id = _HEADER.unpack(map[: _HEADER.size])
    fits = magic == MAGIC and fingerprint == layout.fingerprint
    return np.frombuffer(map, np.uint8), id.hex() if fits else ""


class PoolMemory:
    """Both objects of a rank, mapped for writing. ``id`` is the random name of their memory.

    Raises:
        PoolMismatch: an object has another layout.
        ipc.LedgerNotFound: an object is not there.
    """

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        objects: list[Bytes] = []
        ids = []
        for name, size in zip(pool_names(ledger, rank), pool_sizes(layout), strict=True):
            found, id = attach(name, size, layout)
            if not id:
                raise PoolMismatch(f"{name} does not have the layout {layout.text()}: the ledger was created anew?")
            objects.append(found)
            ids.append(id)
        self._ledger, self._layout = ledger, layout
        self.rank = rank
        self.id = ",".join(ids)
        self.device_object = objects[0]
        """Header and all; between its first 64 bytes and :data:`HEADER_BYTES` it is the backend's."""
        self.device: Bytes = objects[0][HEADER_BYTES:]
        """``uint8[bytes]``."""
        stop = HEADER_BYTES + layout.host_blocks * layout.layers * layout.block_bytes
        self.host: Bytes = objects[1][HEADER_BYTES:stop].reshape(layout.host_blocks, layout.layers, layout.block_bytes)
        """``uint8[blocks, layers, block_bytes]``."""
        self.checksums: npt.NDArray[np.uint64] = objects[1][stop:].view(np.uint64)
        """``uint64[blocks]`` behind it, if the layout has checksums."""

    def is_current(self) -> bool:
        """Whether the ledger's pools are still these, and have not been replaced or removed."""
        try:
            return self.id == PoolMemory(self._ledger, self.rank, self._layout).id
        except TooManyFiles:  # nothing is known of them: no reason to take back what was done in them
            return True
        except LedgerError:
            return False
