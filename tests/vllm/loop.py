"""What a scheduler's step costs, with vLLM's own manager, on a ledger, recorded: ``python -m tests.vllm.loop``.

Times ``schedule`` and ``update_from_output`` alone (time of their thread), the three in turn, and prints medians per
step. Prompts share their first half; the runner answers without looking at memory.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from kvledger.adapters.vllm import LedgerScheduler, record
from tests.vllm.headless import Engine, Shape, scheduler_of

CASES = ((1, 200, 200), (8, 500, 100), (32, 500, 100), (128, 500, 60), (512, 300, 40), (32, 4000, 60))
"""Running requests, tokens of a prompt, generated tokens."""


class Quick(Engine):
    """Answers at once."""

    def _compute(self, name: str, count: int, drafts: list[int]) -> list[int]:
        tokens = self.tokens[name]
        if self.computed[name] + count < len(tokens):
            return []
        tokens.append(len(tokens))
        return [len(tokens)]


def step_us(
    kind: Callable[..., Any] | None, running: int, prompt: int, output: int, *, recorded: bool = False
) -> float:
    """Microseconds of processor time of the scheduler's thread per step."""
    blocks = running * (prompt + output) // 16 + 200
    shape = Shape(blocks=blocks, sequences=running, tokens=8192, longest=32768)
    scheduler = scheduler_of(shape, kind)
    if recorded:
        record(scheduler, os.environ["KVLEDGER_NAME"])
    engine = Quick(scheduler, shape, keep_steps=False)
    draw = random.Random(1)
    shared = [draw.randrange(50000) for _ in range(prompt // 2)]
    for number in range(2 * running):
        engine.add(f"r{number}", shared + [draw.randrange(50000) for _ in range(prompt // 2)], output)
    spent = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def caller(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            begun = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent += time.thread_time() - begun

        return caller

    scheduler.schedule, scheduler.update_from_output = timed(scheduler.schedule), timed(scheduler.update_from_output)
    steps = 1
    while engine.step():
        steps += 1
    scheduler.shutdown()
    return spent / steps * 1e6


def main() -> None:
    """Print a row per case."""
    os.environ.setdefault("KVLEDGER_NAME", f"loop-{os.getpid()}")
    for case in CASES:
        rows = [
            [step_us(None, *case), step_us(LedgerScheduler, *case), step_us(None, *case, recorded=True)]
            for _ in range(5)
        ]
        theirs, ours, recorded = (statistics.median(row[which] for row in rows) for which in range(3))
        print(
            f"| {case[0]} running, prompts of {case[1]} | {theirs:,.0f} µs | {ours:,.0f} µs | "
            f"{statistics.median(row[1] / row[0] for row in rows):.2f} | {recorded:,.0f} µs | "
            f"{statistics.median(row[2] / row[0] for row in rows):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
