"""Microseconds of a request's whole life in the manager, beside the same decisions on a bare state without events' log.

``python -m benchmarks.lifecycle``: match + allocate + cache + release with their share of eviction, int32, log on.
The baseline is :class:`Bare`, a run-compressed tree that only matches, pins, evicts, inserts and unpins.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from kvledger import CacheConfig, CacheManager

BLOCK = 64


class _Run:
    __slots__ = ("blocks", "children", "parent", "pins", "words")

    def __init__(self, parent: _Run | None, words: bytes, blocks: list[int]) -> None:
        self.parent, self.words, self.blocks = parent, words, blocks
        self.children: dict[bytes, _Run] = {}
        self.pins = 0


class Bare:
    """A prefix tree of runs with pins and LRU: no events, no log, no validation, no transfers."""

    def __init__(self, blocks: int) -> None:
        self.free = list(range(blocks))
        self.root = _Run(None, b"", [])
        self.lru: dict[_Run, None] = {}

    def life(self, tokens: np.ndarray) -> None:
        """A whole request."""
        words = tokens.tobytes()
        size, offset, node, path = 4 * BLOCK, 0, self.root, []
        while child := node.children.get(words[offset : offset + size]):
            if not words.startswith(child.words, offset):
                count = 1
                while child.words[: (count + 1) * size] == words[offset : offset + (count + 1) * size]:
                    count += 1
                upper = _Run(node, child.words[: count * size], child.blocks[:count])
                node.children[child.words[:size]] = upper
                child.words, child.blocks, child.parent = child.words[count * size :], child.blocks[count:], upper
                upper.children[child.words[:size]] = child
                upper.pins = child.pins
                child = upper
            path.append(child)
            offset += len(child.words)
            node = child
        for run in path:
            run.pins += 1
            self.lru.pop(run, None)
        missing = len(words) // size - offset // size
        while len(self.free) < missing:
            victim = next(iter(self.lru))
            assert victim.parent is not None
            del self.lru[victim], victim.parent.children[victim.words[:size]]
            self.free += victim.blocks
        if missing:
            new = _Run(node, words[offset:], self.free[-missing:])
            del self.free[-missing:]
            node.children[new.words[:size]] = new
            new.pins = 1
            path.append(new)
        for run in reversed(path):
            run.pins -= 1
            if not run.pins:
                self.lru[run] = None


def prompts(count: int, blocks: int, hit: float, seed: int) -> list[np.ndarray]:
    """Prompts of so many blocks whose first part is one of eight shared beginnings."""
    rng = np.random.default_rng(seed)
    shared = [rng.integers(0, 128_000, int(blocks * hit) * BLOCK, np.int32) for _ in range(8)]
    made = []
    for i in range(count):
        rest = rng.integers(0, 128_000, blocks * BLOCK - len(shared[0]), np.int32)
        made.append(np.concatenate([shared[i % 8], rest]))
    return made


def through(manager: CacheManager) -> Callable[[np.ndarray], None]:
    numbers = iter(range(1 << 40))

    def life(tokens: np.ndarray) -> None:
        key = f"r{next(numbers)}"
        manager.admit(key, tokens, max_blocks=1 << 30)
        manager.cache(key)
        manager.release(key)

    return life


def measure(life: Callable[[np.ndarray], None], work: list[np.ndarray]) -> float:
    times = []
    for prompt in work:
        tokens = prompt.copy()  # an engine has just received it: it is in the processor's cache
        begun = time.perf_counter_ns()
        life(tokens)
        times.append(time.perf_counter_ns() - begun)
    return statistics.median(times[len(times) // 4 :]) / 1e3


def main() -> None:
    print(f"{'blocks':>7} {'hit':>5} {'pool':>9} {'kvledger µs':>12} {'bare µs':>8} {'ratio':>6}")
    for blocks, hit, pool, count in (
        (32, 0.5, 10_000, 2000),
        (128, 0.5, 10_000, 1500),
        (256, 0.5, 20_000, 800),
        (256, 0.5, 1_000_000, 800),
        (2000, 0.95, 40_000, 300),
        (2000, 0.0, 40_000, 150),
    ):
        work = prompts(count, blocks, hit, 1)
        bare = Bare(pool)
        config = CacheConfig(block_size=BLOCK, device_blocks=pool)
        with CacheManager.create(f"lifecycle-{os.getpid()}", config) as manager:
            with_log = measure(through(manager), work)
        without = measure(bare.life, work)
        print(f"{blocks:7} {hit:5.0%} {pool:9,} {with_log:12.1f} {without:8.1f} {with_log / without:6.1f}")
    config = CacheConfig(block_size=BLOCK, device_blocks=100_000)
    with CacheManager.create(f"lifecycle-{os.getpid()}", config) as manager:
        for i in range(256):
            manager.admit(str(i), np.arange(BLOCK, dtype=np.int32) + i)
        step = {str(i): 1 for i in range(256)}
        times = []
        for _ in range(200):
            begun = time.perf_counter_ns()
            manager.allocate(step)
            times.append(time.perf_counter_ns() - begun)
        print(f"one block each to 256 requests in one call: {statistics.median(times) / 1e3:.0f} µs")


if __name__ == "__main__":
    main()
