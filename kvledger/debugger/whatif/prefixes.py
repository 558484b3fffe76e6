"""Numbers for prefixes: what a block holds and everything before it, in 64 bits.

Two different prefixes get the same number once in 2⁶⁴: good enough for estimates, not for a cache.
"""

from __future__ import annotations

import xxhash

from statemachine.items import NO_ITEMS, BlockItems


def root_seed(namespace: bytes) -> int:
    """What the numbers of a namespace's first blocks build on."""
    return xxhash.xxh3_64_intdigest(namespace)


def chain(words: bytes, block_bytes: int, seed: int, items: BlockItems = NO_ITEMS) -> list[int]:
    """One 64-bit number per block, each over all blocks before it.

    Args:
        seed: the number of the block before.
        items: the images and sounds, by block from the beginning of ``words``.
    """
    digest = xxhash.xxh3_64_intdigest
    view = memoryview(words)
    numbers = []
    for block, start in enumerate(range(0, len(words) - block_bytes + 1, block_bytes)):
        seed = digest(view[start : start + block_bytes], seed)
        if block in items:
            seed = digest(items[block], seed)
        numbers.append(seed)
    return numbers
