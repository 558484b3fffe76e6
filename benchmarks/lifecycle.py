"""Microseconds of a request's whole life in the manager, beside the same decisions on a bare state without events' log.

``python -m benchmarks.lifecycle [--quick]``: match + allocate + cache + release with their share of eviction, int32,
log on. The baseline is :class:`Bare`, a run-compressed tree that gives the same answers through the same three calls,
and does nothing else: no events, no log, no validation, no transfers, no tiers.
"""

from __future__ import annotations

import os
import statistics
import time
from array import array
from collections.abc import Callable

import numpy as np

from benchmarks import figures as f
from kvledger import CacheConfig, CacheManager

BLOCK = 64
_CASES: tuple[tuple[int, float, int, int, dict[str, float]], ...] = (
    (32, 0.5, 10_000, 2000, {"least_ratio": 0.2}),
    (128, 0.5, 10_000, 1500, {"least_ratio": 0.2}),
    (256, 0.5, 20_000, 800, {"least_ratio": 0.2}),
    (256, 0.5, 1_000_000, 800, {}),
    (2000, 0.95, 40_000, 300, {"at_most": 120}),
    (2000, 0.0, 40_000, 150, {"at_most": 300}),
)
"""Blocks of a prompt, share that hits, pool, requests, goals."""


class _Run:
    __slots__ = ("blocks", "children", "parent", "pins", "words")

    def __init__(self, parent: _Run | None, words: bytes, blocks: array[int]) -> None:
        self.parent, self.words, self.blocks = parent, words, blocks
        self.children: dict[bytes, _Run] = {}
        self.pins = 0


class Bare:
    """A prefix tree of runs with pins, LRU and block tables: no events, no log, no validation, no transfers."""

    def __init__(self, blocks: int) -> None:
        self.free = array("i", range(blocks))
        self.root = _Run(None, b"", array("i"))
        self.lru: dict[_Run, None] = {}
        self.requests: dict[str, tuple[list[_Run], bytes, array[int]]] = {}

    def admit(self, key: str, tokens: np.ndarray) -> np.ndarray:
        """Match, pin, evict, allocate; returns the block table."""
        if tokens.min() < 0:
            raise ValueError("a negative token")
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
            self.free.extend(victim.blocks)
        private = self.free[len(self.free) - missing :]
        del self.free[len(self.free) - missing :]
        self.requests[key] = path, words[offset:], private
        table = array("i")
        for run in path:
            table.extend(run.blocks)
        table.extend(private)
        return np.array(table, np.int32)

    def cache(self, key: str) -> None:
        """Publish the new blocks."""
        path, words, private = self.requests[key]
        if private:
            node = path[-1] if path else self.root
            new = _Run(node, words, private)
            node.children[words[: 4 * BLOCK]] = new
            new.pins = 1
            path.append(new)

    def release(self, key: str) -> None:
        """Unpin."""
        path, _, _ = self.requests.pop(key)
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


def through(manager: CacheManager | Bare) -> Callable[[np.ndarray], None]:
    numbers = iter(range(1 << 40))
    options = {"max_blocks": 1 << 30} if isinstance(manager, CacheManager) else {}

    def life(tokens: np.ndarray) -> None:
        key = f"r{next(numbers)}"
        manager.admit(key, tokens, **options)
        manager.cache(key)
        manager.release(key)

    return life


def measure(lives: list[Callable[[np.ndarray], None]], work: list[np.ndarray]) -> list[float]:
    """Medians in microseconds, the contestants taking turns prompt by prompt."""
    times: list[list[int]] = [[] for _ in lives]
    for prompt in work:
        for life, taken in zip(lives, times, strict=True):
            tokens = prompt.copy()  # an engine has just received it: it is in the processor's cache
            begun = time.perf_counter_ns()
            life(tokens)
            taken.append(time.perf_counter_ns() - begun)
    return [statistics.median(taken[len(taken) // 4 :]) / 1e3 for taken in times]


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """By prompt, hits and pool."""
    made = []
    for blocks, hit, pool, count, goals in _CASES[:1] if quick else _CASES:
        work = prompts(50 if quick else count, blocks, hit, 1)
        config = CacheConfig(block_size=BLOCK, device_blocks=pool)
        with CacheManager.create(f"lifecycle-{os.getpid()}", config) as manager:
            ours, bare = measure([through(manager), through(Bare(pool))], work)
        name = f"{blocks:,} blocks, {hit:.0%} hits, pool of {pool:,}"
        made.append(f.figure_of(name, "µs per request, p50", [ours], "bare tree", [bare], **goals))
    return made, []


if __name__ == "__main__":
    f.alone("life cycle beside a bare tree", figures)
