"""What the run's engine writes into the KV blocks, and how it knows that it reads the right ones.

The bytes of a block follow from the content of its *whole prefix* (a chained hash), the rank and the layer: a block in
the wrong place of a block table, of another prompt, rank or layer, or half copied, holds other bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from workers.pools.interface import Pools

Seeds = npt.NDArray[np.uint64]
_GOLDEN = 0x9E3779B97F4A7C15
_RANK = 0xD6E8FEB86659FD93
_LAYER = 0xA0761D6478BD642F
_64_BITS = 2**64 - 1
_MIX = np.uint64(0xE7037ED1A0B428DB)


class WrongBytes(RuntimeError):
    """A block of a request does not hold the keys and values of the tokens that belong there."""


def chain(words: memoryview, block_bytes: int, namespace: bytes) -> Seeds:
    """One 64-bit seed per full block, each over all blocks before it, ``uint64[blocks]``."""
    seed = xxhash.xxh3_64_intdigest(namespace)
    seeds = np.empty(len(words) // block_bytes, np.uint64)
    for i in range(len(seeds)):
        seed = xxhash.xxh3_64_intdigest(words[i * block_bytes : (i + 1) * block_bytes], seed)
        seeds[i] = seed
    return seeds


class PatternEngine:
    """Writes and verifies blocks in the device pools of all ranks."""

    def __init__(self, pools: Sequence[Pools]) -> None:
        self._pools = pools
        self.verified_bytes = 0
        self.written_bytes = 0
        words = pools[0].layout.block_bytes // 8
        self._ramp = (np.arange(words, dtype=np.uint64) * np.uint64(_GOLDEN))[None, :]

    def _first_words(self, seeds: Seeds, rank: int, layer: int) -> npt.NDArray[np.uint64]:
        place = (_RANK * (rank + 1) ^ _LAYER * (layer + 1)) & _64_BITS
        mixed = seeds ^ np.uint64(place)
        mixed ^= mixed >> np.uint64(31)
        result: npt.NDArray[np.uint64] = (mixed * _MIX)[:, None]
        return result

    def write(self, blocks: npt.NDArray[np.int32], seeds: Seeds) -> None:
        """Compute the KV of ``blocks[i]``, whose prefix has ``seeds[i]``."""
        for layer in range(self._pools[0].layout.layers):
            self.write_layer(layer, blocks, seeds)

    def write_layer(self, layer: int, blocks: npt.NDArray[np.int32], seeds: Seeds) -> None:
        """One layer of it, on all ranks."""
        for rank, pool in enumerate(self._pools):
            pattern = self._first_words(seeds, rank, layer) + self._ramp
            pool.tensor(layer, "kv").view(np.uint64)[blocks] = pattern
            self.written_bytes += pattern.nbytes

    def verify(self, request: str, blocks: npt.NDArray[np.int32], seeds: Seeds, sequence: int) -> None:
        """Attend: every block, in token order, on all ranks and layers.

        Raises:
            WrongBytes: naming the first wrong block, the request and the event sequence.
        """
        for rank, pool in enumerate(self._pools):
            for layer in range(pool.layout.layers):
                found = pool.tensor(layer, "kv").view(np.uint64)[blocks]
                found -= self._ramp
                wrong = found != self._first_words(seeds, rank, layer)
                if wrong.any():
                    position = int(np.flatnonzero(wrong.any(axis=1))[0])
                    raise WrongBytes(
                        f"request {request}: block {blocks[position]}, position {position} of its block table, does "
                        f"not hold the KV of its tokens (rank {rank}, layer {layer}, after event {sequence})"
                    )
                self.verified_bytes += found.nbytes
