"""Microseconds of a request's whole life in the FastDeploy drop-in, beside the same life in ``CacheManager``.

``python -m benchmarks.fastdeploy [--quick]``: match + allocate + cache + release (with their share of eviction, log
on), the way each API asks for it. The two take turns, request by request, in one process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import figures as f
from benchmarks.lifecycle import prompts
from kvledger import CacheConfig, CacheManager
from kvledger.adapters.fastdeploy import PrefixCacheManager

BLOCK = 64
_CASES = ((32, 0.5, False), (128, 0.5, False), (32, 0.5, True), (128, 0.5, True))
"""Blocks of a prompt, share that hits, whether it is a list."""
OUTPUT = 3
"""Blocks that a request decodes into; the drop-in hands them out one by one."""


def direct(manager: CacheManager) -> Callable[[str, Any], None]:
    def life(key: str, tokens: Any) -> None:
        manager.admit(key, tokens, max_blocks=1 << 30)
        manager.cache(key)
        for _ in range(OUTPUT):
            manager.allocate({key: 1})
        manager.release(key)

    return life


def dropped_in(manager: PrefixCacheManager) -> Callable[[str, Any], None]:
    def life(key: str, tokens: Any) -> None:
        task = SimpleNamespace(request_id=key, prompt_token_ids=tokens, output_token_ids=[])
        common, matched, _ = manager.request_match_blocks(task, BLOCK)
        missing = manager.get_required_block_num(len(tokens) - matched, BLOCK)
        table = common
        if missing and manager.can_allocate_gpu_blocks(missing):
            table = common + manager.allocate_gpu_blocks(missing)
        task.block_tables = table
        manager.update_cache_blocks(task, BLOCK, len(tokens))
        for _ in range(OUTPUT):
            if manager.can_allocate_gpu_blocks(1):
                table += manager.allocate_gpu_blocks(1)
        manager.release_block_ids(task)
        manager.recycle_gpu_blocks(table[task.cached_block_num :])

    return life


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """What the other interface adds, by length and type of the prompt."""
    made = []
    for blocks, hit, as_list in _CASES[:1] if quick else _CASES:
        pool = 10_000
        config = SimpleNamespace(cache_config=SimpleNamespace(total_block_num=pool, num_cpu_blocks=0, block_size=BLOCK))
        name = f"fastdeploy-bench-{os.getpid()}"
        with (
            CacheManager.create(name, CacheConfig(block_size=BLOCK, device_blocks=pool)) as manager,
            PrefixCacheManager(config) as drop_in,
        ):
            lives = (direct(manager), dropped_in(drop_in))
            times: tuple[list[int], list[int]] = ([], [])
            for number, prompt in enumerate(prompts(40 if quick else 1500, blocks, hit, 1)):
                for life, taken in zip(lives, times):
                    tokens: Any = prompt.tolist() if as_list else np.array(prompt)
                    begun = time.perf_counter_ns()
                    life(str(number), tokens)
                    taken.append(time.perf_counter_ns() - begun)
        one, other = (statistics.median(taken[len(taken) // 4 :]) / 1e3 for taken in times)
        kind = "list" if as_list else "int32"
        title = f"drop-in, {blocks} blocks, {hit:.0%} hits, {kind}"
        made.append(f.figure_of(title, "µs per request, p50", [other], "CacheManager", [one], least_ratio=0.5))
    return made, []


if __name__ == "__main__":
    f.alone("FastDeploy drop-in", figures)
