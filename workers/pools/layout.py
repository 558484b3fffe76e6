"""The shape of the KV pools: which tensors of how many blocks, in how many layers, on how many ranks, in what memory.

A layer has one tensor or several: keys and values, their scales where the cache is quantised, one latent where the
model has no value cache. In device memory each is an array of its own, ``[blocks, *shape]``; in the host pool the
pieces of one block stand behind each other, layer by layer. Workers move bytes and never interpret them.
"""

from __future__ import annotations

import json
import math
from typing import NamedTuple, Self

import xxhash

ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""The element types of a KV tensor, in bytes."""
BACKENDS = ("numpy", "paddle", "paddle-gpu", "cuda")
"""See :mod:`workers.pools.backends`."""
ALIGNMENT = 8
"""The bytes of a block in each tensor are a multiple of this."""


class KVTensor(NamedTuple):
    """One tensor of each layer. ``shape``: of one block on one rank, without the axis of the blocks."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def check(self) -> None:
        """Raises ``ValueError``, saying what is wrong with it."""
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"a KV tensor needs a name, not {self.name!r:.80}")
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: dtype must be one of {', '.join(ITEM_BYTES)}, not {self.dtype!r:.80}")
        if (
            not isinstance(self.shape, tuple)
            or not self.shape
            or not all(type(size) is int and size > 0 for size in self.shape)
        ):
            raise ValueError(f"{self.name}: the shape of a block is whole numbers from 1, not {self.shape!r:.80}")
        if self.block_bytes % ALIGNMENT:
            raise ValueError(f"{self.name}: {self.block_bytes} bytes per block are not a multiple of {ALIGNMENT}")


def key_value(kv_heads: int, block_size: int, head_dim: int, dtype: str = "bfloat16") -> tuple[KVTensor, ...]:
    """Keys and values as FastDeploy's attention backends keep them. ``kv_heads``: of one rank."""
    shape = (kv_heads, block_size, head_dim)
    return KVTensor("key", shape, dtype), KVTensor("value", shape, dtype)


def key_value_8bit(
    kv_heads: int, block_size: int, head_dim: int, dtype: str = "uint8", scale_dtype: str = "bfloat16"
) -> tuple[KVTensor, ...]:
    """An 8-bit cache with a scale per head and token (FastDeploy's ``block_wise_fp8``)."""
    shape = (kv_heads, block_size)
    scales = KVTensor("key_scale", shape, scale_dtype), KVTensor("value_scale", shape, scale_dtype)
    return key_value(kv_heads, block_size, head_dim, dtype) + scales


def latent(block_size: int, latent_dim: int, rope_dim: int, dtype: str = "bfloat16") -> tuple[KVTensor, ...]:
    """Multi-head latent attention: one latent per token, and no value cache."""
    return (KVTensor("key", (1, block_size, latent_dim + rope_dim), dtype),)


class Piece(NamedTuple):
    """The blocks of one tensor in one layer. ``offset``: where it stands in a host block, in bytes."""

    layer: int
    tensor: KVTensor
    offset: int


class PoolLayout(NamedTuple):
    """What engine and workers must agree on. ``block_bytes``: all tensors of one block in one layer of one rank."""

    ranks: int
    layers: int
    block_bytes: int
    device_blocks: int
    host_blocks: int
    tensors: tuple[KVTensor, ...] = ()
    """Of each layer; without any, a block is so many bytes of which nobody says what they are."""
    backend: str = "numpy"
    """One of :data:`BACKENDS`: whose memory the device pool is."""
    checksums: bool = False
    """Whether each host block has one (:mod:`workers.pools.checksums`)."""

    def text(self) -> str:
        """Write the layout as one line, as the log and workers get it."""
        fields = self._asdict()
        if not self.checksums:  # as before there were any
            del fields["checksums"]
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the layout that :meth:`text` wrote. Raises ``ValueError`` for anything else."""
        try:
            fields = json.loads(text)
            tensors = tuple(KVTensor(name, tuple(shape), dtype) for name, shape, dtype in fields.pop("tensors"))
            backend, checksums = str(fields.pop("backend")), bool(fields.pop("checksums", False))
            sizes = {name: int(value) for name, value in fields.items()}
            layout = cls(**sizes, tensors=tensors, backend=backend, checksums=checksums)
            for tensor in tensors:
                tensor.check()
            if backend not in BACKENDS:
                raise ValueError(backend)
        except (TypeError, AttributeError, KeyError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a pool layout: {text!r}") from error
        return layout

    @property
    def on_gpu(self) -> bool:
        """Whether the device pool is memory of a GPU; otherwise it is shared memory."""
        return self.backend in ("paddle-gpu", "cuda")

    @property
    def pieces(self) -> list[Piece]:
        """All tensors of all layers, in the order in which they stand in a host block."""
        tensors = self.tensors or (KVTensor("kv", (self.block_bytes,), "uint8"),)
        pieces = []
        offset = 0
        for layer in range(self.layers):
            for tensor in tensors:
                pieces.append(Piece(layer, tensor, offset))
                offset += tensor.block_bytes
        return pieces

    def piece(self, layer: int, name: str) -> int:
        """Index in :attr:`pieces` of a layer's tensor. Raises ``KeyError``, naming what there is."""
        for index, piece in enumerate(self.pieces):
            if (piece.layer, piece.tensor.name) == (layer, name):
                return index
        names = sorted({piece.tensor.name for piece in self.pieces})
        raise KeyError(f"no tensor {name!r} in layer {layer}: {self.layers} layers of {', '.join(names)}")

    @property
    def fingerprint(self) -> int:
        """64 bits of the layout: two layouts that differ in anything have different ones."""
        return xxhash.xxh3_64_intdigest(self.text().encode())
