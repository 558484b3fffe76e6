"""Prompts leave shared memory in time: the log's old segments, and the snapshots, go by age as well as by size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ipc.names import SHM
from kvledger import CacheConfig, CacheManager, ConfigError, Tier
from tests.waiting import wait_until

SECRET = np.arange(70_001, 70_041, dtype=np.int32)
SIZES = {"block_size": 4, "device_blocks": 64, "segment_bytes": 64 << 10}


def holders(name: str) -> list[str]:
    """Objects in shared memory in which some block of the secret prompt stands."""
    blocks = [SECRET[at : at + 4].tobytes() for at in range(0, 40, 4)]
    found = []
    for file in os.listdir(SHM):
        if file.startswith(f"{name}."):
            try:
                data = Path(SHM, file).read_bytes()
            except FileNotFoundError:
                continue
            if any(block in data for block in blocks):
                found.append(file)
    return found


@pytest.mark.parametrize("retain_bytes", [None, 256 << 20])
def test_a_prompt_that_is_not_cached_any_more_is_gone_in_time(retain_bytes: int | None) -> None:
    name = f"seconds-{os.getpid()}"
    config = CacheConfig(**SIZES, retain_bytes=retain_bytes, retain_seconds=2)  # type: ignore[arg-type]
    with CacheManager.create(name, config) as manager:
        manager.admit("kept", np.arange(12))
        manager.commit({"kept": 12})
        manager.admit("secret", SECRET)
        manager.commit({"secret": len(SECRET)})
        manager.release("secret")
        manager.release("kept")
        wait_until(
            "a snapshot holds the secret prompt, which is cached",
            lambda: any(file.startswith(f"{name}.snapshot") for file in holders(name)),
            meanwhile=manager.poll,
        )
        manager.evict(Tier.DEVICE, 10)  # the oldest: those of the secret prompt
        wait_until("no object holds the secret prompt", lambda: not holders(name), meanwhile=manager.poll)
        manager.close(keep=True)
    with CacheManager.open(name) as manager:  # what is left is enough to go on, warm
        assert manager.peek(np.arange(13)) == (3, 0)
        assert manager.stats()["requests"] == 2


def test_without_a_limit_in_seconds_it_stays() -> None:
    name = f"seconds-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(**SIZES)) as manager:  # type: ignore[arg-type]
        manager.admit("secret", SECRET)
        manager.release("secret")
        manager.poll()
        assert manager.stats()["log_bytes"] == 64 << 10 and holders(name) == [f"{name}.1.0"]


@pytest.mark.parametrize("seconds", [0, 0.5, -1, True, "1", float("nan"), float("inf")])
def test_what_is_no_time(seconds: object) -> None:
    with pytest.raises(ConfigError, match="retain_seconds must be at least 1 second"):
        CacheConfig(device_blocks=4, retain_seconds=seconds)  # type: ignore[arg-type]
