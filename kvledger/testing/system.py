"""The operating system that the simulation's processes see, in place of the real one.

``installed(...)`` replaces, in the modules of the four packages, the *modules* they use to reach the system (``os``,
``mmap``, ``posix_ipc``, ``fcntl``, ``time``, ``subprocess``, ``signal``) by objects with the same few functions. The
project's own code runs as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import posix_ipc

from ipc.background import Task
from kvledger import is_compiled
from kvledger.testing.points import INTERPRETED_ONLY, entrances, watched
from kvledger.testing.schedule import Process, Schedule
from kvledger.testing.weak_memory import SharedObject

CAPACITY = 1 << 30
"""Of the simulated ``/dev/shm``, in bytes."""
_EVERYTHING = 1 << 62
_FLOCK = struct.Struct("hhxxxxqqixxxx")
_PACKAGES = ("ipc", "workers", "kvledger")
_NOT_REPLACED = ("kvledger.testing", "kvledger.cli")


class System:
    """Names in ``/dev/shm``, descriptors, locks, semaphores, processes and clocks of one simulation."""

    def __init__(self, schedule: Schedule, programs: dict[str, Callable[[list[str]], int]]) -> None:
        self.schedule = schedule
        self.programs = programs
        """What ``python -m NAME ARGUMENTS`` runs."""
        self.names: dict[str, SharedObject] = {}
        self.semaphores: dict[str, list[int]] = {}
        self.capacity = CAPACITY
        self._descriptors: dict[int, tuple[Process, SharedObject | Process]] = {}
        self._locks: dict[SharedObject, list[tuple[int, int, int]]] = {}
        """``(descriptor, start, length)`` of the bytes that are locked."""
        self._next_descriptor = 1000

    def describe(self, thing: SharedObject | Process) -> int:
        """A new file descriptor."""
        self._next_descriptor += 1
        self._descriptors[self._next_descriptor] = self.schedule.current(), thing
        return self._next_descriptor

    def behind(self, descriptor: int) -> Any:
        """What a descriptor stands for."""
        found = self._descriptors.get(descriptor)
        if found is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found[1]

    def forget(self, descriptor: int) -> None:
        """Close a descriptor; its locks are given up."""
        _, thing = self._descriptors.pop(descriptor)
        if isinstance(thing, SharedObject):
            self._unlock(thing, descriptor, 0, _EVERYTHING)

    def reopen(self, path: str) -> int:
        """``open("/proc/self/fd/N")``: another description of the same object."""
        self.schedule.current()
        return self.describe(self.behind(int(path.rpartition("/")[2])))

    def lock(self, descriptor: int, command: int, argument: bytes) -> bytes:
        """Open file description locks of ``fcntl``; a dead process holds none."""
        self.schedule.current()
        shared = self.behind(descriptor)
        kind, whence, start, length, _ = _FLOCK.unpack(argument)
        held = self._locks.setdefault(shared, [])
        taken = any(
            other != descriptor
            and first < start + length
            and start < first + size
            and self._descriptors[other][0].alive
            for other, first, size in held
        )
        if command == fcntl.F_OFD_GETLK:
            return _FLOCK.pack(fcntl.F_WRLCK if taken else fcntl.F_UNLCK, whence, start, length, -1)
        if kind == fcntl.F_UNLCK:
            self._unlock(shared, descriptor, start, length)
        elif taken:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        else:
            held.append((descriptor, start, length))
        return argument

    def _unlock(self, shared: SharedObject, descriptor: int, start: int, length: int) -> None:
        kept = [
            (other, first, size)
            for other, first, size in self._locks.get(shared, ())
            if other != descriptor or not start <= first < start + length
        ]
        self._locks[shared] = kept

    def used(self) -> int:
        """Bytes reserved."""
        unnamed = {thing for _, thing in self._descriptors.values() if isinstance(thing, SharedObject)}
        return sum(shared.size for shared in unnamed | set(self.names.values()))


class _Module:
    """A module with some functions of its own; the rest is the real one's."""

    def __init__(self, real: Any, **functions: Any) -> None:
        self._real = real
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _posix_ipc(system: System) -> _Module:
    class SharedMemory:
        def __init__(
            self, name: str, flags: int = 0, mode: int = 0o600, size: int = 0, read_only: bool = False
        ) -> None:
            system.schedule.current()
            name = name.lstrip("/")
            if flags & posix_ipc.O_EXCL == posix_ipc.O_EXCL and flags & posix_ipc.O_CREAT:
                if name in system.names:
                    raise posix_ipc.ExistentialError("exists")
                system.names[name] = SharedObject(name, size, os.getuid(), mode)
            if name not in system.names:
                raise posix_ipc.ExistentialError("does not exist")
            self._shared = system.names[name]
            self.name = "/" + name
            self.fd = system.describe(self._shared)

        @property
        def size(self) -> int:
            return self._shared.size

        def close_fd(self) -> None:
            system.forget(self.fd)

    class Semaphore:
        def __init__(self, name: str, flags: int = 0, mode: int = 0o600, initial_value: int = 0) -> None:
            system.schedule.current()
            self.name = name.lstrip("/")
            if flags & posix_ipc.O_CREAT and flags & posix_ipc.O_EXCL:
                if self.name in system.semaphores:
                    raise posix_ipc.ExistentialError("exists")
                system.semaphores[self.name] = [initial_value]
            if self.name not in system.semaphores:
                raise posix_ipc.ExistentialError("does not exist")
            self._value = system.semaphores[self.name]

        def release(self) -> None:
            system.schedule.current().buffer.fence()
            self._value[0] += 1

        def acquire(self, timeout: float | None = None) -> None:
            if not system.schedule.wait(lambda: self._value[0] > 0, timeout):
                raise posix_ipc.BusyError("timed out")
            self._value[0] -= 1
            system.schedule.current().buffer.fence()

        def unlink(self) -> None:
            unlink_semaphore(self.name)

        def close(self) -> None:
            pass

    def unlink_semaphore(name: str) -> None:
        system.schedule.current()
        if system.semaphores.pop(name.lstrip("/"), None) is None:
            raise posix_ipc.ExistentialError("does not exist")

    def unlink_shared_memory(name: str) -> None:
        system.schedule.current()
        if system.names.pop(name.lstrip("/"), None) is None:
            raise posix_ipc.ExistentialError("does not exist")

    return _Module(
        posix_ipc,
        SharedMemory=SharedMemory,
        Semaphore=Semaphore,
        unlink_semaphore=unlink_semaphore,
        unlink_shared_memory=unlink_shared_memory,
    )


def _os_processes(system: System) -> dict[str, Callable[..., Any]]:
    def pidfd_open(pid: int, flags: int = 0) -> int:
        process = system.schedule.processes.get(pid)
        if process is None or not process.alive:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return system.describe(process)

    def kill(pid: int, number: int) -> None:
        process = system.schedule.processes.get(pid)
        if process is None or not process.alive:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        if number:
            system.schedule.kill(process)

    return {"pidfd_open": pidfd_open, "kill": kill, "getpid": lambda: system.schedule.current().pid}


def _os(system: System) -> _Module:
    def posix_fallocate(descriptor: int, offset: int, size: int) -> None:
        shared = system.behind(descriptor)
        if system.used() + size > system.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shared.resize(size)

    def statvfs(path: object) -> SimpleNamespace:
        return SimpleNamespace(f_bavail=system.capacity - system.used(), f_frsize=1)

    def listdir(path: object) -> list[str]:
        system.schedule.current()
        return [*system.names, *("sem." + name for name in system.semaphores)]

    def opened(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE != os.O_TMPFILE:
            return system.reopen(str(path))
        return system.describe(SharedObject("", 0, os.getuid(), mode))

    def link(source: object, target: object, *, src_dir_fd: int, follow_symlinks: bool) -> None:
        system.schedule.current().buffer.fence()
        name = str(target).rpartition("/")[2]
        if name in system.names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        system.names[name] = system.behind(src_dir_fd)
        system.names[name].name = name

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        return bytes(system.behind(descriptor).words.tobytes()[offset : offset + size])

    def pwrite(descriptor: int, data: bytes, offset: int) -> None:
        system.behind(descriptor).write(data, offset)

    def lstat(path: object) -> SimpleNamespace:
        name = str(path).rpartition("/")[2]
        if name.removeprefix("sem.") not in system.semaphores:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return SimpleNamespace(st_uid=os.geteuid(), st_size=32)

    def status(shared: SharedObject) -> SimpleNamespace:
        mode = 0o100000 | shared.mode
        return SimpleNamespace(
            st_uid=shared.owner, st_mode=mode, st_size=shared.size, st_nlink=1, st_dev=0, st_ino=id(shared)
        )

    def stat(path: object) -> SimpleNamespace:
        shared = system.names.get(str(path).rpartition("/")[2])
        if shared is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return status(shared)

    return _Module(
        os,
        posix_fallocate=posix_fallocate,
        statvfs=statvfs,
        listdir=listdir,
        open=opened,
        link=link,
        pread=pread,
        pwrite=pwrite,
        lstat=lstat,
        stat=stat,
        fstat=lambda descriptor: status(system.behind(descriptor)),
        chmod=lambda path, mode: None,
        fchmod=lambda descriptor, mode: None,
        **_os_processes(system),
        close=system.forget,
        urandom=system.schedule.rng.randbytes,
    )


class _Popen:
    """A child process; it outlives its parent."""

    def __init__(self, system: System, command: list[str], **options: object) -> None:
        self._system = system
        assert command[1:3] == ["-P", "-m"], command
        program = system.programs[command[3]]
        name = " ".join(command[3:6])
        self._process = system.schedule.spawn(name, lambda: program(command[4:]))
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exit_code

    def poll(self) -> int | None:
        self._system.schedule.current()
        return self._process.exit_code

    def kill(self) -> None:
        self._system.schedule.kill(self._process)

    def terminate(self) -> None:
        """There are no handlers in a simulation; SIGTERM is the politer SIGKILL."""
        self.kill()

    def send_signal(self, number: int) -> None:
        self.kill()

    def wait(self, timeout: float | None = None) -> int:
        if not self._system.schedule.wait(lambda: self._process.exit_code is not None, timeout):
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        assert self._process.exit_code is not None
        return self._process.exit_code


class _Lock:
    """``threading.Lock``: released and taken again it is a fence (see :mod:`ipc.fence`), and nothing else is."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._released = False

    def acquire(self) -> None:
        process = self._schedule.current()
        if self._released:
            process.buffer.fence()

    def release(self) -> None:
        self._schedule.current()
        self._released = True


class _Poll:
    """``select.poll()`` for one process descriptor."""

    def __init__(self, system: System) -> None:
        self._system = system

    def register(self, descriptor: int, mask: int = 0) -> None:
        self._process = self._system.behind(descriptor)

    def poll(self, milliseconds: float) -> list[int]:
        process = self._process
        ended = process.exit_code is not None
        if not ended and milliseconds:
            ended = self._system.schedule.wait(lambda: process.exit_code is not None, milliseconds / 1e3)
        return [1] if ended else []


class _Inline:
    """What the log writer's thread does, at once."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Task[Any]:
        task = Task(work, arguments)
        task.run()
        return task

    def close(self) -> None:
        pass


def _replacements(system: System) -> dict[Any, Any]:
    schedule = system.schedule

    def mapped(descriptor: int, length: int, access: int = mmap.ACCESS_WRITE) -> Any:
        write = access != mmap.ACCESS_READ
        return schedule.current().buffer.map(system.behind(descriptor), length, write=write)

    return {
        posix_ipc: _posix_ipc(system),
        os: _os(system),
        mmap: _Module(mmap, mmap=mapped),
        fcntl: _Module(fcntl, fcntl=system.lock),
        time: _Module(
            time,
            time_ns=lambda: schedule.now_ns,
            time=lambda: schedule.now_ns / 1e9,
            monotonic=lambda: schedule.now_ns / 1e9,
            monotonic_ns=lambda: schedule.now_ns,
            sleep=schedule.sleep,
        ),
        subprocess: _Module(subprocess, Popen=lambda command, **options: _Popen(system, command, **options)),
        signal: _Module(
            signal,
            signal=lambda number, handler: signal.SIG_DFL,
            pidfd_send_signal=lambda descriptor, number: schedule.kill(system.behind(descriptor)),
        ),
        select: _Module(select, poll=lambda: _Poll(system)),
        threading: _Module(threading, Lock=lambda: _Lock(schedule)),
    }


@functools.cache
def _places(modules: int) -> list[tuple[Any, str, Any]]:
    """Where the project's modules reach the operating system: module, attribute, and what stands there (or its name).

    ``modules``: how many there are; a run may import further ones.
    """
    reached = (posix_ipc, os, mmap, fcntl, time, subprocess, signal, select, threading)
    named = ("Background", "start_time", "own_namespace", "tempfile", "populate", "available_memory", "_living")
    found: list[tuple[Any, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _PACKAGES and not name.startswith(_NOT_REPLACED):
            for attribute, value in vars(module).items():
                if attribute in named:
                    found.append((module, attribute, attribute))
                elif isinstance(value, ModuleType) and value in reached:
                    found.append((module, attribute, value))
    return found


@functools.cache
def _entrances(modules: int) -> list[tuple[Any, str]]:
    return list(entrances(_PACKAGES))


@contextlib.contextmanager
def installed(system: System, *others: tuple[Any, str, Any]) -> Iterator[None]:
    """Every module of the project that reaches the operating system reaches ``system`` instead.

    ``others``: further ``(module, attribute, value)``.

    Raises:
        RuntimeError: this is the compiled build.
    """
    if is_compiled():
        raise RuntimeError(INTERPRETED_ONLY)

    def start_time(pid: int) -> int:
        process = system.schedule.processes.get(pid)
        return process.started if process is not None and process.alive else 0

    replacements = {
        **_replacements(system),
        "Background": _Inline,
        "start_time": start_time,
        "own_namespace": lambda: 1,
        "tempfile": SimpleNamespace(TemporaryFile=io.BytesIO),
        "populate": lambda map: None,
        "available_memory": lambda: system.capacity,  # statvfs says what is left of the simulated one
        "_living": {},  # managers of engines that were killed: no real fork has to know them
    }
    modules = len(sys.modules)
    changes = {(module, name): replacements[what] for module, name, what in _places(modules)}
    changes |= {(module, name): value for module, name, value in others}
    for owner, name in _entrances(modules):
        if (owner, name) not in changes:
            changes[owner, name] = watched(vars(owner)[name], system.schedule.enter)
    undo = [(owner, name, vars(owner)[name]) for owner, name in changes]
    try:
        for (owner, name), value in changes.items():
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)
