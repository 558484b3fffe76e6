"""Who is dead: a lock that the kernel took back, ESRCH, or another start time; nothing else."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import liveness, memory, processes
from ipc.liveness import Lock, NoLocks, life_of
from ipc.ownership import unlink
from ipc.processes import Identity, Life, life_by_number, own_identity, start_time
from tests.waiting import wait_until


@pytest.fixture
def name() -> Iterator[str]:
    object = f"/liveness-{os.getpid()}"
    memory.create(object, 4096).close()
    yield object
    unlink(object)


HOLDS = """
import os, sys, time
from ipc.liveness import Lock
lock = Lock.on(sys.argv[1])
print(lock.take(8, 8), flush=True)
exec(sys.argv[2])
time.sleep(600)
"""


def holder(name: str, then: str = "") -> subprocess.Popen[str]:
    """A process that has locked bytes 8 to 16."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, name, then], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


def test_a_lock_is_seen_and_given_up_with_its_process(name: str) -> None:
    lock, other = Lock.on(name), Lock.on(name)
    assert not lock.is_taken(8, 8) and lock.take(0, 4) and other.is_taken(3) and not other.is_taken(4)
    assert not lock.is_taken(0, 4), "its own is nobody else's"
    process = holder(name)
    assert lock.is_taken(8, 8) and lock.is_taken(15) and not lock.is_taken(16)
    assert not lock.take(12) and lock.is_taken(8, 8)
    Lock.on(name).close()
    assert other.is_taken(0, 4), "closing another description of the object takes nothing back"
    process.kill()
    process.communicate()
    assert not lock.is_taken(8, 8) and lock.take(8, 8)
    lock.give_back(0, 4)
    assert not other.is_taken(0, 4) and other.is_taken(8)
    lock.close()
    lock.close()
    assert not other.is_taken(8)
    other.close()


def test_a_fork_keeps_no_lock_of_its_parent(name: str) -> None:
    """Neither while its parent lives nor after: it can look, and ends nothing when it closes."""
    then = (
        "pid = os.fork()\n"
        "seen = bool(pid) or lock.is_taken(8, 8)\n"
        "if not pid: lock.give_back(8, 8)\n"
        "os.write(1, b'%d\\n' % (pid if seen else -1))"
    )
    process = holder(name, then)
    assert process.stdout is not None
    numbers = sorted(int(process.stdout.readline()) for _ in range(2))
    lock = Lock.on(name)
    try:
        assert numbers[0] == 0, "it looks at its parent's lock"
        assert lock.is_taken(8, 8)
        process.kill()
        process.wait()
        assert start_time(numbers[1]) and not lock.is_taken(8, 8)
    finally:
        os.kill(numbers[1], signal.SIGKILL)
        process.kill()
        process.communicate()
        lock.close()


def test_an_object_without_a_name_is_locked_too(name: str) -> None:
    shared = memory.open_private(name, write=True)
    first = Lock.beside(shared.fd)
    unlink(name)
    second = Lock.beside(shared.fd)
    assert first.take() and not second.take() and second.is_taken()
    first.close()
    assert second.take()
    second.close()
    shared.close_fd()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOLCK])
def test_a_system_without_locks_is_refused_with_the_reason(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> bytes:
        raise OSError(number, os.strerror(number))

    lock = Lock.on(name)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    for call in (lock.take, lock.is_taken):
        with pytest.raises(NoLocks, match=r"gives no open file description locks.*F_OFD_SETLK"):
            call()
    lock.close()


def test_numbers_prove_a_death_or_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    me = own_identity()
    assert me.pid == os.getpid() and me.namespace and life_by_number(me) is Life.ALIVE
    assert life_by_number(me._replace(started=me.started + 1)) is Life.DEAD
    child = subprocess.Popen(["sleep", "600"])
    it = Identity(child.pid, start_time(child.pid), me.namespace)
    assert life_by_number(it) is Life.ALIVE
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(it.pid) == 0 and life_by_number(it) is Life.DEAD, "a zombie does nothing any more"
    child.wait()
    assert life_by_number(it) is Life.DEAD
    for unknown in (
        it._replace(namespace=me.namespace + 1),
        it._replace(namespace=0),
        it._replace(pid=0),
        it._replace(started=0),
        it._replace(pid=1 << 63),
    ):
        assert life_by_number(unknown) is Life.UNKNOWN, unknown
    for number, found in ((errno.EPERM, Life.UNKNOWN), (errno.ENOSYS, Life.UNKNOWN), (errno.ESRCH, Life.DEAD)):

        def refuse(pid: int, signal: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "kill", refuse)
        assert life_by_number(it) is found  # nothing in /proc either, as where it hides what others run
    monkeypatch.setattr(processes, "own_namespace", lambda: 0)
    assert life_by_number(me) is Life.UNKNOWN


def test_the_namespace_is_not_known_where_proc_belongs_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: real + 1)
    assert own_identity().namespace == 0


THREAD_GOES_ON = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print(flush=True)
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)  # exit(2) of this thread alone
"""


def test_a_process_whose_first_thread_has_ended_is_alive() -> None:
    """``/proc/<pid>/stat`` calls it a zombie, while its other threads write on."""
    number = {"x86_64": 60, "aarch64": 93}[platform.machine()]
    process = subprocess.Popen([sys.executable, "-c", THREAD_GOES_ON, f"{number}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        status = Path(f"/proc/{process.pid}/stat")
        wait_until("the first thread has ended", lambda: b") Z " in status.read_bytes())
        started = start_time(process.pid)
        assert started and life_by_number(Identity(process.pid, started, own_identity().namespace)) is Life.ALIVE
    finally:
        process.kill()
        process.communicate()
    assert start_time(process.pid) == 0


def test_a_lock_outweighs_numbers_that_say_nothing_and_no_proof() -> None:
    me = own_identity()
    elsewhere = me._replace(namespace=me.namespace + 1)
    assert life_of(False, me) is Life.DEAD, "it gave the lock back: it writes nothing any more"
    assert life_of(False, elsewhere) is Life.DEAD
    assert life_of(True, me) is life_of(True, elsewhere) is Life.ALIVE
    assert life_of(True, me._replace(started=1)) is Life.DEAD, "a child holds it that has not called exec yet"


def test_locks_left_open_by_descriptor(name: str) -> None:
    before = len(liveness._locks)
    lock = Lock.on(name)
    assert len(liveness._locks) == before + 1
    lock.close()
    assert len(liveness._locks) == before
