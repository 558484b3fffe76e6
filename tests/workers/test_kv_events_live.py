"""``kvledger events`` beside a real router: late, killed and started again; nothing is lost, nothing told twice."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq

from kvledger import CacheConfig, CacheManager, HostPolicy, Item, namespace_key
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.test_kv_events import BLOCK, Router, traffic
from workers.followers.events import Batches

CONFIG = CacheConfig(block_size=BLOCK, device_blocks=60, host_blocks=40, host_policy=HostPolicy.EXCLUSIVE)


@pytest.fixture
def name() -> str:
    return f"kvlive-{os.getpid()}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def publishing(name: str, ports: tuple[int, int]) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "kvledger.cli", "events", name, "--endpoint", f"tcp://127.0.0.1:{ports[0]}"]
    command += ["--replay-endpoint", f"tcp://127.0.0.1:{ports[1]}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for port in ports:
            wait_until(f"port {port} is bound", lambda port=port: not socket.socket().connect_ex(("127.0.0.1", port)))
        yield process
    finally:
        process.kill()
        process.communicate()


class Subscriber:
    """A router of our own, over the real sockets: takes what comes, and asks for what is missing."""

    def __init__(self, ports: tuple[int, int]) -> None:
        self.router = Router()
        self.asked = 0
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.SUB)
        self._live.subscribe(b"")
        self._live.connect(f"tcp://127.0.0.1:{ports[0]}")
        self._ports = ports

    def poll(self) -> None:
        while self._live.poll(20):
            _, number, payload = self._live.recv_multipart()
            self._take(int.from_bytes(number, "big"), payload)

    def _take(self, number: int, payload: bytes) -> None:
        if number > self.router.number + 1:
            self._ask(self.router.number + 1)
        if number == self.router.number + 1:
            self.router.take(number, payload)

    def _ask(self, first: int) -> None:
        self.asked += 1
        with self._context.socket(zmq.DEALER) as replay:
            replay.linger = 0
            replay.connect(f"tcp://127.0.0.1:{self._ports[1]}")
            replay.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                assert replay.poll(int(PATIENCE_S * 1000)), "no answer to a request for missed batches"
                _, _, number, payload = replay.recv_multipart()
                if number == (-1).to_bytes(8, "big", signed=True):
                    return
                self.router.take(int.from_bytes(number, "big"), payload)

    def close(self) -> None:
        self._context.destroy(linger=0)


def test_late_killed_and_restarted(name: str) -> None:
    """The publisher is killed, the engine takes its ledger over; a subscriber that was there knows it all."""
    ports = (free_port(), free_port())
    manager = CacheManager.create(name, CONFIG)
    prompts: list[list[int]] = []

    def serve(seed: int) -> None:
        prompts.extend(traffic(manager, seed, 150))

    def agrees() -> bool:
        subscriber.poll()
        if subscriber.router.number != manager.next_sequence - 2:
            manager.take_digest()  # something live: a gap is seen when something comes after it
            return False
        return all(
            subscriber.router.score(prompt) == manager.peek(prompt, max_blocks=len(prompt)) for prompt in prompts
        )

    try:
        serve(1)
        with publishing(name, ports) as first:
            subscriber = Subscriber(ports)
            wait_until("a late subscriber knows what was cached before it came", agrees)
            assert subscriber.asked == 1
            serve(2)
            wait_until("it follows", agrees)
            first.kill()
            first.wait()
            serve(3)
        manager.close(keep=True)
        manager = CacheManager.open(name)
        serve(4)
        with publishing(name, ports) as second:
            wait_until("it knows what happened while nobody published", agrees)
            manager.close()
            wait_until(
                "it knows that everything is gone", lambda: (subscriber.poll(), not subscriber.router.media["GPU"])[1]
            )
            out, _ = second.communicate(timeout=PATIENCE_S)
            assert second.returncode == 0 and "batches published" in out
    finally:
        manager.close()
        subscriber.close()


def test_dynamos_router_scores_as_the_ledger_does(name: str) -> None:
    dynamo = pytest.importorskip("dynamo._core")
    ports = (free_port(), free_port())

    async def asked(service: Any, prompt: list[int]) -> tuple[int, int]:
        answer = await service.overlap_scores({"model_name": "m", "token_ids": prompt})
        found = [worker for worker in answer["workers"] if worker["worker_id"] == 1]
        if not found:
            return 0, 0
        return found[0]["device_blocks"], found[0]["host_pinned_blocks"]

    async def story() -> None:
        service = dynamo.SelectionService(indexer_threads=1)
        worker = {
            "worker_id": 1,
            "model_name": "m",
            "block_size": BLOCK,
            "endpoint": "http://127.0.0.1:9",
            "kv_events_endpoints": {0: f"tcp://127.0.0.1:{ports[0]}"},
            "replay_endpoint": f"tcp://127.0.0.1:{ports[1]}",
        }
        prompts = [*traffic(manager, 1, 200)]
        with publishing(name, ports) as first:
            await service.upsert_worker(worker)
            await eventually("a late router agrees", lambda: agrees(service, prompts))
            prompts += traffic(manager, 2, 200)
            await eventually("it follows", lambda: agrees(service, prompts))
            first.kill()
            prompts += traffic(manager, 3, 100)
        with publishing(name, ports):
            await eventually("it recovers from the publisher's death", lambda: agrees(service, prompts))
        service.shutdown()

    async def agrees(service: Any, prompts: list[list[int]]) -> bool:
        manager.take_digest()
        for prompt in prompts[-40:]:
            device, host = manager.peek(prompt, max_blocks=len(prompt))
            found = await asked(service, prompt)
            # Dynamo's count of the host includes what is on the device before it
            if found[0] != device or max(found) != device + host:
                return False
        return True

    async def eventually(what: str, seen: Callable[[], Any]) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not await seen():
            assert asyncio.get_running_loop().time() < deadline, f"never came: {what}"
            await asyncio.sleep(0.05)

    with CacheManager.create(name, CONFIG) as manager:
        asyncio.run(story())


def test_what_has_no_name_outside_is_not_announced(name: str) -> None:
    """Images, salts and what follows them; an adapter's blocks carry its name."""
    prompt = list(range(24))
    with CacheManager.create(name, CONFIG) as manager:
        router, batches = Router(), Batches(name, since=0)

        def serve(request: str, **options: Any) -> None:
            manager.admit(request, prompt, **options)
            manager.cache(request)
            manager.release(request)
            for number, payload in batches.poll():
                router.take(number, payload)

        serve("image", items=[Item(bytes(range(32)), 9, 2)])
        assert router.score(prompt) == (2, 0) and len(router.media["GPU"]) == 2
        serve("salted", namespace=namespace_key(salt="tenant"))
        serve("both", namespace=namespace_key(lora="poet", salt="tenant"))
        assert len(router.media["GPU"]) == 2
        serve("poet", namespace=namespace_key(lora="poet"))
        assert router.score(prompt, "poet") == (6, 0) and router.score(prompt) == (2, 0)
        batches.close()


def test_only_the_weights_in_force_are_announced(name: str) -> None:
    prompt = list(range(24))
    with CacheManager.create(name, CacheConfig(block_size=BLOCK, device_blocks=60, weights="v1")) as manager:
        router, batches = Router(), Batches(name, since=0)

        def serve(request: str, **options: Any) -> None:
            manager.admit(request, prompt, **options)
            manager.cache(request)
            manager.release(request)

        def told() -> tuple[tuple[int, int], tuple[int, int]]:
            for number, payload in batches.poll():
                router.take(number, payload)
            return router.score(prompt), router.score(prompt, "poet")

        serve("plain")
        serve("poet", namespace=namespace_key(lora="poet"))
        assert told() == ((6, 0), (6, 0))
        manager.resume(weights="v2")
        assert told() == ((0, 0), (0, 0)) and not router.media["GPU"]
        serve("again")
        assert told() == ((6, 0), (0, 0))
        manager.resume(weights="v1")  # what was computed with them is there still, and matches again
        assert told() == ((6, 0), (6, 0)) and manager.peek(prompt, max_blocks=6) == (6, 0)
        batches.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-ledger"], "kvledger segments lists what is there"),
        (["NAME", "--endpoint", "tcp://127.0.0.1:notaport"], "tcp://127.0.0.1:notaport cannot be bound"),
        (["NAME", "--replay-endpoint", "carrier-pigeon://x"], "carrier-pigeon://x cannot be bound"),
        (["NAME", "--rank", "-1"], "greater than or equal to 0"),
    ],
)
def test_bad_input_is_one_line(name: str, arguments: list[str], told: str) -> None:
    with CacheManager.create(name, CONFIG):
        command = [sys.executable, "-m", "kvledger.cli", "events", *(name if a == "NAME" else a for a in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 2 and told in " ".join(done.stderr.replace("│", " ").split()), done
        assert "Traceback" not in done.stderr


def test_it_ends_when_it_is_asked_to(name: str) -> None:
    ports = (free_port(), free_port())
    with CacheManager.create(name, CONFIG), publishing(name, ports) as process:
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:  # nonsense disturbs nobody
            stranger.linger = 0
            stranger.connect(f"tcp://127.0.0.1:{ports[1]}")
            for frames in ([b"x"], [b"", b"short"], [b"", bytes(9)], [b"a", b"b", b"c", b"d"]):
                stranger.send_multipart(frames)
            stranger.send_multipart([b"", bytes(8)])
            assert stranger.poll(int(PATIENCE_S * 1000))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
