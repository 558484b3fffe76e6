"""The scheduler that people copy from: thousands of requests, and every token of every text is right."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.scheduler import scheduler as file
from examples.scheduler.__main__ import SIZES, expected, traffic
from examples.scheduler.model import CountingModel
from examples.scheduler.scheduler import Request, Scheduler
from examples.scheduler.serve import drain, generate, serve
from ipc.ownership import objects_of, remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy, LogReader
from statemachine.check import check
from statemachine.events import (
    BlocksEvicted,
    EpochStarted,
    EvictReason,
    RequestMatched,
    RequestReleased,
    WorkerJoined,
)
from statemachine.records import codec
from tests.manager.test_manager import replays
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]

HOST = {"host_blocks": 120, "host_policy": HostPolicy.EXCLUSIVE}


@contextmanager
def engine(**settings: Any) -> Iterator[Scheduler]:
    config = CacheConfig(**{"device_blocks": 120, **SIZES, **settings})
    with CacheManager.create(f"scheduler-{os.getpid()}", config) as manager:
        yield Scheduler(manager, CountingModel(config, manager.pools))
        while manager.state.transfers:
            manager.poll()
        assert not manager.state.requests and not check(manager.state) and replays(manager)


def served(scheduler: Scheduler, requests: list[Request]) -> None:
    for request in requests:
        scheduler.submit(request)
    while scheduler.waiting or scheduler.running:
        scheduler.step()


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize(("settings", "count"), [(HOST, 1000), ({}, 1000)], ids=["host tier", "device only"])
def test_thousands_of_requests(settings: dict[str, Any], count: int) -> None:
    requests = traffic(count, seed=count)
    texts = [expected(request) for request in requests]
    with engine(**settings) as scheduler:
        served(scheduler, requests)
        stats = scheduler.manager.stats()
    assert [request.tokens for request in requests] == texts and not any(request.failed for request in requests)
    assert stats["requests"] > count, "somebody was preempted"
    assert stats["device_hit_blocks"] > 1000
    assert bool(stats["swapped_in_blocks"]) == bool(settings)


class Watching(CountingModel):
    """Counts what a scheduler has its model do."""

    def __init__(self, manager: CacheManager) -> None:
        super().__init__(manager.config, manager.pools)
        self.tokens = self.chunks = self.right = self.wrong = 0

    def forward(self, request: Request, start: int, stop: int, table: Any) -> list[int]:
        known, drafts = len(request.tokens), request.drafts
        self.tokens += stop - start
        self.chunks += stop < known
        following = super().forward(request, start, stop, table)
        if stop > known:
            right = [draft == token for draft, token in zip(drafts, following[known - 1 - start :])]
            self.right += sum(right)
            self.wrong += len(right) - sum(right)
        return following


def test_all_that_it_is_for_really_happens() -> None:
    """A budget that no step exceeds, chunks, drafts right and wrong, turns, adapters, images, two ranks, both tiers."""
    requests = traffic(300, seed=7)
    texts = [expected(request) for request in requests]
    assert sum(len(request.turns) for request in requests) > 20
    assert sum(bool(request.items) for request in requests) > 10
    with engine(device_blocks=60, host_blocks=120, host_policy=HostPolicy.EXCLUSIVE) as scheduler:
        manager = scheduler.manager
        model = scheduler.model = Watching(manager)
        threads = [threading.Thread(target=scheduler.submit, args=(request,)) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        most, spaces = 0, set()
        while scheduler.waiting or scheduler.running:
            model.tokens = 0
            scheduler.step()
            most = max(most, model.tokens)
            spaces |= {request.namespace for request in manager.state.requests.values()}
        stats = manager.stats()
    assert [request.tokens for request in requests] == texts
    assert 32 < most <= scheduler.budget
    assert model.chunks > 5 and model.right > 100 and model.wrong > 100
    assert len(spaces) == 2, "one adapter, and none"
    assert stats["requests"] > len(requests), "somebody was preempted"
    assert stats["swapped_out_blocks"] > 100 and stats["swapped_in_blocks"] > 100 and manager.config.ranks == 2


def test_one_wrong_byte_is_wrong_text() -> None:
    requests = traffic(60, seed=3)
    texts = [expected(request) for request in requests]
    with engine() as scheduler:
        served(scheduler, requests[:30])
        assert [request.tokens for request in requests[:30]] == texts[:30]
        for pools in scheduler.manager.pools:
            pools.device[0, :, 0] ^= 1  # one byte of each block, in one layer
        served(scheduler, requests[30:])
    assert [request.tokens for request in requests[30:]] != texts[30:]


def test_who_gives_up_fails_nobody_else() -> None:
    requests = traffic(200, seed=4)
    texts = [expected(request) for request in requests]
    with engine() as scheduler:
        for request in requests:
            scheduler.submit(request)
        too_long = Request("too long", [1] * 4 * 121, 5)
        scheduler.submit(too_long)
        number = 0
        while scheduler.waiting or scheduler.running:
            scheduler.step()
            number += 1
            if number % 3 == 0:
                thread = threading.Thread(target=scheduler.abort, args=(requests[number % len(requests)],))
                thread.start()
                thread.join()
    assert "too small" in too_long.failed and all(request.done.is_set() for request in requests)
    assert any(request.failed for request in requests) and not all(request.failed for request in requests)
    for request, text in zip(requests, texts):
        assert request.failed or request.tokens == text


def test_any_number_of_tasks_ask() -> None:
    requests = traffic(60, seed=5)
    texts = [expected(request) for request in requests]

    async def main(scheduler: Scheduler) -> list[Any]:
        serving = asyncio.create_task(serve(scheduler))
        tasks = [asyncio.create_task(generate(request, scheduler)) for request in requests]
        await asyncio.sleep(0)
        tasks[7].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        while scheduler.running or scheduler.waiting:
            await asyncio.sleep(0)
        serving.cancel()
        return found

    with engine() as scheduler:
        found = asyncio.run(main(scheduler))
    assert isinstance(found.pop(7), asyncio.CancelledError)
    assert found == texts[:7] + texts[8:]


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The engine as a process of its own, when it has begun to serve."""
    command = [sys.executable, "-m", "examples.scheduler", *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as engine:
        try:
            yield engine
        finally:
            engine.kill()


def events_of(name: str) -> list[Any]:
    reader = LogReader(name)
    try:
        return [
            codec.decode(each.kind, each.subject, each.args, each.payload)
            for records in iter(reader.poll, [])
            for each in records
        ]
    finally:
        reader.close()


@pytest.fixture
def name() -> Iterator[str]:
    name = f"stopping-{os.getpid()}"
    yield name
    remove_objects(name)


@pytest.mark.parametrize("kept", [True, False], ids=["a successor comes", "it ends here"])
def test_sigterm_ends_an_engine_in_order(kept: bool, name: str) -> None:
    """What runs is served, what waits is given back, and a successor finds all that was cached, or nobody anything."""
    with process(5000, 1, *([name] if kept else [])) as engine:
        assert engine.stdout is not None
        ledger = engine.stdout.readline().removeprefix("new: ledger ").strip()
        wait_until("requests have ended", lambda: RequestReleased in map(type, events_of(ledger)))
        engine.send_signal(signal.SIGTERM)
        engine.send_signal(signal.SIGTERM)  # who asks twice hurries nobody
        said, errors = engine.communicate(timeout=PATIENCE_S)
    assert engine.returncode == 0 and not errors and "0 wrong texts" in said
    served = int(said.split(" of ")[0])
    assert 0 < served < 5000
    assert bool(objects_of(ledger)) == kept
    if kept:
        with process(20, 1, name) as engine:  # the same prompts, so that the first of them are cached
            said, _ = engine.communicate(timeout=PATIENCE_S)
        assert engine.returncode == 0 and said.startswith("warm: ledger")
        told = events_of(name)
        begun = next(at for at, event in enumerate(told) if type(event) is EpochStarted)
        assert any(type(event) is RequestMatched and event.device_blocks + event.host_blocks for event in told[begun:])
        assert not any(type(event) is BlocksEvicted and event.reason == EvictReason.UNTRUSTED for event in told)
        assert sum(type(event) is WorkerJoined for event in told) == 4, "two workers of each of the two engines"


def test_what_does_not_end_in_time_is_aborted() -> None:
    with engine() as scheduler:
        requests = traffic(100, seed=6)
        for request in requests:
            scheduler.submit(request)
        while len(scheduler.running) < 5:
            scheduler.step()
        running = list(scheduler.running.values())
        drain(scheduler, seconds=0)
        assert all(request.failed == "aborted" for request in running if request.answered < request.length)
        assert all(request.failed for request in requests[-50:]) and all(request.done.is_set() for request in requests)


def test_it_stays_short_enough_to_copy() -> None:
    text = Path(file.__file__).read_text()
    assert len(text.splitlines()) <= 150
    assert "block" not in text.replace("BlockTable", "").replace("block_table", "").split("class Model")[1]
