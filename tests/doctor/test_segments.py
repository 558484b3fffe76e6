"""``kvledger segments``: what it knows, what it removes, and what it never touches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import LogWriter, snapshots
from ipc.names import SHM
from ipc.ownership import Own, objects_of, remove_objects, stamped
from kvledger.doctor import ledgers as module
from kvledger.doctor.ledgers import Ledger, ledgers
from tests.manager.test_recovery import THREE_SERVED, Engine
from tests.processes import alive
from tests.run.test_run import kvledger
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"segments-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


def listed(name: str) -> Ledger | None:
    return next((entry for entry in ledgers() if entry.name == name), None)


def remove_dead(name: str) -> bool:
    """Whether the command says that it removed this ledger."""
    done = kvledger("segments", name, "--remove-dead", "--json")
    if done.returncode == 2:
        assert done.stderr.startswith(f"error there is no ledger '{name}' in /dev/shm: ")
        assert json.loads(done.stdout)["exit_code"] == 2
        return False
    assert done.returncode == 0, done
    return name in json.loads(done.stdout)["removed"]


def test_from_alive_to_orphaned_to_dead_to_gone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table cuts names, sooner where process ids are long
    engine = Engine(name, THREE_SERVED)
    try:
        entry = listed(name)
        assert entry is not None and entry.state == "alive" and entry.writer == engine.process.pid
        assert entry.workers == sorted(pid for pid, _ in engine.workers)
        assert entry.epoch == 1 and entry.uid == os.getuid() and entry.bytes > 1 << 20 and entry.age_s < 3600
        assert not remove_dead(name) and listed(name) is not None
        assert f"not removed: {name} is alive" in kvledger("segments", name, "--remove-dead").stdout
        for pid, _ in engine.workers:
            os.kill(pid, signal.SIGSTOP)
        engine.kill()
        entry = listed(name)
        assert entry is not None and entry.state == "orphaned"
        assert not remove_dead(name), "its workers live"
        engine.resume_workers()
        wait_until(
            "the workers leave after their grace period", lambda: not any(alive(*each) for each in engine.workers)
        )
        entry = listed(name)
        assert entry is not None and entry.state == "dead" and not entry.workers
        assert name in kvledger("segments", name).stdout
        assert remove_dead(name)
        assert listed(name) is None and not objects_of(name)
    finally:
        engine.process.kill()
        engine.resume_workers() if any(alive(*worker) for worker in engine.workers) else None


def test_others_are_never_touched(name: str, tmp_path: Path) -> None:
    """Somebody's own objects with names like ours, and a link that leads out of /dev/shm."""
    theirs = {f"{name}.control": b"not ours", f"{name}.1.0": bytes(8192), f"{name}.pool.host.0": b"abc" * 3000}
    victim = tmp_path / "victim"
    victim.write_bytes(b"kvledger" * 1000)
    link = SHM / f"{name}x.control"
    link.symlink_to(victim)
    try:
        for entry, data in theirs.items():
            (SHM / entry).write_bytes(data)
        assert listed(name) is None and listed(f"{name}x") is None
        assert not remove_dead(name)
        assert all((SHM / entry).read_bytes() == data for entry, data in theirs.items())
        assert victim.exists() and link.is_symlink()
    finally:
        link.unlink()
        for entry in theirs:
            (SHM / entry).unlink()


DEAD = """
import os, sys
from ipc import LogWriter, snapshots
writer = LogWriter.create(sys.argv[1], schema_hash=1, segment_bytes=1 << 16)
writer.append([(1, 1, b"", b"")])
snapshots.write(sys.argv[1], 1, b"state")
os.kill(os.getpid(), 9)
"""


def test_pieces_without_a_control_segment(name: str) -> None:
    subprocess.run([sys.executable, "-c", DEAD, name], timeout=PATIENCE_S)
    os.unlink(SHM / f"{name}.control")
    stranger = SHM / f"{name}.2.0"
    stranger.write_bytes(b"something")
    entry = listed(name)
    assert entry is not None and entry.state == "dead" and entry.epoch == 1
    prepared = f"{name}.1.1"  # the next segment, if it was killed after that
    assert {*entry.objects, prepared} == {f"{name}.1.0", f"{name}.snapshot.1", prepared}
    assert remove_dead(name) and not objects_of(name)
    assert stranger.exists() and not (SHM / f"{name}.1.0").exists() and not snapshots.sequences(name)
    stranger.unlink()


def test_what_somebody_removes_meanwhile_is_not_listed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([sys.executable, "-c", DEAD, name], timeout=PATIENCE_S)
    os.unlink(SHM / f"{name}.control")

    def vanishing(pattern: str) -> list[Own]:
        found = stamped(pattern)
        assert any(own.name.startswith(name) for own in found)
        remove_objects(name)
        return found

    monkeypatch.setattr(module, "stamped", vanishing)
    assert name not in {ledger.name for ledger in ledgers()}


def test_pieces_of_a_living_writer_stay(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=1 << 16)
    os.rename(SHM / f"{name}.control", SHM / f"{name}-away-{os.getpid()}")
    try:
        entry = listed(name)
        assert entry is not None and entry.state == "alive"
        assert not remove_dead(name) and (SHM / f"{name}.1.0").exists()
    finally:
        os.rename(SHM / f"{name}-away-{os.getpid()}", SHM / f"{name}.control")
        writer.close(unlink=True)


def test_a_name_that_is_not_there_is_bad_input_and_removes_nothing(name: str) -> None:
    subprocess.run([sys.executable, "-c", DEAD, name], timeout=PATIENCE_S)
    for options in ([], ["--json"], ["--remove-dead"]):
        done = kvledger("segments", *options, name, f"{name}-other", "../x")
        assert done.returncode == 2 and bool(done.stdout) == ("--json" in options)
        wanted = f"error there are no ledgers '../x', '{name}-other' in /dev/shm: kvledger segments lists what is there"
        assert done.stderr.split("\n") == [wanted, ""]
    assert listed(name) is not None
    assert f"removed {name}" in kvledger("segments", "--remove-dead", name).stdout


def test_the_logs_of_workers_are_part_of_their_ledger(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=1 << 16)
    part = LogWriter.create(f"{name}.rank0.1", schema_hash=1, segment_bytes=1 << 16)
    entry = listed(name)
    assert entry is not None and f"{name}.rank0.1.control" in entry.objects and entry.workers == [os.getpid()]
    assert listed(f"{name}.rank0.1") is None
    part.close(unlink=True)
    writer.close(unlink=True)


@pytest.mark.skipif(os.getuid() != 0, reason="takes two users")
def test_another_users_ledger_is_listed_and_left_alone(name: str) -> None:
    subprocess.run([sys.executable, "-c", DEAD, name], timeout=PATIENCE_S)
    files = [own.file for own in objects_of(name)]
    for file in files:
        os.chown(SHM / file, 65534, 65534)
    try:
        found = listed(name)
        assert found is not None and found.uid == 65534
        assert not remove_dead(name) and listed(name) is not None
    finally:
        for file in files:
            os.chown(SHM / file, 0, 0)
