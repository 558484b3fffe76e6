"""A small transformer with random weights, in NumPy. Its keys and values live in the blocks that kvledger hands out.

Tokens are bytes. What it says are letters without a meaning. They are the same ones after the same prompt only if the
keys and values of every token before are where the block table says.
"""

from __future__ import annotations

import numpy as np

from examples.scheduler.scheduler import Request
from kvledger import BlockTable, CacheConfig, CacheManager, KVTensor

LAYERS, HEADS, HEAD, BLOCK = 2, 4, 16, 16
HIDDEN = HEADS * HEAD
LETTERS = b"abcdefghijklmnopqrstuvwxyz    "
CONFIG = CacheConfig(
    block_size=BLOCK,
    device_blocks=256,
    ranks=1,
    layers=LAYERS,
    tensors=(KVTensor("key", (BLOCK, HEADS, HEAD), "float32"), KVTensor("value", (BLOCK, HEADS, HEAD), "float32")),
)


class SmallModel:
    """What the scheduler of ``examples/scheduler`` calls."""

    def __init__(self, manager: CacheManager, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        pools = manager.pools[0]
        self._cache = [(pools.tensor(layer, "key"), pools.tensor(layer, "value")) for layer in range(LAYERS)]
        self._embedding = rng.standard_normal((256, HIDDEN))
        self._weights = rng.standard_normal((LAYERS, 4, HIDDEN, HIDDEN)) * 2 / np.sqrt(HIDDEN)
        self._head = rng.standard_normal((HIDDEN, len(LETTERS)))

    def draft(self, request: Request) -> list[int]:
        """Guess nothing: every token is computed."""
        return []

    def forward(self, request: Request, start: int, stop: int, table: BlockTable) -> list[int]:
        """Compute these positions of a request; returns the token that follows each of them."""
        positions, known = np.arange(start, stop), np.arange(stop)
        x = self._embedding[request.tokens[start:stop]] + np.sin(positions[:, None] / 1.3 ** np.arange(HIDDEN))
        for (keys, values), (to_query, to_key, to_value, out) in zip(self._cache, self._weights):
            y = x / np.sqrt((x * x).mean(1, keepdims=True))
            written, slots = table[positions // BLOCK], positions % BLOCK
            keys[written, slots] = (y @ to_key).reshape(-1, HEADS, HEAD)
            values[written, slots] = (y @ to_value).reshape(-1, HEADS, HEAD)
            read, places = table[known // BLOCK], known % BLOCK
            query = (y @ to_query).reshape(-1, HEADS, HEAD)
            scores = np.einsum("qhd,khd->hqk", query, keys[read, places]) / np.sqrt(HEAD)
            scores[:, known[None, :] > positions[:, None]] = -np.inf  # nobody attends to what comes later
            weights = np.exp(scores - scores.max(2, keepdims=True))
            weights /= weights.sum(2, keepdims=True)
            x = x + np.einsum("hqk,khd->qhd", weights, values[read, places]).reshape(-1, HIDDEN) @ out
        return [LETTERS[best] for best in (x @ self._head).argmax(1)]
