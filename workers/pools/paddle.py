"""Paddle tensors as device pool: over shared memory on the CPU, by raw pointer on the GPU.

Only the engine's processes import Paddle (4 s, 300 MB). The transfer worker copies bytes and needs none of it.
"""

from __future__ import annotations

from typing import Any

import paddle

from workers.pools.cuda_driver import CudaError
from workers.pools.cuda_pools import CudaPools
from workers.pools.layout import PoolLayout
from workers.pools.numpy import NumpyPools


class PaddlePools(NumpyPools):
    """CPU tensors that share the memory of the pool: writing to one in place writes to the pool."""

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        super().__init__(ledger, rank, layout)
        self._tensors = []
        for piece, blocks in zip(layout.pieces, self.pieces, strict=True):
            # as bytes: NumPy lacks some element types, and Paddle's view() some of NumPy's
            array = blocks.reshape(layout.device_blocks, *piece.tensor.shape[:-1], -1)
            tensor = paddle.from_dlpack(array).view(piece.tensor.dtype)
            assert tensor.data_ptr() == array.ctypes.data, "Paddle has copied what it should share"
            self._tensors.append(tensor)

    def tensor(self, layer: int, name: str) -> Any:
        """A device tensor, ``paddle.Tensor[blocks, *shape]``."""
        return self._tensors[self.layout.piece(layer, name)]


class PaddleGpuPools(CudaPools):
    """GPU tensors that this process allocates with Paddle, and whose memory its transfer worker opens.

    Raises:
        workers.pools.cuda_driver.CudaError: this Paddle has no CUDA, or the machine no GPU.
    """

    def __init__(self, ledger: str, rank: int, layout: PoolLayout) -> None:
        super().__init__(ledger, rank, layout)
        # asked first: naming a CUDA place ends the process where there is none
        if not paddle.is_compiled_with_cuda() or not paddle.device.cuda.device_count():
            raise CudaError("paddle", "CUDA_ERROR_NO_DEVICE", "this Paddle sees no GPU; backend='paddle' runs without")
        before = paddle.device.get_device()
        paddle.device.set_device(f"gpu:{rank % paddle.device.cuda.device_count()}")
        self._tensors = [
            paddle.empty([layout.device_blocks, *piece.tensor.shape], dtype=piece.tensor.dtype)
            for piece in layout.pieces
        ]
        paddle.device.set_device(before)
        self.publish([tensor.data_ptr() for tensor in self._tensors])

    def tensor(self, layer: int, name: str) -> Any:
        """A device tensor, ``paddle.Tensor[blocks, *shape]``."""
        return self._tensors[self.layout.piece(layer, name)]
