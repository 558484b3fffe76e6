"""Workers that keep dying, in the simulator's time: nothing waits, and every instant is known."""

from __future__ import annotations

import itertools
import random

import pytest

from ipc import writer
from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.testing.schedule import Schedule
from kvledger.testing.system import System, installed
from kvledger.testing.weak_memory import Order
from workers import transfer

SEGMENT = 16 << 10
SIZES = {"block_size": 2, "device_blocks": 4, "host_blocks": 4, "ranks": 1, "block_bytes": 16, "segment_bytes": SEGMENT}


def test_a_worker_that_dies_at_once_is_started_later_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """After eight failures in a row nothing is started any more: the host tier is given up."""
    schedule = Schedule(random.Random(1), Order.TSO)
    starts: list[float] = []

    def worker(arguments: list[str]) -> int:
        starts.append(schedule.now_ns / 1e9)
        return transfer.main(arguments) if arguments[2] == "1" else 1

    def engine() -> int:
        manager = CacheManager.create("ranks", CacheConfig(host_policy=HostPolicy.EXCLUSIVE, **SIZES))
        pid = manager.worker_pid(0)
        assert pid is not None
        schedule.kill(schedule.processes[pid])
        while manager.state.policy != HostPolicy.OFF:
            manager.poll()
            schedule.sleep(0.005)
        manager.close()
        return 0

    monkeypatch.setattr(writer, "LEAST_SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(transfer, "_ACK_SEGMENT_BYTES", SEGMENT)
    schedule.spawn("engine", engine)
    system = System(schedule, {"workers.transfer": worker})
    with installed(system):
        schedule.run()
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert len(pauses) == 7, pauses
    assert all(1.5 * earlier < later < 5.5 for earlier, later in itertools.pairwise(pauses[1:-1])), pauses
    assert not system.names
