"""What ``peek`` counts is what an admission of the same prompt hits."""

from __future__ import annotations

import os
import random

import pytest

from kvledger import CacheConfig, CacheManager, OutOfBlocks
from kvledger.config import HostPolicy
from statemachine.content import Item

BLOCK = 4


@pytest.fixture
def name() -> str:
    return f"peek-{os.getpid()}"


def test_room_that_is_reckoned_from_it_suffices_for_the_admission(name: str) -> None:
    prompt = [*range(8)]
    with CacheManager.create(name, CacheConfig(block_size=BLOCK, device_blocks=4)) as manager:
        manager.admit("a", prompt)
        manager.cache("a")
        assert manager.peek(prompt) == (1, 0), "the last block is computed once more"
        assert manager.peek(prompt, max_blocks=2) == (2, 0)
        assert manager.peek(prompt, max_blocks=0) == manager.peek([]) == (0, 0)
        manager.admit("b", range(100, 108))
        assert not manager.can_allocate(2 - sum(manager.peek(prompt)))
        with pytest.raises(OutOfBlocks):
            manager.admit("c", prompt)
        manager.release("b")
        assert manager.can_allocate(2 - sum(manager.peek(prompt)))
        assert manager.admit("c", prompt).device_blocks == 1


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_an_admission_hits(name: str, seed: int, chunked: bool) -> None:
    """Prompts of all lengths, with items that must not be cut, salts, other weights and a tier on the host."""
    draw = random.Random(seed)
    config = CacheConfig(
        block_size=BLOCK,
        device_blocks=24,
        host_blocks=16,
        host_policy=HostPolicy.EXCLUSIVE,
        chunked_multimodal=chunked,
        weights="first",
    )
    hits = host_hits = 0
    with CacheManager.create(name, config) as manager:
        for step in range(400):
            tokens = [*range(100 * draw.randrange(4), 1000)][: draw.randrange(1, 33)]
            items = [Item(b"picture", 5, 9)] if len(tokens) > 14 and draw.random() < 0.5 else []
            namespace = draw.choice([b"", b"", b"salt"])
            most = draw.choice([None, None, 0, 2, 4, 99])
            told = manager.peek(tokens, items=items, namespace=namespace, max_blocks=most)
            try:
                found = manager.admit(str(step), tokens, items=items, namespace=namespace, max_blocks=most)
            except OutOfBlocks:
                continue
            assert (found.device_blocks, found.host_blocks) == told
            hits += sum(told)
            host_hits += told[1]
            if found.ready:
                manager.cache(str(step))
            manager.release(str(step))
            manager.poll()
            if step == 200:
                manager.pause()
                manager.resume(weights="second")
    assert hits > host_hits > 0
