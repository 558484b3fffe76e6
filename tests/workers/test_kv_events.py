"""KV events: a router that believes them knows what the ledger has, and is never told nonsense on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest

from kvledger import CacheConfig, CacheManager, CommandRejected, HostPolicy, InvalidCommand, OutOfBlocks, Tier
from tests.waiting import wait_until
from workers.followers.events import Batches

BLOCK = 4


class Router:
    """What a router makes of the batches: strict where real ones shrug."""

    def __init__(self) -> None:
        self.media: dict[str, dict[int, int | None]] = {"GPU": {}, "CPU": {}}
        """By medium: block → parent."""
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.names: dict[tuple[int | None, tuple[int, ...], str | None], int] = {}
        self.number = -1

    def known(self, block: int) -> bool:
        return any(block in blocks for blocks in self.media.values())

    def take(self, number: int, payload: bytes) -> list[dict[str, Any]]:
        seconds, events, rank = msgpack.unpackb(payload)
        assert isinstance(seconds, float) and rank == 0
        assert number == self.number + 1 or events[:1] == [{"type": "AllBlocksCleared"}], "a gap"
        self.number = number
        for event in events:
            getattr(self, event["type"])(event)
        return events

    def BlockStored(self, event: dict[str, Any]) -> None:  # noqa: N802
        parent = event["parent_block_hash"]
        rows = np.reshape(event["token_ids"], (-1, event["block_size"])).tolist()
        assert len(rows) == len(event["block_hashes"]) > 0
        for block, row in zip(event["block_hashes"], rows, strict=True):
            assert parent is None or self.known(parent), "an orphan"
            assert block not in self.media[event["medium"]], "stored twice"
            self.media[event["medium"]][block] = parent
            place = (parent, tuple(row), event["lora_name"])
            before = self.names.get(place, block)
            assert before == block or not self.known(before), "two names at once"  # other weights give another name
            self.names[place] = block
            parent = block

    def BlockRemoved(self, event: dict[str, Any]) -> None:  # noqa: N802
        for block in event["block_hashes"]:
            del self.media[event["medium"]][block]
            if not self.known(block):
                assert not any(block in blocks.values() for blocks in self.media.values()), "children stay behind"

    def AllBlocksCleared(self, event: dict[str, Any]) -> None:  # noqa: N802
        for blocks in self.media.values():
            blocks.clear()

    def score(self, tokens: list[int], lora: str | None = None) -> tuple[int, int]:
        """Leading blocks on the device, and after those on the host."""
        found = [0, 0]
        parent = None
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            parent = self.names.get((parent, tuple(tokens[start : start + BLOCK]), lora))
            if parent in self.media["GPU"] and not found[1]:
                found[0] += 1
            elif parent in self.media["CPU"]:
                found[1] += 1
            else:
                break
        return found[0], found[1]


@pytest.fixture
def name() -> str:
    return f"kvevents-{os.getpid()}"


def traffic(manager: CacheManager, seed: int, steps: int) -> Iterator[list[int]]:
    """Random requests that share prefixes; yields a prompt after each step."""
    draw = random.Random(seed)
    stems = [[draw.randrange(50) for _ in range(draw.randrange(8, 40))] for _ in range(6)]
    live: list[str] = []
    for step in range(steps):
        prompt = draw.choice(stems)[: draw.randrange(4, 40)] + [draw.randrange(50) for _ in range(draw.randrange(9))]
        kind = draw.random()
        if kind < 0.5:
            try:
                manager.admit(f"r{seed}-{step}", prompt)
            except OutOfBlocks:
                pass
            else:
                live.append(f"r{seed}-{step}")
        elif kind < 0.7 and live:
            with contextlib.suppress(CommandRejected):  # less computed than before, or not ready
                manager.cache(draw.choice(live), computed=draw.choice([None, None, 0, 1, 2]))
        elif kind < 0.95 and live:
            key = live.pop(draw.randrange(len(live)))
            if draw.random() < 0.8 and manager.ready(key):
                manager.cache(key)
            manager.release(key, final=draw.random() < 0.3)
        elif kind < 0.97:
            manager.evict(draw.choice([Tier.DEVICE, Tier.HOST]), draw.randrange(1, 9))
        elif kind < 0.98:
            manager.clear(force=True)
        elif kind < 0.995 and live:
            with contextlib.suppress(InvalidCommand):  # nothing of it is computed
                manager.distrust(draw.choice(live), draw.randrange(30))
        yield prompt
    for key in live:
        manager.release(key)


@pytest.mark.parametrize("policy", [HostPolicy.OFF, HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
@pytest.mark.parametrize("seed", range(4))
def test_a_router_that_believes_them_knows_what_the_ledger_has(name: str, policy: HostPolicy, seed: int) -> None:
    config = CacheConfig(
        block_size=BLOCK, device_blocks=40, host_blocks=30 if policy != HostPolicy.OFF else 0, host_policy=policy
    )
    with CacheManager.create(name, config) as manager:
        router, batches = Router(), Batches(name, since=0)
        for prompt in traffic(manager, seed, 600):
            for number, payload in batches.poll():
                router.take(number, payload)
            assert router.number == manager.next_sequence - 2
            state = manager.state
            if not state.transfers and not any(run.uncomputed for run in state.nodes.values()):
                assert router.score(prompt) == manager.peek(prompt, max_blocks=len(prompt)), prompt
        assert router.names and manager.stats()["device_evicted_blocks"] > 50
        batches.close()


@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_what_is_on_its_way_between_tiers_leaves_no_hole(name: str, policy: HostPolicy) -> None:
    """With real workers, whose copies are seen in flight; Dynamo's own tree accepts every event where it is there."""
    dynamo = pytest.importorskip("dynamo._core")
    tree, held = dynamo.RadixTree(), Counted()
    config = CacheConfig(
        block_size=BLOCK, device_blocks=40, host_blocks=60, host_policy=policy, ranks=2, layers=1, block_bytes=64
    )
    in_flight = 0
    with CacheManager.create(name, config) as manager:
        router, batches = Router(), Batches(name, since=0)
        for step, prompt in enumerate(traffic(manager, 7, 1500)):
            manager.poll()
            in_flight += bool(manager.state.transfers)
            if not step % 5:  # on a busy machine copies would be in flight all the time, and nothing could be told
                wait_until("no copy is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
            for number, payload in batches.poll():
                for event in router.take(number, payload):
                    for data in held.told(event, dynamo.compute_block_hash_for_seq):
                        tree.apply_event(1, json.dumps({"event_id": number, "data": data}).encode())
            state = manager.state
            if not state.transfers and not any(run.uncomputed for run in state.nodes.values()):
                found = tree.find_matches(dynamo.compute_block_hash_for_seq(prompt, BLOCK)).scores
                assert (
                    found.get((1, 0), 0)
                    == sum(manager.peek(prompt, max_blocks=len(prompt)))
                    == sum(router.score(prompt))
                )
        batches.close()
    assert in_flight > 10 and held.events > 300


class Counted:
    """Tells a tree that knows no tiers of the blocks that are on any."""

    def __init__(self) -> None:
        self.tiers: dict[int, set[str]] = {}
        self.events = 0

    def told(self, event: dict[str, Any], hash_tokens: Any) -> Iterator[Any]:
        self.events += 1
        match event["type"]:
            case "AllBlocksCleared":
                self.tiers.clear()
                yield "cleared"
            case "BlockStored":
                parent, tokens = event["parent_block_hash"], event["token_ids"]
                for number, block in enumerate(event["block_hashes"]):
                    if block not in self.tiers:
                        hashed = hash_tokens(tokens[number * BLOCK : (number + 1) * BLOCK], BLOCK)[0]
                        blocks = [{"block_hash": block, "tokens_hash": hashed}]
                        yield {"stored": {"parent_hash": parent, "blocks": blocks}}
                    self.tiers.setdefault(block, set()).add(event["medium"])
                    parent = block
            case "BlockRemoved":
                for block in event["block_hashes"]:
                    self.tiers[block].remove(event["medium"])
                    if not self.tiers[block]:
                        del self.tiers[block]
                        yield {"removed": {"block_hashes": [block]}}
