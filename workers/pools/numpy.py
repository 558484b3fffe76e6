"""The embedded backend: the device pool is shared memory, and NumPy copies.

Each tensor of each layer is an array of its own, ``[blocks, *shape]``, one behind the other, as an engine's attention
kernels want it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from statemachine.events import Direction, IntArray, TransferStarted
from workers.pools.interface import Bytes, Ended
from workers.pools.layout import PoolLayout
from workers.pools.memory import PoolMemory

_BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""NumPy's view of element types that it does not have."""


class NumpyPools:
    """See :class:`workers.pools.interface.Pools`.

    ``pieces[i]``: the blocks of piece ``i``, ``uint8[blocks, bytes]``.
    """

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        self.rank = rank
        self.layout = layout
        memory = PoolMemory(ledger, rank, layout)
        self.id = memory.id
        self.host = memory.host
        self._bytes = memory.device
        self.pieces: list[Bytes] = []
        start = 0
        for piece in layout.pieces:
            stop = start + piece.tensor.block_bytes * layout.device_blocks
            self.pieces.append(memory.device[start:stop].reshape(layout.device_blocks, piece.tensor.block_bytes))
            start = stop

    @property
    def device(self) -> Bytes:
        """``uint8[layers, blocks, block_bytes]``; only where a layer is one tensor."""
        layout = self.layout
        if len(self.pieces) != layout.layers:
            raise ValueError("a layer has several tensors: use tensor(layer, name)")
        return self._bytes.reshape(layout.layers, layout.device_blocks, layout.block_bytes)

    def tensor(self, layer: int, name: str) -> npt.NDArray[np.generic]:
        """A device tensor, ``[blocks, *shape]``; element types that NumPy lacks as their bits."""
        index = self.layout.piece(layer, name)
        tensor = self.layout.pieces[index].tensor
        bits = self.pieces[index].view(_BITS.get(tensor.dtype, tensor.dtype))
        return bits.reshape(self.layout.device_blocks, *tensor.shape)


def runs(sources: IntArray, targets: IntArray) -> Iterator[tuple[int, int, int]]:
    """``(source, target, blocks)`` of ids that are consecutive on both sides."""
    count = len(sources)
    start = 0
    while start < count:
        source, target = sources[start], targets[start]
        stop = start + 1
        while stop < count and sources[stop] - source == stop - start == targets[stop] - target:
            stop += 1
        yield source, target, stop - start
        start = stop


def copy_blocks(pools: NumpyPools, direction: Direction, sources: IntArray, targets: IntArray) -> int:
    """Copy block ``sources[i]`` to ``targets[i]``; returns how many. Consecutive ids go in one piece.

    Raises:
        IndexError: a block is outside its pool; nothing is copied.
    """
    layout = pools.layout
    swap_in = direction == Direction.SWAP_IN
    on_device, on_host = (targets, sources) if swap_in else (sources, targets)
    for ids, count in ((on_device, layout.device_blocks), (on_host, layout.host_blocks)):
        if ids and not (min(ids) >= 0 and max(ids) < count):  # a slice would copy less and say nothing
            raise IndexError(f"block ids {min(ids)} to {max(ids)} in a pool of {count}")
    if len(pools.pieces) == layout.layers:  # one strided copy for all layers
        device, host = pools.device, pools.host
        for source, target, size in runs(sources, targets):
            if swap_in:
                device[:, target : target + size] = host[source : source + size].swapaxes(0, 1)
            else:
                host[target : target + size] = device[:, source : source + size].swapaxes(0, 1)
        return len(sources)
    blocks = pools.host.reshape(layout.host_blocks, layout.layers * layout.block_bytes)
    places = [(piece.offset, piece.offset + piece.tensor.block_bytes) for piece in layout.pieces]
    for source, target, size in runs(sources, targets):
        for array, (start, stop) in zip(pools.pieces, places, strict=True):
            if swap_in:
                array[target : target + size] = blocks[source : source + size, start:stop]
            else:
                blocks[target : target + size, start:stop] = array[source : source + size]
    return len(sources)


class NumpyCopies:
    """Copies that have ended when :meth:`start` returns, so ``after`` is kept by itself.

    See :class:`workers.pools.interface.Copies`.
    """

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        self._pools = NumpyPools(ledger, rank, layout)
        self._ended: list[Ended] = []

    def start(self, transfer: TransferStarted) -> None:
        """Copy the blocks of a transfer, at once."""
        try:
            valid = copy_blocks(self._pools, Direction(transfer.direction), transfer.sources, transfer.targets)
            ended = Ended(transfer.transfer, valid)
        except Exception as error:  # whatever it raises becomes the engine's answer
            ended = Ended(transfer.transfer, 0, f"{type(error).__name__}: {error}")
        self._ended.append(ended)

    def ended(self) -> list[Ended]:
        """What was copied since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def busy(self) -> bool:
        """Whether some copy has ended that :meth:`ended` has not told; none is ever under way."""
        return bool(self._ended)

    def close(self) -> None:
        """Do nothing: there is no memory but this process's to give back."""
