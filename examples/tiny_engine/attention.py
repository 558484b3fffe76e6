"""Paged attention: keys and values live in the device pool, and a block table says where.

Keys are kept as they are and rotated when they are read (rotary positions), so the place at which a block stands in
the table decides what its keys mean. Keys rotated before they are kept would carry their own positions, and a permuted
table could go unseen.

The heads are split over the ranks, each with a pool of its own, as tensor-parallel workers would have it. Here one
process computes for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle

from kvledger import KVTensor, Pools


class Rows(NamedTuple):
    """Which rows of a batch belong to which request, and where their keys and values go."""

    spans: list[slice]
    """Rows of each request."""
    positions: np.ndarray
    """Of each row in its request, ``int64[rows]``."""
    slots: np.ndarray
    """Of each row in the pool: block id * block size + place in the block, ``int64[rows]``."""
    tables: list[np.ndarray]
    """Block table of each request, ``int32[blocks]``, as long as its tokens need."""


def kv_tensors(kv_heads: int, block_size: int, head_dim: int) -> tuple[KVTensor, KVTensor]:
    """What a layer keeps on one rank that has ``kv_heads`` heads: slots first, so that a token is one piece."""
    shape = (block_size, kv_heads, head_dim)
    return KVTensor("key", shape, "float64"), KVTensor("value", shape, "float64")


class PagedAttention:
    """Attention over the device pools of all ranks."""

    def __init__(self, pools: Sequence[Pools]) -> None:
        layers = range(pools[0].layout.layers)
        self._keys = [[pool.tensor(layer, "key") for layer in layers] for pool in pools]
        self._values = [[pool.tensor(layer, "value") for layer in layers] for pool in pools]

    def __call__(
        self, layer: int, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, rows: Rows
    ) -> paddle.Tensor:
        """Write keys and values of the rows, then attend: ``[rows, heads, head_dim]`` like ``query``.

        ``key`` and ``value`` are ``[rows, kv_heads, head_dim]``.
        """
        ranks = len(self._keys)
        queries, keys, values = (tensor.chunk(ranks, axis=1) for tensor in (query, key, value))
        outputs = [
            self._on_rank(self._keys[rank][layer], self._values[rank][layer], q, k, v, rows)
            for rank, (q, k, v) in enumerate(zip(queries, keys, values, strict=True))
        ]
        return paddle.concat(outputs, axis=1)  # the all-gather

    def _on_rank(
        self,
        key_pool: paddle.Tensor,
        value_pool: paddle.Tensor,
        query: paddle.Tensor,
        key: paddle.Tensor,
        value: paddle.Tensor,
        rows: Rows,
    ) -> paddle.Tensor:
        slots = paddle.to_tensor(rows.slots)
        for pool, new in ((key_pool, key), (value_pool, value)):
            paddle.scatter_(pool.reshape([-1, *new.shape[1:]]), slots, new)  # reshape is a view: in place in the pool
        outputs = []
        for span, table in zip(rows.spans, rows.tables, strict=True):
            blocks = paddle.to_tensor(table)
            length = int(rows.positions[span][-1]) + 1
            keys, values = (
                paddle.index_select(pool, blocks).reshape([-1, *key.shape[1:]])[:length]
                for pool in (key_pool, value_pool)
            )
            outputs.append(_attend(query[span], keys, values, rows.positions[span]))
        return paddle.concat(outputs)


def _attend(query: paddle.Tensor, keys: paddle.Tensor, values: paddle.Tensor, positions: np.ndarray) -> paddle.Tensor:
    """Causal attention of one request's rows over all its tokens; query heads share the key heads evenly."""
    heads, head_dim = query.shape[1:]
    group = heads // keys.shape[1]
    places = np.arange(keys.shape[0])
    q = _rotated(query, positions).transpose([1, 0, 2])
    k = _rotated(keys, places).transpose([1, 2, 0]).repeat_interleave(group, axis=0)
    v = values.transpose([1, 0, 2]).repeat_interleave(group, axis=0)
    future = np.where(places > positions[:, None], -np.inf, 0.0)
    scores = q @ k / head_dim**0.5 + paddle.to_tensor(future)
    return (paddle.nn.functional.softmax(scores, axis=-1) @ v).transpose([1, 0, 2])


def _rotated(x: paddle.Tensor, positions: np.ndarray) -> paddle.Tensor:
    """Rotary positions: pairs of ``x``, ``[rows, heads, head_dim]``, turned by angles that grow with the position."""
    frequencies = 1000.0 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = positions[:, None, None] * frequencies
    cosine, sine = paddle.to_tensor(np.cos(angles)), paddle.to_tensor(np.sin(angles))
    first, second = x.chunk(2, axis=-1)
    return paddle.concat([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
