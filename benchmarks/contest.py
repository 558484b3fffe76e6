"""What a request costs over its whole life, beside vLLM and SGLang, on five streams.

``python -m benchmarks.contest [--quick] [STREAM ...]``: chat, mixed, agentic, one-shot, 128 k (see
:mod:`benchmarks.streams`), blocks of 16 and 64 tokens, prompts in the type that each manager likes best and as lists.
Everything a manager does counts on all sides: hashes, eviction, block tables, and here validation and the log. The
contestants take turns, repetition by repetition. Whether they hit the same blocks is checked and told.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from benchmarks import figures as f
from benchmarks.field import Field, Pauses
from benchmarks.peers import Contestant, Entry, make
from benchmarks.streams import STREAMS, Stream

PHASES = ("admit", "cache", "grow", "finish")
SAME = "the same blocks"
_PEERS = 5.0
_VLLM_16 = 10.0
_LONG = 20.0


class Lap(NamedTuple):
    """One contestant on one stream, once."""

    costs: list[float]
    """µs by request, its whole life; a step of several requests is shared among them."""
    phases: dict[str, float]
    """µs per request by phase."""
    hits: list[int]
    """Blocks by request."""
    longest_ms: float
    """The longest single call."""
    collection_ms: float
    """The longest garbage collection."""

    @property
    def mean(self) -> float:
        """µs per request."""
        return sum(self.costs) / len(self.costs)


def drive(
    contestant: Contestant, stream: Stream, block_size: int
) -> tuple[list[float], dict[str, float], list[int], float]:
    """Put the stream through a contestant; returns costs, phases, hits and the longest call, in ns."""
    count = len(stream.requests)
    costs, hits = [0.0] * count, [0] * count
    phases = dict.fromkeys(PHASES, 0.0)
    longest = 0.0
    running: dict[int, list[Any]] = {}  # handle, blocks still to grow
    clock = time.perf_counter_ns

    def spent(phase: str, took: int, whose: list[int]) -> None:
        nonlocal longest
        phases[phase] += took
        longest = max(longest, took)
        for number in whose:
            costs[number] += took / len(whose)

    def step() -> None:
        growing = [number for number, (_, left) in running.items() if left]
        if growing:
            handles = [running[number][0] for number in growing]
            begun = clock()
            contestant.grow(handles)
            spent("grow", clock() - begun, growing)
            for number in growing:
                running[number][1] -= 1
        for number in [number for number, (_, left) in running.items() if not left]:
            handle = running.pop(number)[0]
            begun = clock()
            contestant.finish(handle)
            spent("finish", clock() - begun, [number])

    for number, (prompt, output, after) in enumerate(stream.requests):
        while len(running) >= stream.in_flight or after in running:
            step()
        handle = contestant.receive(f"request-{number}", prompt, output)
        begun = clock()
        hits[number] = contestant.admit(handle)
        admitted = clock()
        contestant.cache(handle)
        spent("cache", clock() - admitted, [number])
        spent("admit", admitted - begun, [number])
        running[number] = [handle, -(-(len(prompt) + len(output)) // block_size) - -(-len(prompt) // block_size)]
    while running:
        step()
    return costs, phases, hits, longest


def lap(entry: Entry, name: str, block_size: int, quick: bool) -> Lap:
    """In the contestant's process: a fresh manager, the whole stream."""
    stream = _stream(name, block_size, quick)
    contestant = make(entry, block_size, stream.blocks)
    try:
        with Pauses() as pauses:
            costs, phases, hits, longest = drive(contestant, stream, block_size)
    finally:
        contestant.close()
    count = len(stream.requests)
    return Lap(
        [cost / 1e3 for cost in costs],
        {phase: total / count / 1e3 for phase, total in phases.items()},
        hits,
        longest / 1e6,
        pauses.longest_ms,
    )


@cache
def _stream(name: str, block_size: int, quick: bool) -> Stream:
    return STREAMS[name](block_size, quick)


def _figure(name: str, ours: list[Lap], peer: str, theirs: list[Lap], goal: float | None) -> f.Figure:
    return f.figure_of(
        name,
        "µs per request",
        [lap.mean for lap in ours],
        peer,
        [lap.mean for lap in theirs],
        least_ratio=goal,
        details={"ours": _details(ours), "theirs": _details(theirs), "hits": _agreement(ours[0], theirs[0])},
    )


def _details(laps: list[Lap]) -> dict[str, Any]:
    costs = [cost for lap in laps for cost in lap.costs]
    return {
        "p50_us": statistics.median(costs),
        "p99_us": f.quantile(costs, 0.99),
        "longest_call_ms": statistics.median(lap.longest_ms for lap in laps),
        "longest_collection_ms": statistics.median(lap.collection_ms for lap in laps),
        "hit_blocks": sum(laps[0].hits),
        "phases_us": {phase: statistics.median(lap.phases[phase] for lap in laps) for phase in PHASES},
    }


def _agreement(ours: Lap, theirs: Lap) -> str:
    """Do both find the same blocks, request by request?"""
    differ = sum(own != other for own, other in zip(ours.hits, theirs.hits))
    if not differ:
        return SAME
    return f"{differ} of {len(ours.hits)} requests differ, {sum(theirs.hits) / max(sum(ours.hits), 1) - 1:+.1%} blocks"


def figures(quick: bool, names: Sequence[str] = ()) -> tuple[list[f.Figure], list[str]]:
    """All figures of these streams (default: of all), and who was skipped."""
    made: list[f.Figure] = []
    own_means: dict[tuple[str, int], list[float]] = {}
    with Field() as field:
        for block_size in (16,) if quick else (16, 64):
            for name in names or STREAMS:
                laps: dict[str, list[Lap]] = {}
                for _ in range(1 if quick else 5):
                    for who, result in field.turn(lap, name, block_size, quick).items():
                        laps.setdefault(who, []).append(result)
                own_means[name, block_size] = [lap.mean for lap in laps["kvledger"]]
                made += _figures_of(f"{name}, block {block_size}", name, block_size, laps)
        for block_size in {size for _, size in own_means}:
            if ("agentic", block_size) in own_means and ("one-shot", block_size) in own_means:
                agentic, one_shot = own_means["agentic", block_size], own_means["one-shot", block_size]
                made.append(
                    f.figure_of(
                        f"agentic, block {block_size}, beside one-shot",
                        "µs per request",
                        agentic,
                        "own one-shot",
                        one_shot,
                        least_ratio=0.5,
                    )
                )
        return made, field.skipped


def _figures_of(title: str, stream: str, block_size: int, laps: dict[str, list[Lap]]) -> list[f.Figure]:
    made = []
    for peer, theirs in laps.items():
        if peer.startswith("kvledger") or len(theirs) < len(laps["kvledger"]):
            continue
        goal = _LONG if stream == "128 k" else _VLLM_16 if block_size == 16 and peer.startswith("vLLM") else _PEERS
        if not peer.endswith("list"):
            made.append(_figure(title, laps["kvledger"], peer, theirs, goal))
        if peer.endswith("list") or peer == "vLLM xxhash":
            made.append(_figure(f"{title}, list", laps["kvledger, list"], peer, theirs, None))
    made.append(_figure(f"{title}, list", laps["kvledger, list"], "own int32", laps["kvledger"], None))
    made.append(_figure(title, laps["kvledger"], "own interpreted", laps["kvledger, interpreted"], None))
    return made


def main() -> None:
    names = [argument for argument in sys.argv[1:] if argument != "--quick"]
    if not set(names) <= set(STREAMS):
        sys.exit(f"a stream is one of {', '.join(STREAMS)}, not {', '.join(set(names) - set(STREAMS))}")
    made, skipped = figures("--quick" in sys.argv, names)
    f.show("whole life of a request", made, skipped)
    told = set()
    for one in made:
        for whose, details in one.details.items():
            who = f"{one.name}, {'kvledger' if whose == 'ours' else one.against}"
            if who in told:
                continue
            told.add(who)
            if whose == "hits":
                if details != SAME:
                    print(f"{one.name}, {one.against}: {details}")
            else:
                phases = ", ".join(f"{phase} {us:.0f}" for phase, us in details["phases_us"].items())
                print(
                    f"{who}: p50 {details['p50_us']:.0f} µs, p99 {details['p99_us']:.0f} µs, "
                    f"longest call {details['longest_call_ms']:.2f} ms, "
                    f"collection {details['longest_collection_ms']:.2f} ms, {details['hit_blocks']:,} hits; {phases}"
                )


if __name__ == "__main__":
    main()
