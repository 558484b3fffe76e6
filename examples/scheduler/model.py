"""A model that reads its KV back through the block table: one wrong byte is wrong text.

The KV of a slot is a number made of its token (of an image: its hash), its position, the adapter, the layer and the
rank. The next token depends on the KV of *every* slot before it, on all ranks, as they stand in the pools.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from examples.scheduler.scheduler import Model, Request
from kvledger import BlockTable, CacheConfig, Item, Marks, Pools

VOCABULARY = 50
SLOT_BYTES = 8
_MIX = np.uint64(0x9E3779B97F4A7C15)

Numbers = npt.NDArray[np.uint64]


def contents(tokens: Sequence[int], items: Sequence[Item], lora: str) -> Numbers:
    """What the KV of each position is made of, before the layer and the rank."""
    words = np.array(tokens, np.uint64)
    for item in items:
        digest = hashlib.sha256(item.hash).digest()
        words[item.offset : item.offset + item.length] = int.from_bytes(digest[:8], "little")
    adapter = np.uint64(int.from_bytes(hashlib.sha256(lora.encode()).digest()[:8], "little"))
    return (
        (words + np.uint64(1)) * _MIX ^ np.arange(len(words), dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03) ^ adapter
    )


def keys_and_values(content: Numbers, layer: int, rank: int) -> Numbers:
    """The KV of positions with this content in one layer on one rank."""
    mixed = (content ^ np.uint64(1 + layer * 64 + rank)) * _MIX
    return mixed ^ mixed >> np.uint64(29)


def following(kv: Sequence[Numbers]) -> list[int]:
    """The token that follows each position, from the KV of every position up to it, in all layers on all ranks."""
    weights = np.arange(1, 2 * len(kv[0]), 2, dtype=np.uint64) * _MIX
    planes = np.arange(1, 2 * len(kv), 2, dtype=np.uint64)
    attended = np.cumsum(planes @ np.array(kv) * weights)
    tokens: list[int] = ((attended >> np.uint64(40)) % np.uint64(VOCABULARY)).astype(int).tolist()
    return tokens


class CountingModel:
    """Computes in the pools of a manager with ``block_bytes`` of :data:`SLOT_BYTES` per token."""

    def __init__(self, config: CacheConfig, pools: Sequence[Pools]) -> None:
        self._size = config.block_size
        self._ranks = config.ranks
        self._slots = [
            [pools[rank].tensor(layer, "kv").view(np.uint64) for layer in range(config.layers)]
            for rank in range(config.ranks)
        ]
        self.forwards = 0

    def draft(self, request: Request) -> list[int]:
        """Two guesses: the first is right, the second only for every other length of the text."""
        right = reference(request.tokens, 2, request.items, request.lora, self._ranks, len(self._slots[0]))
        return [right[0], right[1] if len(request.tokens) % 2 else VOCABULARY]

    def forward(self, request: Request, start: int, stop: int, table: BlockTable) -> list[int]:
        """Write the KV of these positions, read all KV back through the block table, and say what follows."""
        self.forwards += 1
        content = contents([*request.tokens, *request.drafts][:stop], request.items, request.lora)
        positions = np.arange(start, stop)
        blocks, slots = table[positions // self._size], positions % self._size
        used = table[: -(-stop // self._size)]
        kv = []
        for rank, layers in enumerate(self._slots):
            for layer, pool in enumerate(layers):
                pool[blocks, slots] = keys_and_values(content[start:], layer, rank)
                kv.append(pool[used].reshape(-1)[:stop])
        return following(kv)[start:]


class MarkingModel:
    """A model that notes which blocks it writes and reads (``kvledger check LEDGER --engine FILE``)."""

    def __init__(self, model: Model, marks: Marks, block_size: int) -> None:
        self._model, self._marks, self._size = model, marks, block_size

    def draft(self, request: Request) -> list[int]:
        """Guess some of the next tokens."""
        return self._model.draft(request)

    def forward(self, request: Request, start: int, stop: int, table: BlockTable) -> list[int]:
        """Note it, and do it."""
        used = table[: -(-stop // self._size)]
        self._marks.computed(request.id, start, stop, used[start // self._size :].tolist())
        self._marks.read(request.id, used.tolist())
        return self._model.forward(request, start, stop, table)


def reference(
    tokens: Sequence[int], length: int, items: Sequence[Item], lora: str, ranks: int = 2, layers: int = 2
) -> list[int]:
    """The next so many tokens, by a model without any cache."""
    text = list(tokens)
    for _ in range(length):
        content = contents(text, items, lora)
        kv = [keys_and_values(content, layer, rank) for rank in range(ranks) for layer in range(layers)]
        text.append(following(kv)[-1])
    return text[len(tokens) :]
