"""What the machine refuses: a full /dev/shm, too many files, files or maps that may not be so large. Real limits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S

_IN_SMALL_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"']


def in_small_shm(size: str, program: str) -> str:
    """Run a program with a /dev/shm of its own; returns what it printed."""
    probe = subprocess.run([*_IN_SMALL_SHM, "1m", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip("a mount namespace is not permitted here")
    done = run([*_IN_SMALL_SHM, size, sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


_START = """
import gc, os, sys, time
import numpy as np
from ipc import LogReader, SharedMemoryFull
from ipc.ownership import segments_of
from kvledger import CacheConfig, CacheManager, HostPolicy
from statemachine.records.snapshot import state_digest
from statemachine.records.replay import Replay
from workers import WorkerFailed
from workers.followers.follow import Follower

def config(**changes):
    return CacheConfig(**{"block_size": 4, "device_blocks": 400, "segment_bytes": 256 << 10, **changes})

def serve(manager, key):
    manager.admit(key, np.arange(40, dtype=np.int32) + 50 * (hash(key) % 7))
    manager.cache(key)

def replays(manager):
    follower = Follower(manager.name)
    while records := follower.poll():
        follower.apply(records)
    follower.close()
    return state_digest(follower.state) == manager.digest()
"""


def test_creation_in_a_full_shm_leaves_nothing() -> None:
    """Whatever does not fit, from the control segment to the last pool."""
    program = """
held = open("/dev/shm/held", "wb")
gc.disable()  # what was closed gives its memory back at once
seen = set()
for free in range(0, 3 << 20, 160 << 10):
    os.ftruncate(held.fileno(), 0)
    os.posix_fallocate(held.fileno(), 0, (4 << 20) - free)
    try:
        manager = CacheManager.create("full", config(
            device_blocks=100, host_blocks=100, host_policy=HostPolicy.EXCLUSIVE, ranks=1, block_bytes=4096))
        manager.close()
        seen.add("created")
    except (SharedMemoryFull, WorkerFailed) as error:  # the worker makes a log of its own
        seen.add(str(error).replace(" ", "_"))
        assert "bytes" in str(error) or "no room" in str(error)
    assert os.listdir("/dev/shm") == ["held"], os.listdir("/dev/shm")
print(*sorted(seen))
"""
    seen = in_small_shm("4m", _START + program).split()
    assert "created" in seen and len(seen) > 3, seen


def test_a_running_engine_without_room_for_more_log() -> None:
    """Refuses what takes, goes on with what gives back, and goes on with everything once there is room."""
    program = """
manager = CacheManager.create("full", config(retain_bytes=None))
for live in range(8):
    serve(manager, f"live {live}")
manager._writer._helper.submit(int).result()
held = open("/dev/shm/held", "wb")
free = os.statvfs("/dev/shm")
os.posix_fallocate(held.fileno(), 0, free.f_bavail * free.f_frsize - (100 << 10))
served = 0
try:
    while True:
        key = f"{served}"
        before, sequence = manager.digest(), manager.next_sequence
        manager.admit(key, np.arange(40, dtype=np.int32))
        manager.release(key)
        served += 1
except SharedMemoryFull as error:
    assert "free" in str(error) and "remount" in str(error), error
assert manager.digest() == before and manager.next_sequence == sequence
assert manager.stats()["log_refused_segments"] > 0
for again in range(3):
    try:
        manager.admit("again", np.arange(40, dtype=np.int32))
        raise AssertionError("there is no room")
    except SharedMemoryFull:
        assert manager.digest() == before
for live in range(8):
    manager.release(f"live {live}")
assert not manager.state.requests
assert replays(manager)
os.unlink("/dev/shm/held")
held.close()
for number in range(2000):
    manager.admit(f"then {number}", np.arange(40, dtype=np.int32))
    manager.release(f"then {number}")
assert not manager.stats()["log_refused_segments"]
assert replays(manager)
manager.close()
assert os.listdir("/dev/shm") == []
print(served)
"""
    assert int(in_small_shm("2m", _START + program)) > 100


def test_what_snapshots_cover_goes_before_the_limit_when_there_is_no_room() -> None:
    """The limit is larger than /dev/shm: nothing goes because of it, and the engine still goes on for ever."""
    program = """
manager = CacheManager.create("full", config(retain_bytes=8 << 20, device_blocks=100))
number = refused = 0
while number < 20_000:
    try:
        manager.admit(f"{number}", np.arange(40, dtype=np.int32) + number % 5)
        manager.cache(f"{number}")
        manager.release(f"{number}")
        number += 1
        refused = 0
    except SharedMemoryFull:
        for key in list(manager.state.numbers):
            manager.release(key)
        refused += 1
        assert refused < 50_000, "it does not go on"
        time.sleep(0.01)
assert segments_of("full")[0][1] > 0
assert replays(manager)
manager.close()
assert os.listdir("/dev/shm") == []
"""
    in_small_shm("6m", _START + program)


_LIMITED = """
import os, resource, sys
limit = getattr(resource, sys.argv[1])
from ipc import LedgerError, LogReader
from kvledger import CacheConfig, CacheManager, HostPolicy
from workers import WorkerFailed
import tempfile, subprocess, numpy as np
config = CacheConfig(device_blocks=64, host_blocks=64, host_policy=HostPolicy.EXCLUSIVE, ranks=1, segment_bytes=1 << 20)
name = f"limit-{os.getppid()}"
_, most = resource.getrlimit(limit)
seen = set()
for value in map(int, sys.argv[2:]):
    resource.setrlimit(limit, (value, most))
    try:
        manager = CacheManager.create(name, config)
        manager.admit("a", np.arange(40, dtype=np.int32))
        manager.close()
        seen.add("created")
    except (LedgerError, WorkerFailed) as error:
        assert "\\n" not in str(error)
        seen.add(type(error).__name__)
    resource.setrlimit(limit, (most, most))
    left = [entry for entry in os.listdir("/dev/shm") if name in entry]
    assert not left, (value, left)
print(*sorted(seen))
"""


@pytest.mark.parametrize(
    ("limit", "values", "expected"),
    [
        ("RLIMIT_NOFILE", [*range(3, 24), 64], {"TooManyFiles"}),
        ("RLIMIT_FSIZE", [0, 4096, 20_000, 300_000, 1_100_000, 10_000_000], {"SharedMemoryFull"}),
    ],
)
def test_limits_of_the_process(limit: str, values: list[int], expected: set[str]) -> None:
    done = run([sys.executable, "-c", _LIMITED, limit, *map(str, values)])
    assert done.returncode == 0, done.stderr
    seen = set(done.stdout.split())
    assert "created" in seen and expected <= seen, seen
    assert not [entry for entry in os.listdir("/dev/shm") if entry.startswith(f"limit-{os.getpid()}.")]
