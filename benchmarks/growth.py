"""What a request costs, how long the longest one takes, and what a block takes in memory, as the cache grows.

``python -m benchmarks.growth [BLOCKS ...]``: fills caches of 10 k, 100 k, 1 M and 10 M blocks with runs of 32 blocks
(and one of 1 M with runs of 8, one of 100 k with runs of 1), then measures requests that each evict what they cache.
Every size runs in a process of its own; the log is on, with its segments prepared and dropped as usual.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import numpy as np

from kvledger import CacheConfig, CacheManager

_BLOCK = 16
_SIZES = ((10_000, 32), (100_000, 32), (1_000_000, 32), (10_000_000, 32), (1_000_000, 8), (100_000, 1))


def resident() -> int:
    """Private memory in bytes (the log's shared segments do not count)."""
    with open("/proc/self/statm") as file:
        _, pages, shared, *_ = map(int, file.read().split())
    return (pages - shared) * os.sysconf("SC_PAGESIZE")


def measure(blocks: int, run: int) -> None:
    rng = np.random.default_rng(0)
    config = CacheConfig(block_size=_BLOCK, device_blocks=blocks)
    with CacheManager.create(f"growth-{os.getpid()}", config) as manager:

        def life(number: int) -> float:
            tokens = rng.integers(0, 128_000, run * _BLOCK, np.int32)
            begun = time.perf_counter()
            key = str(number)
            manager.admit(key, tokens, max_blocks=run)
            manager.cache(key)
            manager.release(key)
            return time.perf_counter() - begun

        count = blocks // run
        for number in range(min(count, 200)):
            life(number)
        before = resident()
        for number in range(200, count):
            life(number)
        cached = (count - 200) * run
        beside = (resident() - before) / cached - 4 * _BLOCK
        times = sorted(life(count + number) * 1e6 for number in range(20_000))
        print(
            f"{blocks:11,} {run:4} {statistics.median(times):8.1f} {times[len(times) * 99 // 100]:8.1f} "
            f"{times[-1] / 1e3:8.2f} {beside:8.1f}",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        measure(int(sys.argv[2]), int(sys.argv[3]))
        return
    print(f"{'blocks':>11} {'run':>4} {'p50 µs':>8} {'p99 µs':>8} {'max ms':>8} {'B/block':>8}", flush=True)
    wanted = {int(text.replace("_", "")) for text in sys.argv[1:]}
    for blocks, run in _SIZES:
        if not wanted or blocks in wanted:
            subprocess.run([sys.executable, "-m", "benchmarks.growth", "--one", str(blocks), str(run)], check=True)


if __name__ == "__main__":
    main()
