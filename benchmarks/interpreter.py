"""What concerns the interpreter: garbage collections, comparing and copying bytes, import time.

``python -m benchmarks.interpreter [--quick]``: the longest collection while a cache of a million blocks fills, beside
vLLM's and SGLang's, and that of a whole collection afterwards; matching a cached prompt of 128 k tokens beside
``memcmp`` of the same bytes; the life of such a prompt beside what it cannot do without, however it is written: the
passes over its bytes; ``import kvledger`` beside ``import numpy``, which it contains.
"""

from __future__ import annotations

import gc
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from crc32c import crc32c

from benchmarks import figures as f
from benchmarks.field import Field, Pauses
from benchmarks.growth import Lives
from benchmarks.peers import BEST, Entry, make
from kvledger import CacheConfig, CacheManager

_BLOCK, _RUN = 16, 32
_TOKENS = 131_072


def collections(entry: Entry, blocks: int) -> tuple[float, float]:
    """In the contestant's process: ms of the longest collection while the cache fills, and of a whole one after."""
    contestant = make(entry, _BLOCK, blocks, longest=1024, requests=4)
    lives = Lives(contestant, _RUN)
    with Pauses() as pauses:
        for _ in range(blocks // _RUN + 1000):
            lives.one()
        longest = pauses.longest_ms
        begun = time.perf_counter()
        gc.collect()
        whole = (time.perf_counter() - begun) * 1e3
    contestant.close()
    return longest, whole


def matching(runs: int, times: int) -> tuple[list[float], list[float]]:
    """µs of finding a cached prompt of 128 k tokens that lies in so many runs, and of ``memcmp``, in turns."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 128_000, _TOKENS, np.int32)
    ours, floor = [], []
    config = CacheConfig(block_size=_BLOCK, device_blocks=_TOKENS // _BLOCK + 1000)
    with CacheManager.create(f"matching-{os.getpid()}", config) as manager:
        for part in range(1, runs + 1):  # each ends elsewhere, so that the next one cuts the path there
            key = f"part {part}"
            end = _TOKENS * part // runs // _BLOCK * _BLOCK
            branch = np.concatenate([tokens[:end], rng.integers(0, 128_000, _BLOCK, np.int32)])
            manager.admit(key, branch)
            manager.cache(key)
            manager.release(key)
        stored = tokens.tobytes()
        for _ in range(times):  # each compares what was just written with what was not looked at since its last turn
            other = tokens.tobytes()
            begun = time.perf_counter_ns()
            assert other == stored
            floor.append((time.perf_counter_ns() - begun) / 1e3)
            prompt = tokens.copy()
            begun = time.perf_counter_ns()
            found, _ = manager.peek(prompt, max_blocks=_TOKENS // _BLOCK)
            ours.append((time.perf_counter_ns() - begun) / 1e3)
            assert found == _TOKENS // _BLOCK
    return ours, floor


def long_prompts(times: int) -> tuple[list[float], list[float]]:
    """µs of the life (no decode) of a prompt of 128 k tokens, half of it cached, and of the passes over it, in turns.

    The passes: is a token negative; is the first half what is cached; a copy of the second half to keep, its CRC, and
    a copy of it into memory like the log's, where nothing was written before.
    """
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 128_000, _TOKENS // 2, np.int32) for _ in range(4)]
    stored = [document.tobytes() for document in documents]
    half = 2 * _TOKENS
    log = memoryview(mmap.mmap(-1, times * half, mmap.MAP_SHARED | mmap.MAP_POPULATE))
    kept: list[bytes] = []
    ours, floor = [], []
    config = CacheConfig(block_size=_BLOCK, device_blocks=1_000_000 // _BLOCK)
    with CacheManager.create(f"long-{os.getpid()}", config) as manager:
        for turn in range(times):
            prompt = np.concatenate([documents[turn % 4], rng.integers(0, 128_000, _TOKENS // 2, np.int32)])
            begun = time.perf_counter_ns()
            manager.admit(str(turn), prompt)
            manager.cache(str(turn))
            manager.release(str(turn))
            ours.append((time.perf_counter_ns() - begun) / 1e3)
            data = prompt.copy().data.cast("B")
            begun = time.perf_counter_ns()
            assert np.minimum.reduce(np.frombuffer(data, np.int32)) >= 0
            assert stored[turn % 4].startswith(data[:half])
            rest = data[half:].tobytes()
            crc32c(rest)
            log[turn * half : (turn + 1) * half] = rest
            floor.append((time.perf_counter_ns() - begun) / 1e3)
            kept = [*kept[-11:], rest]
    return ours[len(documents) :], floor[len(documents) :]  # nothing of the first ones was cached


def importing(module: str, bytecode: str) -> float:
    """ms of an import in a fresh interpreter that finds the modules compiled to bytecode, as pip installs them."""
    code = f"import time; t = time.perf_counter(); import {module}; print((time.perf_counter() - t) * 1e3)"
    environment = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """Collections, matching, import."""
    made = []
    blocks = 2_000 if quick else 1_000_000
    with Field(BEST) as field:
        found = field.turn(collections, blocks)
        skipped = field.skipped
    longest, whole = found.pop("kvledger")
    least = 1e-3  # no collection at all: a microsecond
    for peer, (theirs, theirs_whole) in found.items():
        name = f"longest collection while {blocks:,} blocks fill"
        made.append(f.figure_of(name, "ms", [max(longest, least)], peer, [max(theirs, least)], at_most=1.0))
        name = f"a whole collection with {blocks:,} blocks"
        made.append(f.figure_of(name, "ms", [max(whole, least)], peer, [max(theirs_whole, least)]))
    if not found:
        name = f"longest collection while {blocks:,} blocks fill"
        made.append(f.figure_of(name, "ms", [max(longest, least)], "a whole one", [max(whole, least)], at_most=1.0))
    for runs in (1, 32):
        ours, floor = matching(runs, 20 if quick else 300)
        medians = [statistics.median(ours)], "memcmp", [statistics.median(floor)]
        name = f"matching 128 k tokens in {runs} run{'s' * (runs > 1)}"
        made.append(f.figure_of(name, "µs", *medians, least_ratio=0.5))
    ours, floor = long_prompts(8 if quick else 160)
    medians = [statistics.median(ours)], "its passes over memory", [statistics.median(floor)]
    made.append(f.figure_of("a prompt of 128 k tokens, half of it cached", "µs", *medians))
    with tempfile.TemporaryDirectory() as bytecode:
        importing("kvledger", bytecode)
        pairs = [(importing("kvledger", bytecode), importing("numpy", bytecode)) for _ in range(2 if quick else 9)]
    ours, floor = [own for own, _ in pairs], [other for _, other in pairs]
    made.append(f.figure_of("import kvledger", "ms", ours, "import numpy", floor, at_most=150.0))
    return made, skipped


if __name__ == "__main__":
    f.alone("interpreter", figures)
