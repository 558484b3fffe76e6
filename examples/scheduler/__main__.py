"""``python -m examples.scheduler``: serves random requests with real workers, and compares every text."""

from __future__ import annotations

import os
import random
import sys
import time

from examples.scheduler.model import SLOT_BYTES, CountingModel, reference
from examples.scheduler.scheduler import Request, Scheduler
from kvledger import CacheConfig, CacheManager, HostPolicy, Item

SIZES = {"block_size": 4, "ranks": 2, "layers": 2, "block_bytes": 4 * SLOT_BYTES}


def traffic(count: int, seed: int) -> list[Request]:
    """Requests that share beginnings: plain ones, sessions, adapters, images."""
    rng = random.Random(seed)
    systems = [[rng.randrange(50) for _ in range(rng.randrange(8, 40))] for _ in range(6)]
    requests = []
    for number in range(count):
        prompt = [*rng.choice(systems), *(rng.randrange(50) for _ in range(rng.randrange(1, 24)))]
        request = Request(f"r{number}", prompt, rng.randrange(1, 12), lora=rng.choice(("", "", "", "adapter")))
        if rng.random() < 0.2:
            request.turns = [
                [rng.randrange(50) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 3))
            ]
        if rng.random() < 0.1:
            request.items = [Item(f"picture {rng.randrange(3)} ".encode() * 2, rng.randrange(len(prompt) - 5), 5)]
        requests.append(request)
    return requests


def expected(request: Request) -> list[int]:
    """The whole text of a request, by a model without a cache."""
    text = list(request.tokens)
    for turn in [*request.turns, []]:
        text += reference(text, request.length, request.items, request.lora)
        text += turn
    return text


def main(count: int = 500, seed: int = 1) -> int:
    """Serve, compare, and say what happened."""
    config = CacheConfig(device_blocks=200, host_blocks=200, host_policy=HostPolicy.EXCLUSIVE, **SIZES)  # type: ignore[arg-type]
    requests = traffic(count, seed)
    texts = [expected(request) for request in requests]
    begun = time.perf_counter()
    with CacheManager.create(f"scheduler-{os.getpid()}", config) as manager:
        scheduler = Scheduler(manager, CountingModel(config, manager.pools))
        for request in requests:
            scheduler.submit(request)
        while scheduler.waiting or scheduler.running:
            scheduler.step()
        stats = manager.stats()
    wrong = [request.id for request, text in zip(requests, texts) if request.tokens != text]
    print(f"{count} requests in {scheduler.number} steps and {time.perf_counter() - begun:.1f} s:")
    print(f"{stats['device_hit_blocks']} blocks found on the device, {stats['host_hit_blocks']} on the host,")
    print(f"{stats['requests'] - count} preemptions, {len(wrong)} wrong texts {wrong[:5]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
