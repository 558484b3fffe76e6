"""``python -m examples.scheduler [COUNT] [SEED] [LEDGER] [MARKS]``: serves random requests, and compares every text.

An engine as a process, with real workers: it starts warm where a ledger of that name was left, and stops in order when
it gets SIGTERM. A ledger that is named stays for the next start; without a name nothing stays. With a file for marks it
notes there what it does with its blocks.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

from examples.scheduler.model import SLOT_BYTES, CountingModel, MarkingModel, reference
from examples.scheduler.scheduler import Model, Request, Scheduler
from examples.scheduler.serve import drain
from kvledger import CacheConfig, CacheManager, HostPolicy, Item, Marks

GRACE_S = 20.0
"""What runs when the engine is told to stop has so long to end. Kubernetes kills 30 seconds after SIGTERM."""
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


def main(count: int = 500, seed: int = 1, *, ledger: str = "", marks: str = "") -> int:
    """Serve, compare, and say what happened."""
    config = CacheConfig(device_blocks=200, host_blocks=200, host_policy=HostPolicy.EXCLUSIVE, **SIZES)  # type: ignore[arg-type]
    stopping = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # a flag: what is being done ends as a whole
    requests = traffic(count, seed)
    texts = [expected(request) for request in requests]
    started = CacheManager.open_or_create(ledger or f"scheduler-{os.getpid()}", config, replace_dead=True)
    print(f"{'warm' if started.warm else 'new'}: ledger {started.manager.name}", flush=True)
    begun, before_it = time.perf_counter(), started.manager.stats()["requests"]
    try:
        manager = started.manager
        model: Model = CountingModel(config, manager.pools)
        if marks:
            noted = Marks(manager, marks)
            manager, model = noted.manager, MarkingModel(model, noted, config.block_size)
        scheduler = Scheduler(manager, model)
        for request in requests:
            scheduler.submit(request)
        while (scheduler.waiting or scheduler.running) and not stopping.is_set():
            scheduler.step()
        drain(scheduler, GRACE_S)
        stats = started.manager.stats()
        admissions = stats["requests"] - before_it
    finally:
        started.manager.close(keep=bool(ledger))
        signal.signal(signal.SIGTERM, before)
    served = [(request, text) for request, text in zip(requests, texts) if not request.failed]
    wrong = [request.id for request, text in served if request.tokens != text]
    print(f"{len(served)} of {count} requests in {scheduler.number} steps and {time.perf_counter() - begun:.1f} s:")
    print(f"{stats['device_hit_blocks']} blocks found on the device, {stats['host_hit_blocks']} on the host,")
    print(f"{admissions} admissions (who is preempted comes again), {len(wrong)} wrong texts {wrong[:5]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), ledger="".join(sys.argv[3:4]), marks="".join(sys.argv[4:5])))
