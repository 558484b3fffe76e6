"""The transfer worker's side of a device pool on a GPU: asynchronous copies on streams of its own.

Swap-out and swap-in have a stream each and do not wait for one another, except for what is in ``after``. All pieces of
a transfer go to the driver in one call; the worker looks at events to see what has ended, and never blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from statemachine.events import Direction, IntArray, TransferStarted
from workers.pools.cuda_driver import SOURCE_ANY_TIME, SOURCE_IN_STREAM_ORDER, CudaError, Driver, Words
from workers.pools.cuda_pools import Published
from workers.pools.interface import Ended
from workers.pools.layout import PoolLayout
from workers.pools.memory import PoolMemory

_LOOK_EVERY_S = 0.02


class Side(NamedTuple):
    """One side of a copy: block ``b`` of piece ``i`` is at ``bases[i] + b * strides[i]``."""

    bases: Words
    strides: Words
    blocks: int

    def addresses(self, ids: IntArray) -> Words:
        """``uint64[blocks, pieces]``. Raises ``IndexError``."""
        blocks: npt.NDArray[np.int64] = np.array(ids, np.int64)
        if len(blocks) and (blocks.min() < 0 or blocks.max() >= self.blocks):
            raise IndexError(f"block ids {blocks.min()} to {blocks.max()} in a pool of {self.blocks}")
        found: Words = self.bases + blocks.astype(np.uint64)[:, None] * self.strides
        return found


def plan(source: Side, target: Side, sizes: Words, sources: IntArray, targets: IntArray) -> tuple[Words, Words, Words]:
    """``(targets, sources, sizes)`` of the copies, ``uint64[copies]``; what is adjacent on both sides is one copy.

    Block by block, as the host pool is: pieces merge where the device has them side by side too (all layers in one
    tensor, or a single piece and consecutive blocks).
    """
    s, t = source.addresses(sources).ravel(), target.addresses(targets).ravel()
    z = np.tile(sizes, len(sources))
    apart = (s[1:] != s[:-1] + z[:-1]) | (t[1:] != t[:-1] + z[:-1])
    starts = np.flatnonzero(np.concatenate([[True], apart])) if len(s) else np.empty(0, np.intp)
    return t[starts], s[starts], np.add.reduceat(z, starts) if len(s) else z


class _Flying(NamedTuple):
    """A transfer whose copies were given to the driver."""

    event: int
    valid: int


class CudaCopies:
    """See :class:`workers.pools.interface.Copies`.

    Args:
        waiting: told the reason while nobody has published the rank's device tensors; may raise to end the wait.
    """

    def __init__(self, ledger: str, rank: int, layout: PoolLayout, waiting: Callable[[str], None]) -> None:
        self._memory = PoolMemory(ledger, rank, layout)
        self._driver = driver = Driver()
        while (published := Published.read(self._memory.device_object)) is None:
            waiting(f"nobody has published the device tensors of rank {rank}")
            time.sleep(_LOOK_EVERY_S)
        self._flying: dict[int, _Flying] = {}
        self._ended: list[Ended] = []
        self._give_back = contextlib.ExitStack()
        try:
            device = self._device(published.device)
            driver.use(driver.retain(device))
            self._give_back.callback(driver.release, device)
            self._device_side, self._host_side = self._map(published, layout), self._pin(layout)
            self._sizes: Words = np.array([piece.tensor.block_bytes for piece in layout.pieces], np.uint64)
            self._streams = {False: driver.stream(), True: driver.stream()}
            for stream in self._streams.values():
                self._give_back.callback(driver.destroy_stream, stream)
                self._give_back.callback(driver.synchronize, stream)
        except BaseException:
            self.close()
            raise

    def _device(self, uuid: bytes) -> int:
        for ordinal in range(self._driver.devices()):
            device = self._driver.device(ordinal)
            if self._driver.uuid(device) == uuid:
                return device
        reason = f"this process does not see the GPU {uuid.hex()}: is CUDA_VISIBLE_DEVICES set?"
        raise CudaError("finding the rank's device", "CUDA_ERROR_INVALID_DEVICE", reason)

    def _map(self, published: Published, layout: PoolLayout) -> Side:
        opened: dict[bytes, int] = {}
        bases = []
        for handle, offset in zip(published.handles, published.offsets, strict=True):
            if handle not in opened:  # an allocation can be opened once
                opened[handle] = self._driver.open(handle)
                self._give_back.callback(self._driver.close, opened[handle])
            bases.append(opened[handle] + offset)
        strides = [piece.tensor.block_bytes for piece in layout.pieces]
        return Side(np.array(bases, np.uint64), np.array(strides, np.uint64), layout.device_blocks)

    def _pin(self, layout: PoolLayout) -> Side:
        host = self._memory.host
        if host.size:
            self._driver.pin(host.ctypes.data, host.nbytes)
            self._give_back.callback(self._driver.unpin, host.ctypes.data)
        pieces = layout.pieces
        bases = [host.ctypes.data + piece.offset for piece in pieces]
        strides = [layout.layers * layout.block_bytes] * len(pieces)
        return Side(np.array(bases, np.uint64), np.array(strides, np.uint64), layout.host_blocks)

    def start(self, transfer: TransferStarted) -> None:
        """Give the copies to the driver, behind those that they have to wait for."""
        driver = self._driver
        swap_in = transfer.direction == Direction.SWAP_IN
        source, target = self._device_side, self._host_side
        if swap_in:
            source, target = target, source
        # the engine's steps are over before it orders a swap-out: the log says so, not a stream
        order = SOURCE_ANY_TIME if swap_in else SOURCE_IN_STREAM_ORDER
        stream = self._streams[swap_in]
        try:
            copies = plan(source, target, self._sizes, transfer.sources, transfer.targets)
            for earlier in transfer.after:
                if earlier in self._flying:
                    driver.wait_for(stream, self._flying[earlier].event)
            driver.copy(*copies, order, stream)
            self._flying[transfer.transfer] = _Flying(driver.event(stream), len(transfer.targets))
        except (CudaError, IndexError) as error:
            # what the driver took before it failed must not write after the answer; raises if the context is lost
            driver.synchronize(stream)
            self._ended.append(Ended(transfer.transfer, 0, f"{type(error).__name__}: {error}"))

    def ended(self) -> list[Ended]:
        """What has ended since the last call.

        Raises:
            CudaError: the context is lost.
        """
        for transfer, (event, valid) in list(self._flying.items()):
            try:
                if not self._driver.happened(event):
                    continue
                self._ended.append(Ended(transfer, valid))
            except CudaError as error:
                if error.lost:
                    raise
                self._ended.append(Ended(transfer, 0, f"{type(error).__name__}: {error}"))
            del self._flying[transfer]
            self._driver.destroy_event(event)
        ended, self._ended = self._ended, []
        return ended

    def busy(self) -> bool:
        """Whether copies are under way."""
        return bool(self._flying or self._ended)

    def close(self) -> None:
        """Wait for the copies, then unmap and unpin; what the driver refuses is given back with the process."""
        with contextlib.suppress(CudaError):
            self._give_back.close()
