"""What a request costs as everything grows: the cache, the requests in flight, the readers of the log; and its memory.

``python -m benchmarks.growth [--quick] [BLOCKS ...]``: fills caches of 10 k to 10 M blocks of 16 tokens with prompts of
32 blocks (kvledger also with shorter ones: a run per prompt is its worst case), then measures requests that each evict
what they cache. vLLM and SGLang take part up to 1 M blocks. Memory is what the process takes for a cached block, with
its tokens, which SGLang and kvledger keep and vLLM does not.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import figures as f
from benchmarks.field import Field, Pauses
from benchmarks.peers import BEST, Contestant, Entry, make
from ipc import LogReader

_BLOCK = 16
_SIZES = ((10_000, 32), (100_000, 32), (1_000_000, 32), (10_000_000, 32), (1_000_000, 8), (100_000, 1))
_MOST_OF_PEERS = 1_000_000
_IN_FLIGHT = (1, 100, 10_000)
_READERS = (1, 8, 64)
_SETTLE_S = 12.0
_EMPTY = np.empty(0, np.int32)


class Grown(NamedTuple):
    """A full cache."""

    p50_us: float
    p99_us: float
    longest_ms: float
    """While it was filled, too."""
    block_bytes: float
    """Memory per cached block, with its tokens."""


class Lives:
    """Requests without output, of so many blocks each, that share nothing."""

    def __init__(self, contestant: Contestant, blocks: int) -> None:
        self._contestant = contestant
        self._blocks = blocks
        self._rng = np.random.default_rng(0)
        self._number = 0

    def begin(self) -> Any:
        """One request, not yet admitted."""
        self._number += 1
        tokens = self._rng.integers(0, 128_000, self._blocks * _BLOCK, np.int32)
        return self._contestant.receive(str(self._number), tokens, _EMPTY)

    def one(self) -> float:
        """A whole life, in µs."""
        handle = self.begin()
        begun = time.perf_counter_ns()
        self._contestant.admit(handle)
        self._contestant.cache(handle)
        self._contestant.finish(handle)
        return (time.perf_counter_ns() - begun) / 1e3


def resident() -> int:
    """Private memory in bytes (the log's shared segments do not count)."""
    with open("/proc/self/statm") as file:
        _, pages, shared, *_ = map(int, file.read().split())
    return (pages - shared) * os.sysconf("SC_PAGESIZE")


def full(entry: Entry, blocks: int, run: int, measured: int) -> Grown:
    """In the contestant's process: fill a cache, then measure."""
    with Pauses():
        small = make(entry, _BLOCK, 100, longest=1024, requests=4)  # what a process takes once is not of a block
        Lives(small, run).one()
        small.close()
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier one has freed
        before = resident()
        contestant = make(entry, _BLOCK, blocks, longest=1024, requests=4)
        lives = Lives(contestant, run)
        longest = max(lives.one() for _ in range(blocks // run))
        memory = (resident() - before) / blocks
        time.sleep(min(blocks / 80_000, _SETTLE_S))  # our auditor still reads the log, and costs a third meanwhile
        times = [lives.one() for _ in range(measured)]
    contestant.close()
    return Grown(statistics.median(times), f.quantile(times, 0.99), max(longest, *times) / 1e3, memory)


def beside(entry: Entry, in_flight: int) -> float:
    """In the contestant's process: µs of a request of four blocks while so many others run."""
    contestant = make(entry, _BLOCK, 4 * in_flight + 1000, longest=128, requests=in_flight + 1)
    lives = Lives(contestant, 4)
    handles = []
    for _ in range(in_flight):
        handles.append(lives.begin())
        contestant.admit(handles[-1])
        contestant.cache(handles[-1])
    cost = statistics.median(lives.one() for _ in range(1000))
    for handle in handles:
        contestant.finish(handle)
    contestant.close()
    return cost


def _observe(ledger: str, count: int, pipe: Any) -> None:
    readers = [LogReader(ledger, name=f"observer {number}") for number in range(count)]
    pipe.send("ready")
    while not pipe.poll(0.005):
        for reader in readers:
            reader.poll()
    for reader in readers:
        reader.close()


def watched(entry: Entry, readers: int) -> tuple[float, float]:
    """µs of a request of 32 blocks alone, and while a process with so many readers follows the log."""
    contestant: Any = make(entry, _BLOCK, 10_000)
    lives = Lives(contestant, 32)
    for _ in range(1000):
        lives.one()
    alone = statistics.median(lives.one() for _ in range(1000))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_observe, args=(contestant.manager.name, readers, theirs))
    process.start()
    ours.recv()
    with_readers = statistics.median(lives.one() for _ in range(2000))
    ours.send("end")
    process.join()
    contestant.close()
    return alone, with_readers


def figures(quick: bool, sizes: Sequence[int] = ()) -> tuple[list[f.Figure], list[str]]:
    """Sizes (default: all), then requests in flight and readers."""
    made: list[f.Figure] = []
    with Field(BEST) as field:
        own: dict[tuple[int, int], Grown] = {}
        for blocks, run in ((2_000, 32),) if quick else _SIZES:
            if sizes and blocks not in sizes:
                continue
            if run == 32 and blocks <= _MOST_OF_PEERS:
                everybody = field.turn(full, blocks, run, 200 if quick else 5000)
            else:
                everybody = {"kvledger": full(BEST[0], blocks, run, 5000)}
            own[blocks, run] = ours = everybody.pop("kvledger")
            made += _sizes_of(f"{blocks:,} blocks, runs of {run}", run, ours, everybody)
            smallest = own.get((10_000, 32))
            if smallest and run == 32 and blocks > 10_000:
                name = f"{blocks:,} blocks, runs of {run}, p50"
                costs = [ours.p50_us], "own 10,000 blocks", [smallest.p50_us]
                made.append(f.figure_of(name, "µs per request", *costs, least_ratio=0.8))
        if not sizes:
            made += _in_flight(field, quick)
        skipped = field.skipped
    return made + ([] if sizes else _readers(quick)), skipped


def _sizes_of(name: str, run: int, ours: Grown, peers: dict[str, Grown]) -> list[f.Figure]:
    made = []
    for peer, theirs in peers.items():
        details = {"ours": ours._asdict(), "theirs": theirs._asdict()}
        made.append(
            f.figure_of(f"{name}, p50", "µs per request", [ours.p50_us], peer, [theirs.p50_us], details=details)
        )
        made.append(f.figure_of(f"{name}, longest", "ms", [ours.longest_ms], peer, [theirs.longest_ms], at_most=5.0))
        made.append(f.figure_of(f"{name}, memory", "bytes per block", [ours.block_bytes], peer, [theirs.block_bytes]))
    words = 4.0 * _BLOCK
    limit = words + 64 if run >= 32 else None
    made.append(
        f.figure_of(f"{name}, memory", "bytes per block", [ours.block_bytes], "its tokens", [words], at_most=limit)
    )
    return made


def _in_flight(field: Field, quick: bool) -> list[f.Figure]:
    made = []
    for count in (1, 50) if quick else _IN_FLIGHT:
        costs: dict[str, list[float]] = {}
        for _ in range(1 if quick else 3):
            for who, cost in field.turn(beside, count).items():
                costs.setdefault(who, []).append(cost)
        own = costs.pop("kvledger")
        if count == 1:
            first = own
        else:
            costs["own 1 in flight"] = first
        for peer, theirs in costs.items():
            made.append(f.figure_of(f"{count:,} in flight", "µs per request", own, peer, theirs))
    return made


def _readers(quick: bool) -> list[f.Figure]:
    made = []
    for count in (2,) if quick else _READERS:
        pairs = [watched(BEST[0], count) for _ in range(1 if quick else 3)]
        made.append(
            f.figure_of(
                f"{count} readers of the log",
                "µs per request",
                [with_readers for _, with_readers in pairs],
                "no reader",
                [alone for alone, _ in pairs],
            )
        )
    return made


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--quick"]
    try:
        sizes = [int(text.replace("_", "")) for text in arguments]
    except ValueError:
        sys.exit("usage: python -m benchmarks.growth [--quick] [BLOCKS ...]")
    f.show("growth", *figures("--quick" in sys.argv, sizes))


if __name__ == "__main__":
    main()
