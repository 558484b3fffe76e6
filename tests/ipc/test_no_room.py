"""No room for more log, at any moment: a call that is refused has changed nothing, and giving back always works."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import SharedMemoryFull
from kvledger import CacheConfig, CacheManager, CommandRejected, HostPolicy, Tier
from statemachine.check import check
from tests.manager.test_manager import replays


class Traffic:
    """Random calls of an engine, on few prompts that share prefixes."""

    def __init__(self, manager: CacheManager, rng: random.Random) -> None:
        self.manager = manager
        self.rng = rng
        self.made = 0

    def tokens(self, blocks: int) -> np.ndarray:
        return np.repeat(np.array([self.rng.choice((1, 1, 2)) for _ in range(blocks)], np.int32), 2)

    def key(self) -> str:
        return self.rng.choice([*self.manager.state.numbers, "none"])

    def step(self) -> str:
        """One call; returns its name."""
        manager, rng, key = self.manager, self.rng, self.key()
        self.made += 1
        prompt = self.tokens(rng.randrange(1, 7))
        calls: dict[str, Any] = {
            "admit": lambda: manager.admit(f"{self.made}", prompt, max_blocks=len(prompt) // 2),
            "match": lambda: manager.match(f"{self.made}", prompt),
            "allocate": lambda: manager.allocate({key: rng.randrange(3)}),
            "cache": lambda: manager.cache(key, computed=rng.choice((None, 0, 1))),
            "generate": lambda: manager.cache(key, generated=self.tokens(1)),
            "extend": lambda: manager.extend(key),
            "trim": lambda: manager.trim(key, manager.cached_blocks(key)),
            "clear": lambda: manager.clear(force=True),
            "resize": lambda: manager.resize(Tier.DEVICE, rng.choice((8, 12))),
            "evict": lambda: manager.evict(rng.choice(list(Tier)), 2),
            "make_room": lambda: manager.make_room(3),
            "preempt": lambda: manager.preempt(3, list(manager.state.numbers)),
            "take_digest": manager.take_digest,
            "resume": lambda: manager.resume(weights=rng.choice(("a", "b")), force=True),
            "release": lambda: manager.release(key, final=rng.random() < 0.3),
        }
        name = rng.choice([*calls, "admit", "cache", "release"])
        calls[name]()
        return name


@given(
    st.randoms(use_true_random=False),
    st.sampled_from(HostPolicy),
    st.sampled_from((1, 2)),
    st.sampled_from((0.1, 0.3, 0.6)),
)
@settings(max_examples=100)
def test_what_is_refused_for_want_of_room_has_changed_nothing(
    rng: random.Random, policy: HostPolicy, backup_after: int, often: float
) -> None:
    host = 0 if policy == HostPolicy.OFF else rng.choice((4, 12))
    config = CacheConfig(
        block_size=2,
        device_blocks=12,
        host_blocks=host,
        host_policy=policy,
        backup_after=backup_after if policy == HostPolicy.WRITE_THROUGH else 1,
    )
    with CacheManager.create(f"room-{os.getpid()}", config) as manager:
        traffic, stage = Traffic(manager, rng), manager._writer.stage

        def full(records: Any, step: int = 0, *, giving_back: bool = False) -> None:
            if not giving_back and rng.random() < often:
                raise SharedMemoryFull("no room, as planned")
            stage(records, step, giving_back=giving_back)

        manager._writer.stage = full  # type: ignore[method-assign]
        for _ in range(50):
            before, sequence = manager.digest(), manager.next_sequence
            try:
                traffic.step()
            except SharedMemoryFull:
                assert manager.digest() == before and manager.next_sequence == sequence
            except CommandRejected:
                pass
            assert not check(manager.state)
        for key in list(manager.state.numbers):
            manager.release(key)
        manager._writer.stage = stage  # type: ignore[method-assign]
        assert not manager.state.requests and replays(manager)
