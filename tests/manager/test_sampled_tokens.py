"""A sampled token is known before it is computed: the old call publishes no slot whose KV is not written."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from kvledger import CacheConfig, CacheManager

BLOCK = 4


class Model:
    """Its next token follows from the KV of all before it, read back through the block table."""

    def __init__(self, blocks: int) -> None:
        self.memory = np.full((blocks, BLOCK), -1, np.int64)

    def compute(self, table: np.ndarray, tokens: list[int], start: int) -> int:
        """Write the KV of the tokens from ``start`` on, read all of it, and sample. A wrong byte is fatal."""
        for position in range(start, len(tokens)):
            self.memory[table[position // BLOCK], position % BLOCK] = hash_of(tokens[: position + 1])
        for position in range(len(tokens)):
            found = self.memory[table[position // BLOCK], position % BLOCK]
            assert found == hash_of(tokens[: position + 1]), f"the KV of position {position} is that of other tokens"
        return hash_of(tokens) % 5


def hash_of(tokens: list[int]) -> int:
    """What the KV of the last of these tokens is."""
    value = 7
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % (2**61 - 1)
    return value


@pytest.mark.parametrize("seed", range(8))
def test_turn_after_turn_no_slot_matches_that_was_never_written(seed: int) -> None:
    rng = random.Random(seed)
    with CacheManager.create(
        f"sampled-{seed}-{os.getpid()}", CacheConfig(block_size=BLOCK, device_blocks=64)
    ) as manager:
        model, text = Model(64), [rng.randrange(5) for _ in range(rng.randrange(1, 14))]
        for turn in range(12):
            key = f"turn-{turn}"
            admission = manager.admit(key, text)
            token = model.compute(admission.block_table, text, admission.cached_blocks * BLOCK)
            manager.cache(key)
            for _ in range(rng.randrange(1, 10)):
                manager.cache(key, generated=[token])  # sampled, not computed
                computed = len(text)
                text = [*text, token]
                if len(text) > len(manager.block_table(key)) * BLOCK:
                    manager.allocate({key: 1})
                if rng.random() < 0.2:
                    manager.cache(key)  # says nothing about the last token
                token = model.compute(manager.block_table(key), text, computed)
            manager.cache(key, generated=[token])
            text = [*text, token]
            assert sum(manager.peek(text, max_blocks=99)) <= (len(text) - 1) // BLOCK
            manager.release(key)
            text = [*text, *(rng.randrange(5) for _ in range(rng.randrange(4)))]


def test_prompt_of_twelve_and_four_generated() -> None:
    with CacheManager.create(f"twelve-{os.getpid()}", CacheConfig(block_size=BLOCK, device_blocks=16)) as manager:
        manager.admit("a", range(12), blocks=4)
        manager.cache("a")
        for token in (1, 2, 3, 4):
            manager.cache("a", generated=[token])
        manager.cache("a")
        assert manager.peek([*range(12), 1, 2, 3, 4], max_blocks=99) == (3, 0)
        manager.cache("a", 4)  # whoever has computed it says so
        assert manager.peek([*range(12), 1, 2, 3, 4], max_blocks=99) == (4, 0)
