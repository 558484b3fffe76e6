"""What a decode step costs: one more token for each of 1 to 1,024 running requests.

``python -m benchmarks.decode [--quick]``: blocks of 16 tokens, prompts of about 1,000 tokens whose ends are spread over
a block, so that a sixteenth of them begins a block in each step. kvledger (one allocation per step) and vLLM (one call
per request) publish blocks as they fill; SGLang's allocator takes the whole batch and publishes nothing before the end,
so beside it kvledger does the same.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from benchmarks import figures as f
from benchmarks.field import Field, Pauses
from benchmarks.peers import BEST, Entry, make

_ENTRIES = (*BEST, Entry("kvledger, at the end", "benchmarks.peers.ledger", "int32, at the end", ""))
_BLOCK = 16
_PROMPT = 1000
_STEPS = 64
_RUNNING = (1, 4, 16, 64, 256, 1024)


def steps(entry: Entry, running: int) -> tuple[float, float]:
    """In the contestant's process: mean µs of a step, and the longest."""
    rng = np.random.default_rng(0)
    blocks = running * (_PROMPT + 2 * _STEPS) // _BLOCK + 2 * running + 64
    contestant = make(entry, _BLOCK, blocks, longest=2048, requests=running)
    handles = []
    for number in range(running):
        prompt = rng.integers(0, 128_000, _PROMPT + number % _BLOCK, np.int32)
        handle = contestant.receive(str(number), prompt, rng.integers(0, 128_000, 2 * _STEPS, np.int32))
        contestant.admit(handle)
        contestant.cache(handle)
        handles.append(handle)
    for _ in range(_BLOCK):
        contestant.step(handles)
    times = []
    with Pauses():
        for _ in range(_STEPS):
            begun = time.perf_counter_ns()
            contestant.step(handles)
            times.append(time.perf_counter_ns() - begun)
    contestant.close()
    return statistics.mean(times) / 1e3, max(times) / 1e3


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """One figure per number of running requests and peer."""
    made = []
    with Field(_ENTRIES) as field:
        for running in (1, 64) if quick else _RUNNING:
            costs: dict[str, list[tuple[float, float]]] = {}
            for _ in range(1 if quick else 5):
                for who, result in field.turn(steps, running).items():
                    costs.setdefault(who, []).append(result)
            publishing, at_the_end = costs.pop("kvledger"), costs.pop("kvledger, at the end")
            name = f"{running:,} running"
            for peer, theirs in costs.items():
                own = at_the_end if peer.startswith("SGLang") else publishing
                made.append(
                    f.figure_of(
                        f"{name}, published {'at the end' if own is at_the_end else 'as blocks fill'}",
                        "µs per step",
                        [mean for mean, _ in own],
                        peer,
                        [mean for mean, _ in theirs],
                        details={"longest_us": [statistics.median(most for _, most in who) for who in (own, theirs)]},
                    )
                )
            if not costs:
                means = [[mean for mean, _ in who] for who in (publishing, at_the_end)]
                made.append(
                    f.figure_of(
                        f"{name}, published as blocks fill", "µs per step", means[0], "own at the end", means[1]
                    )
                )
        return made, field.skipped


if __name__ == "__main__":
    f.alone("decode steps", figures)
