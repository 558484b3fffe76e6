"""Prompts that are computed although they are cached: vLLM's scheduler on its own manager and on a ledger.

``python -m tests.vllm.duplicates [--streams N]`` with the interpreter of ``make vllm-environment``. Streams are drawn
from seeds: a few prompts, most of whole blocks, that come again and again and are computed together, in pools that are
short of room, with chunked prefill and decoding. Both managers have as many blocks. Printed are, summed over the
streams of a block size, the steps, preemptions and refusals (the scheduler asked for room and got none) and the tokens
that were not computed, and how many streams cost the ledger more of each.

Whatever is not computed any more changes who runs together with whom, so single streams differ in both directions. What
must hold in each is asserted at every request for room: the ledger can give all blocks that stand in no block table.
"""

from __future__ import annotations

import argparse
import os
import random
from typing import NamedTuple

from kvledger.adapters.vllm import LedgerScheduler
from statemachine.check import check
from tests.vllm.headless import Engine, Shape, scheduler_of

SIZES = (1, 4, 16)


class Cost(NamedTuple):
    """What a stream came to."""

    steps: int
    preemptions: int
    refusals: int
    hits: int


def shape_of(seed: int, block_size: int) -> Shape:
    """Sizes that leave a scheduler short of room."""
    draw = random.Random(seed)
    return Shape(
        blocks=draw.randrange(20, 60),
        block_size=block_size,
        sequences=draw.choice((4, 8, 16)),
        tokens=max(draw.choice((8, 16, 32)) * block_size, 16),
        longest=18 * block_size,
    )


def serve(seed: int, shape: Shape, *, ours: bool) -> Cost:
    """Run the stream of a seed. Raises :class:`AssertionError` where a request reads what is not its own."""
    draw = random.Random(seed)
    scheduler = scheduler_of(shape, LedgerScheduler if ours else None)
    manager = scheduler.kv_cache_manager
    refusals = 0
    allocate = manager.allocate_slots

    def counted(*arguments: object, **options: object) -> object:
        nonlocal refusals
        if ours:
            used = {block for request in manager.ledger.state.requests.values() for block in request.table}
            assert manager.ledger.available_blocks() == shape.blocks - 1 - len(used), "blocks are held that nobody uses"
        granted = allocate(*arguments, **options)
        refusals += granted is None
        return granted

    manager.allocate_slots = counted
    size = shape.block_size
    prompts = [[draw.randrange(50000) for _ in range(draw.randrange(2, 10) * size)] for _ in range(5)]
    engine = Engine(scheduler, shape, keep_steps=False)
    steps = 0
    for number in range(60):
        while draw.random() < 0.6:
            prompt = list(draw.choice(prompts))
            if draw.random() < 0.3:
                prompt += [draw.randrange(50000) for _ in range(draw.randrange(1, 2 * size + 1))]
            engine.add(f"r{number}-{len(engine.told.texts)}", prompt, draw.randrange(1, 5 * size + 2))
        engine.step()
        steps += 1
    while engine.step():
        steps += 1
    if ours:
        assert not check(manager.ledger.state) and manager.ledger.available_blocks() == shape.blocks - 1
    scheduler.shutdown()
    return Cost(steps, engine.told.preemptions, refusals, sum(engine.told.hits.values()))


def main() -> None:
    """Print a line per block size."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.duplicates", description=__doc__)
    parser.add_argument("--streams", type=int, default=60, help="streams per block size (default 60)")
    streams = parser.parse_args().streams
    os.environ["KVLEDGER_NAME"] = f"duplicates-{os.getpid()}"
    print("| block size | streams | | " + " | ".join(Cost._fields) + " |\n|" + "---|" * (3 + len(Cost._fields)))
    for size in SIZES:
        shapes = [shape_of(seed, size) for seed in range(streams)]
        theirs = [serve(seed, shape, ours=False) for seed, shape in enumerate(shapes)]
        ours = [serve(seed, shape, ours=True) for seed, shape in enumerate(shapes)]
        for name, costs in (("vLLM", theirs), ("kvledger", ours)):
            totals = [str(sum(column)) for column in zip(*costs, strict=True)]
            print(f"| {size} | {streams} | {name} | " + " | ".join(totals) + " |")
        signs = (1, 1, 1, -1)
        worse = [
            sum(sign * mine > sign * its for mine, its in zip(mines, itss, strict=True))
            for sign, mines, itss in zip(signs, zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
        ]
        print(f"| {size} | {streams} | streams worse for kvledger | " + " | ".join(map(str, worse)) + " |", flush=True)


if __name__ == "__main__":
    main()
