"""Containers that share /dev/shm and nothing else, have little of it, or may write nowhere. Real namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import WriterAlive
from ipc.ownership import objects_of, remove_objects
from kvledger import CacheConfig, CacheManager
from kvledger.doctor.ledgers import Ledger, ledgers, remove_dead
from tests.waiting import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
POD = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""A container of a pod: processes of its own, the pod's /dev/shm."""
CONFIG = CacheConfig(block_size=4, device_blocks=32, ranks=1, block_bytes=64)


def permitted(command: list[str]) -> list[str]:
    """The command, where these namespaces may be made; else the test is skipped."""
    probe = subprocess.run([*command, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"not permitted here: {' '.join(command)}: {probe.stderr.strip()}")
    return command


def clocked(command: list[str]) -> list[str]:
    """The same with clocks of its own, as a container that was restored elsewhere has, where there are any."""
    command = [*command, "--time", "--boottime", "100000"]
    return command if not subprocess.run([*command, "true"], capture_output=True).returncode else command[:-3]


class Container:
    """A program in a container; it is told to go on, or to end, by a line."""

    def __init__(self, command: list[str], program: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def says(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "it has ended"
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """It reads no more."""
        self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode

    def kill(self) -> None:
        """As a container runtime does: with everybody in it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"pod-{os.getpid()}"
    yield ledger
    for each in (ledger, f"{ledger}-decode"):
        remove_objects(each)


def look(name: str) -> Ledger | None:
    return next((entry for entry in ledgers() if entry.name == name), None)


PREFILL = """
import os, sys
import numpy as np
from kvledger import CacheManager
from kvledger.handoff.sender import Sender
from tests.project.test_containers import CONFIG
from workers.handoff.pushes import Address
name = sys.argv[1]
with CacheManager.create(name, CONFIG) as manager:
    sender = Sender(manager)
    print(os.getpid(), flush=True)
    address = sys.stdin.readline()
    if address.strip():
        admission = manager.admit("r", list(range(32)))
        manager.pools[0].device[:, admission.block_table] = np.arange(1, 9)[:, None]
        sender.send("r", eval(address))
        done = []
        while not done:
            done = sender.poll()
        print(done[0].outcome.name, done[0].reason, flush=True)
        sys.stdin.readline()
"""
DECODE = """
import sys
from kvledger import CacheManager
from kvledger.handoff.receiver import Receiver
from tests.project.test_containers import CONFIG
peer = sys.argv[1]
with CacheManager.create(peer + "-decode", CONFIG) as manager:
    receiver = Receiver(manager)
    manager.match("r", list(range(33)))
    print(repr(receiver.reserve("r", 8, peer=peer)), flush=True)
    done = []
    while not done:
        done = receiver.poll()
    print(done[0].outcome.name, manager.pools[0].device[0, done[0].block_table][:, 0].tolist(), flush=True)
"""


def test_a_living_engine_of_another_container_is_alive(name: str) -> None:
    """Whatever its number means here: it is 1 there."""
    engine = Container(clocked(permitted(POD)), PREFILL, name)
    try:
        assert engine.says() == "1"
        found = look(name)
        assert found is not None and found.state == "alive" and found.writer == 1 and len(found.workers) == 2
        assert not remove_dead([name])
        with pytest.raises(WriterAlive, match=r"written by process 1 of another container: end that first"):
            CacheManager.open(name)
        assert [own.file for own in objects_of(name)] == found.objects
        engine.tell("")
        assert engine.end() == 0
    finally:
        engine.kill()
    assert look(name) is None


def test_a_dead_engine_of_another_container_is_dead(name: str) -> None:
    """And one that restarts in place, with the number of the one before, takes its ledger over."""
    container = clocked(permitted(POD))
    engine = Container(container, PREFILL, name)
    try:
        assert engine.says() == "1"
        engine.kill()
        wait_until("it is dead", lambda: (found := look(name)) is not None and found.state == "dead")
        program = """
import os, sys
from kvledger import CacheManager
manager = CacheManager.open(sys.argv[1])
print(os.getpid(), manager.state.epoch, manager.worker_pid(0) is not None, flush=True)
sys.stdin.readline()
os.kill(manager.worker_pid(0), 19)  # which does not see that its engine goes
os._exit(0)
"""
        engine = Container(container, program, name)
        assert engine.says() == "1 2 True"
        engine.tell("")
        engine.end()
        wait_until("it is dead", lambda: (found := look(name)) is not None and found.state == "dead")
        assert [entry.name for entry in remove_dead([name])] == [name] and not objects_of(name)
    finally:
        engine.kill()


def test_prefill_and_decode_in_two_containers_of_a_pod(name: str) -> None:
    container = permitted(POD)
    prefill = Container(container, PREFILL, name)
    try:
        assert prefill.says() == "1"
        decode = Container(clocked(container), DECODE, name)
        try:
            prefill.tell(decode.says())
            assert prefill.says() == "DONE"
            assert decode.says() == f"DONE {[*range(1, 9)]}"
            assert decode.end() == 0
            prefill.tell("")
            assert prefill.end() == 0
        finally:
            decode.kill()
    finally:
        prefill.kill()


def test_a_killed_decode_container_is_gone_for_the_other(name: str) -> None:
    """What it had reserved is refused, not written; and nobody waits for the dead."""
    container = permitted(POD)
    prefill = Container(container, PREFILL, name)
    try:
        assert prefill.says() == "1"
        decode = Container(container, DECODE, name)
        address = decode.says()
        decode.kill()
        prefill.tell(address)
        assert prefill.says().startswith("FAILED ")
        prefill.tell("")
        assert prefill.end() == 0
        CacheManager.open(f"{name}-decode", CONFIG).close()
    finally:
        prefill.kill()


def test_what_lost_its_control_segment_elsewhere_is_not_called_dead(name: str) -> None:
    """Then there is no lock to ask, and its numbers say nothing here."""
    engine = Container(permitted(POD), PREFILL, name)
    try:
        assert engine.says() == "1"
        os.unlink(f"/dev/shm/{name}.control")
        found = look(name)
        assert found is not None and found.state == "cannot tell" and found.writer == 1
        assert not remove_dead([name])
    finally:
        engine.kill()


SERVES = """
import os
import numpy as np
from kvledger import CacheConfig, CacheManager, HostPolicy
name = f"bare-{os.getpid()}"
config = CacheConfig(
    block_size=4, device_blocks=3, host_blocks=2, host_policy=HostPolicy.EXCLUSIVE, ranks=1, block_bytes=64
)
with CacheManager.create(name, config) as manager:
    prompt = np.arange(9, dtype=np.int32)
    table = manager.admit("a", prompt).block_table
    manager.pools[0].device[:, table] = 7
    manager.cache("a")
    manager.release("a")
    table = manager.admit("b", prompt + 100).block_table
    manager.wait("b")
    manager.pools[0].device[:, table] = 0
    manager.release("b")
    admission = manager.admit("c", prompt)
    manager.wait("c")
    print(admission.host_blocks, (manager.pools[0].device[:, admission.block_table[:2]] == 7).all())
"""


def test_a_read_only_root() -> None:
    """No directory may be written, and there is neither HOME nor TMPDIR: /dev/shm is enough."""
    mounts = "mount --bind / / && mount -o remount,ro,bind / && mount -t tmpfs -o size=64m tmpfs /dev/shm"
    container = permitted(
        ["unshare", "--mount", "sh", "-c", f'{mounts} && cd / && ! touch /tmp/x 2>/dev/null && "$@"', ""]
    )
    done = subprocess.run(
        [*container, "env", "-i", f"PYTHONPATH={ROOT}", "PYTHONDONTWRITEBYTECODE=1", sys.executable, "-c", SERVES],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == "2 True\n", done.stderr


def test_a_user_without_a_name_and_a_home() -> None:
    somebody = permitted(["unshare", "--user", "--map-user=54321", "--map-group=54321"])
    done = subprocess.run(
        [*somebody, "env", "-i", "-C", "/", f"PYTHONPATH={ROOT}", sys.executable, "-c", SERVES],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == "2 True\n", done.stderr


FLOOD = """
import json, os
import numpy as np
from ipc import SharedMemoryFull
from kvledger import CacheConfig, CacheManager
from tests.waiting import wait_until
manager = CacheManager.create(f"little-{os.getpid()}", CacheConfig(device_blocks=20_000))
limit, auditor, refused, logged = manager.stats()["log_limit_bytes"], manager._retention.pid, 0, 0
prompt = np.arange(100_000, dtype=np.int32)
for number in range(400):  # 160 MB of prompts
    def serve():
        global refused
        try:
            manager.admit("a", prompt + number * 1000)
        except SharedMemoryFull:
            refused += 1
            return False
        return True
    wait_until("there is room for the log again", serve)
    manager.release("a")
print(json.dumps([limit, auditor > 0, manager.stats()["snapshot_events"] > 0]))
manager.close()
"""


def test_the_log_keeps_within_a_little_room() -> None:
    """64 MiB, as a container has by default: the limit follows the room, and snapshots come in time for it."""
    container = permitted(
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', ""]
    )
    done = subprocess.run(
        [*container, sys.executable, "-c", FLOOD], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    limit, audits, has_snapshot = json.loads(done.stdout)
    assert 16 << 20 <= limit <= 32 << 20 and audits and has_snapshot
