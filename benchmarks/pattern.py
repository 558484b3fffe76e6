"""What a scheduler's step costs, with everything that happens in it, beside vLLM's and SGLang's managers.

``python -m benchmarks.pattern [--quick]``: 1 to 1,024 requests run. Each step gives each of them one more token, ends
those that have all, and begins as many new ones; prompts are lists of about 1,000 tokens, half of them shared, blocks
have 16. Everybody publishes what it can as its own engine does. kvledger is called in the three ways an engine may
choose: batches of all requests in one transaction per step, one call per request as vLLM's scheduler makes them in one
transaction, and the same without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from benchmarks import figures as f
from benchmarks.field import Field, Pauses
from benchmarks.peers import ENTRIES, Contestant, Entry, make

_TOKENS = "benchmarks.peers.tokens"
BATCHES, IN_A_STEP, ONE_BY_ONE = "batches", "one by one in a step", "one by one"
_OURS = (
    Entry(BATCHES, _TOKENS, "batches, in a step", ""),
    Entry(IN_A_STEP, _TOKENS, "one by one, in a step", ""),
    Entry(ONE_BY_ONE, _TOKENS, "one by one", ""),
    Entry(f"{BATCHES}, interpreted", _TOKENS, "batches, in a step", ""),
)
_PEERS = tuple(entry for entry in ENTRIES if entry.name in ("vLLM xxhash", "SGLang Rust, list"))
_GOALS = {BATCHES: 8.0, f"{BATCHES}, interpreted": 1.0}
"""Beside every peer. Request by request is the pattern of vLLM's scheduler: at least as fast as its own manager."""
_BLOCK = 16
_PROMPT = 1000
_OUTPUT = 64
_STEPS = 96
_RUNNING = (1, 4, 16, 64, 256, 1024)
_WITHOUT_BORDER = 13
"""So many steps cross no border after a prompt that ends one token behind one."""


class Lap(NamedTuple):
    """One contestant, once."""

    steps: list[float]
    """µs by step."""
    hits: int
    """Blocks."""
    without_border: float
    """µs per running request, median of the steps in which nobody crosses a block border, begins or ends."""


class _Traffic:
    """Requests in order, the same for everybody; making one is not timed."""

    def __init__(self, contestant: Contestant) -> None:
        self._contestant = contestant
        self._rng = np.random.default_rng(0)
        self._shared = [self._text(_PROMPT // 2) for _ in range(8)]
        self._count = 0

    def _text(self, length: int) -> np.ndarray:
        return self._rng.integers(0, 128_000, length, np.int32)

    def next(self, output: int, length: int | None = None) -> Any:
        """A request that generates so many tokens."""
        number, self._count = self._count, self._count + 1
        own = self._text((length or _PROMPT + number % _BLOCK) - _PROMPT // 2)
        prompt = np.concatenate([self._shared[number % len(self._shared)], own])
        return self._contestant.receive(f"request-{number}", prompt, self._text(output))


def lap(entry: Entry, running: int) -> Lap:
    """In the contestant's process: a fresh manager, its first requests at different places of their answers."""
    arrivals = running + running * (_STEPS + _BLOCK) // _OUTPUT + 2
    blocks = (arrivals + running) * ((_PROMPT + _OUTPUT) // _BLOCK + 3) + 64
    contestant = make(entry, _BLOCK, blocks, longest=2048, requests=2 * running + 8)
    turn: Callable[[int], AbstractContextManager[None]] = getattr(contestant, "turn", lambda number: nullcontext())
    try:
        traffic = _Traffic(contestant)
        left: dict[Any, int] = {}
        hits = 0
        for number in range(running):
            output = 1 + number * _OUTPUT // running if running > 1 else _OUTPUT
            handle = traffic.next(output)
            hits += contestant.admit(handle)
            contestant.cache(handle)
            left[handle] = output
        times = []
        with Pauses():
            for number in range(_STEPS + _BLOCK):
                ended = [handle for handle, tokens in left.items() if not tokens]
                begun = [traffic.next(_OUTPUT) for _ in ended]
                handles = [handle for handle, tokens in left.items() if tokens] if ended else [*left]
                start = time.perf_counter_ns()
                with turn(number):
                    for handle in ended:
                        contestant.finish(handle)
                    if handles:
                        contestant.step(handles)
                    for handle in begun:
                        hits += contestant.admit(handle)
                        contestant.cache(handle)
                times.append((time.perf_counter_ns() - start) / 1e3)
                left = {handle: left[handle] - 1 for handle in handles} | dict.fromkeys(begun, _OUTPUT)
        for handle in left:
            contestant.finish(handle)
        return Lap(times[_BLOCK:], hits, _without_border(contestant, traffic, turn, running))
    finally:
        contestant.close()


def _without_border(
    contestant: Contestant, traffic: _Traffic, turn: Callable[[int], AbstractContextManager[None]], running: int
) -> float:
    handles = [traffic.next(_WITHOUT_BORDER, _PROMPT // _BLOCK * _BLOCK + 1) for _ in range(running)]
    for handle in handles:
        contestant.admit(handle)
        contestant.cache(handle)
    times = []
    with Pauses():
        for number in range(_WITHOUT_BORDER):
            start = time.perf_counter_ns()
            with turn(number):
                contestant.step(handles)
            times.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(times) / running


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """By number of running requests: each of our ways beside each peer, and steps in which no border is crossed."""
    made: list[f.Figure] = []
    with Field((*_OURS, *_PEERS)) as field:
        for running in (1, 64) if quick else _RUNNING:
            laps: dict[str, list[Lap]] = {}
            for _ in range(1 if quick else 5 if running <= 64 else 3):
                for who, result in field.turn(lap, running).items():
                    laps.setdefault(who, []).append(result)
            made += _figures_of(running, laps)
        return made, field.skipped


def _figures_of(running: int, laps: dict[str, list[Lap]]) -> list[f.Figure]:
    ways = [entry.name for entry in _OURS]
    peers = [peer for peer in laps if peer not in ways and len(laps[peer]) == len(laps[BATCHES])]
    made = []
    for way in ways:
        for peer in peers or [ONE_BY_ONE]:
            goal = _GOALS.get(way)
            if peer.startswith("vLLM") and way == IN_A_STEP:
                goal = 1.0
            made.append(_figure(running, way, laps[way], peer, laps[peer], goal if peers else None))
    against = peers[0] if peers else ONE_BY_ONE
    for way in (BATCHES, IN_A_STEP):
        made.append(
            f.figure_of(
                f"{running:,} running, {way}, no border crossed",
                "µs per running request",
                [each.without_border for each in laps[way]],
                against,
                [each.without_border for each in laps[against]],
                at_most=1.0 if way == BATCHES else None,
            )
        )
    return made


def _figure(running: int, way: str, ours: list[Lap], peer: str, theirs: list[Lap], goal: float | None) -> f.Figure:
    return f.figure_of(
        f"{running:,} running, {way}",
        "µs per step",
        [statistics.mean(each.steps) for each in ours],
        peer,
        [statistics.mean(each.steps) for each in theirs],
        least_ratio=goal,
        details={"ours": _details(ours), "theirs": _details(theirs)},
    )


def _details(laps: list[Lap]) -> dict[str, Any]:
    steps = [step for each in laps for step in each.steps]
    return {
        "p50_us": statistics.median(steps),
        "p99_us": f.quantile(steps, 0.99),
        "longest_us": statistics.median(max(each.steps) for each in laps),
        "hit_blocks": laps[0].hits,
    }


if __name__ == "__main__":
    f.alone("a scheduler's pattern", figures)
