"""The engine's side of a device pool on a GPU: whoever owns the tensors publishes them for the transfer worker.

The owner may be the engine itself or a rank's own process (a model runner), and the tensors any framework's: only their
addresses are used. They are handed over as CUDA IPC handles of the allocations that hold them, in shared memory. Memory
from the driver's virtual-memory calls (PyTorch's expandable segments) has no such handle, and CUDA says so.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ipc import LedgerNotFound
from ipc.liveness import Lock, life_of
from ipc.processes import Identity, Life, own_identity
from workers.pools.cuda_driver import HANDLE_BYTES, CudaError, Driver
from workers.pools.interface import Bytes
from workers.pools.layout import PoolLayout
from workers.pools.memory import HEADER_BYTES, PoolMemory, pool_names

_ENTRY = struct.Struct(f"<{HANDLE_BYTES}sQQ")
_OWNER = struct.Struct("<16sQQQ")
_OWNER_AT, _PROOF_AT = 64, 128
_TIED = "the tensors of a rank must be on one device"


class Published(NamedTuple):
    """A rank's device tensors. ``handles[i]``, ``offsets[i]`` and ``sizes[i]``: of piece ``i`` of the layout."""

    device: bytes
    """UUID of the GPU."""
    owner: Identity
    """The process whose memory it is; it holds a lock on this in the object, see :mod:`ipc.liveness`."""
    handles: list[bytes]
    offsets: list[int]
    sizes: list[int]

    @classmethod
    def read(cls, device_object: Bytes) -> Published | None:
        """What is published in it; ``None``: nothing yet. The proof over all of it is written last."""
        owner = bytes(device_object[_OWNER_AT : _OWNER_AT + _OWNER.size])
        table = bytes(device_object[HEADER_BYTES:])
        if int(device_object[_PROOF_AT : _PROOF_AT + 8].view(np.uint64)[0]) != xxhash.xxh3_64_intdigest(owner + table):
            return None
        device, *numbers = _OWNER.unpack(owner)
        entries = list(_ENTRY.iter_unpack(table))
        return cls(device, Identity(*numbers), *([entry[i] for entry in entries] for i in range(3)))

    def owner_alive(self, name: str) -> bool:
        """Whether the process may run whose memory it is. ``name``: of the object.

        Raises:
            ipc.LedgerNotFound, ipc.NotPrivate, ipc.TooManyFiles
        """
        lock = Lock.on(name)
        try:
            return life_of(lock.is_taken(_OWNER_AT), self.owner) is not Life.DEAD
        finally:
            lock.close()


def address_of(tensor: Any) -> int:
    """Device address of a tensor (Paddle's, PyTorch's), of an array (CuPy's, Numba's), or an address as it is.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(tensor, int):
        return tensor
    if hasattr(tensor, "data_ptr"):
        return int(tensor.data_ptr())
    if hasattr(tensor, "__cuda_array_interface__"):
        return int(tensor.__cuda_array_interface__["data"][0])
    raise TypeError(f"{type(tensor).__name__} is no GPU tensor: it has neither data_ptr() nor __cuda_array_interface__")


class CudaPools:
    """See :class:`workers.pools.interface.Pools`. Needs no driver before :meth:`publish`."""

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        self.rank = rank
        self.layout = layout
        self._memory = PoolMemory(ledger, rank, layout)
        self.id = self._memory.id
        self.host: Bytes = self._memory.host
        self._tensors: list[Any] = []
        self._name = pool_names(ledger, rank)[0]

    def publish(self, tensors: Sequence[Any]) -> None:
        """Hand the rank's device tensors to its transfer worker, in the order of ``layout.pieces``.

        They must be contiguous and stay where they are until the manager is closed; this object keeps them alive. When
        their process ends they are gone, and with them the device tier: open the ledger again to go on.

        Raises:
            CudaError: there is no driver or device, or an address is not that of exportable device memory.
            ValueError: their number, size or place does not fit the layout, or there are some already.
            ipc.LedgerNotFound: the manager makes a new device pool when it opens the ledger, or has made it since this
                one was opened: open the pools again.
        """
        pieces = self.layout.pieces
        if len(tensors) != len(pieces):
            raise ValueError(f"the layout has {len(pieces)} tensors in {self.layout.layers} layers, not {len(tensors)}")
        before = Published.read(self._memory.device_object)
        if before is not None:
            what = f"the device tensors of rank {self.rank}"
            if before.owner_alive(self._name):
                raise ValueError(f"process {before.owner[0]} has published {what} already")
            # a manager would take the new ones for those that hold its cache
            gone = f"{what} ended with process {before.owner[0]}"
            raise LedgerNotFound(f"{gone}: open the pools again when the manager has opened the ledger")
        addresses = [address_of(tensor) for tensor in tensors]
        driver = Driver()
        device = driver.device_of(addresses[0])
        if any(driver.device_of(address) != device for address in addresses):
            raise ValueError(_TIED)
        driver.push(driver.retain(device))
        try:
            handles: dict[int, bytes] = {}
            entries = []
            for address, piece in zip(addresses, pieces, strict=True):
                base, held = driver.allocation_of(address)
                size = piece.tensor.block_bytes * self.layout.device_blocks
                if address + size > base + held:
                    name = f"tensor {piece.tensor.name!r} of layer {piece.layer}"
                    raise ValueError(f"{name} needs {size:,} bytes, its memory has {base + held - address:,}")
                if base not in handles:
                    handles[base] = driver.handle(base)
                entries.append(_ENTRY.pack(handles[base], address - base, size))
            owner = _OWNER.pack(driver.uuid(device), *own_identity())
        finally:
            driver.pop()
            driver.release(device)
        replaced = LedgerNotFound(f"the manager has made the pools of rank {self.rank} anew: open them again")
        try:
            lock = Lock.on(self._name)  # held until this process ends
        except LedgerNotFound:
            raise replaced from None
        if not lock.take(_OWNER_AT):
            lock.close()
            raise ValueError(f"another process is publishing the device tensors of rank {self.rank}")
        self._write(owner, b"".join(entries))
        if not self._memory.is_current():
            lock.close()
            raise replaced
        self._tensors = list(tensors)

    def _write(self, owner: bytes, table: bytes) -> None:
        header = self._memory.device_object
        header[_OWNER_AT : _OWNER_AT + _OWNER.size] = np.frombuffer(owner, np.uint8)
        self._memory.device[:] = np.frombuffer(table, np.uint8)
        header[_PROOF_AT : _PROOF_AT + 8].view(np.uint64)[0] = xxhash.xxh3_64_intdigest(owner + table)

    def tensor(self, layer: int, name: str) -> Any:
        """A device tensor as it was published by this process.

        Raises:
            CudaError: this process has published none.
        """
        index = self.layout.piece(layer, name)
        if not self._tensors:
            raise CudaError("tensor", "CUDA_ERROR_NOT_INITIALIZED", "this process has published no device tensors")
        return self._tensors[index]
