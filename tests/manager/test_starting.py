"""The one call that an engine makes when it starts: warm where it can be, with other sizes, anew where it must be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ipc import Control, segment
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects
from kvledger import (
    CacheConfig,
    CacheManager,
    CannotContinue,
    ConfigError,
    HostPolicy,
    InvalidCommand,
    LogCorrupt,
    WriterAlive,
)
from statemachine.check import check
from statemachine.records import codec
from tests.manager.test_manager import replays
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CONFIG = CacheConfig(block_size=4, device_blocks=16)
RANKS = CacheConfig(block_size=4, device_blocks=16, ranks=1, block_bytes=64)
HOST = CacheConfig(block_size=4, device_blocks=16, host_blocks=16, host_policy=HostPolicy.EXCLUSIVE)

DIES = """
import os, signal, sys
from kvledger import CacheConfig, CacheManager
from tests.manager.test_starting import CONFIG, HOST, RANKS
manager = CacheManager.create(sys.argv[1], {"plain": CONFIG, "ranks": RANKS, "host": HOST}[sys.argv[2]])
for number in range(3):
    manager.admit("r", range(100 * number, 100 * number + 20))
    manager.commit({"r": 20})
    manager.release("r")
print(manager.worker_pid(0) or 0, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def name() -> Iterator[str]:
    name = f"starting-{os.getpid()}"
    yield name
    remove_objects(name)


def died(name: str, what: str = "plain") -> int:
    """An engine has served something and was killed. Returns the process id of its worker."""
    dead = subprocess.run([sys.executable, "-c", DIES, name, what], cwd=ROOT, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    return int(dead.stdout)


def test_new_where_there_was_none_and_warm_where_there_was(name: str) -> None:
    started = CacheManager.open_or_create(name, CONFIG)
    assert (started.warm, started.reason, started.dropped_blocks) == (False, "there was none", 0)
    with pytest.raises(WriterAlive):
        CacheManager.open_or_create(name, CONFIG, replace_dead=True)
    started.manager.close()
    died(name)
    started = CacheManager.open_or_create(name, CONFIG)
    assert (started.warm, started.reason, started.dropped_blocks) == (True, "", 0)
    assert started.manager.peek(range(21), max_blocks=99) == (5, 0)
    started.manager.close()


@pytest.mark.parametrize("blocks", [17, 16 << 4, 7])
def test_another_size_without_pools_stays_warm(name: str, blocks: int) -> None:
    died(name)
    other = replace(CONFIG, device_blocks=blocks)
    with pytest.raises(ConfigError, match="device_blocks is 16"):
        CacheManager.open(name, other)
    for life in range(2):  # it may die again, and come back with the same configuration
        started = CacheManager.open_or_create(name, other)
        manager = started.manager
        assert started.warm and "device_blocks is 16" in started.reason
        assert bool(started.dropped_blocks) == (blocks < 16 and not life)
        assert manager.available_blocks() == blocks == manager.config.device_blocks
        assert manager.peek(range(21), max_blocks=99)[0] == (
            5 if blocks > 16 else manager.peek(range(21), max_blocks=99)[0]
        )
        assert not check(manager.state) and replays(manager)
        manager.close(keep=True)


def test_another_size_of_the_host_stays_warm(name: str) -> None:
    died(name, "host")
    started = CacheManager.open_or_create(name, replace(HOST, host_blocks=4, device_blocks=20))
    assert started.warm and started.manager.stats()["host_total_blocks"] == 4
    assert started.manager.peek(range(21), max_blocks=99) == (5, 0) and replays(started.manager)
    started.manager.close()


@pytest.mark.parametrize(
    ("what", "config", "words"),
    [
        ("plain", replace(CONFIG, block_size=8), "block_size is 4"),
        ("ranks", replace(RANKS, device_blocks=17), "device_blocks is 16"),
        ("ranks", CONFIG, "ranks is 1"),
        ("host", CONFIG, "host_"),
    ],
)
def test_what_cannot_be_taken_over_is_replaced_if_one_may(
    name: str, what: str, config: CacheConfig, words: str
) -> None:
    worker = died(name, what)
    before = objects_of(name)
    with pytest.raises(ConfigError, match=words):
        CacheManager.open_or_create(name, config)
    assert objects_of(name) == before, "a refused start changes nothing"
    with pytest.raises(InvalidCommand, match="replace_dead"):
        CacheManager.open_or_create(name, config, replace_dead=1)  # type: ignore[arg-type]
    started = CacheManager.open_or_create(name, config, replace_dead=True)
    assert not started.warm and words in started.reason
    if worker:
        wait_until("the old worker is gone", lambda: not os.path.exists(f"/proc/{worker}"))
    admission = started.manager.admit("r", range(21))
    assert admission.cached_tokens == 0 and replays(started.manager)
    started.manager.close()
    assert not objects_of(name)


def test_a_ledger_that_was_only_begun_is_replaced(name: str) -> None:
    control = Control.create(name, codec.SCHEMA_HASH)
    segment.create(name, 1, 0, 64 << 10)
    control.close()
    with pytest.raises((CannotContinue, LogCorrupt)):
        CacheManager.open_or_create(name, CONFIG)
    started = CacheManager.open_or_create(name, CONFIG, replace_dead=True)
    assert not started.warm
    started.manager.close()


def test_a_damaged_log_and_another_version_are_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    died(name)
    monkeypatch.setattr(codec, "SCHEMA_HASH", codec.SCHEMA_HASH ^ 1)
    with pytest.raises(CannotContinue, match="another event table"):
        CacheManager.open_or_create(name, CONFIG)
    monkeypatch.undo()
    with (SHM / f"{name}.1.0").open("r+b") as file:  # a byte in the middle of what was published
        file.seek(4096 + 700)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x55]))
    with pytest.raises(LogCorrupt):
        CacheManager.open_or_create(name, CONFIG)
    started = CacheManager.open_or_create(name, CONFIG, replace_dead=True)
    assert not started.warm and started.reason
    started.manager.close()


def test_what_is_no_configuration_replaces_nothing(name: str) -> None:
    died(name)
    wrong: Any = "sizes"
    before = objects_of(name)
    with pytest.raises((ConfigError, AttributeError)):
        CacheManager.open_or_create(name, wrong, replace_dead=True)
    assert objects_of(name) == before
    CacheManager.open(name).close()
