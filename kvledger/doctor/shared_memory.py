"""Whether ``/dev/shm`` gives what the log and the pools need."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import posix_ipc

from ipc import memory, segment
from ipc.memory import available_memory
from ipc.names import SHM, bell_name, segment_name
from ipc.ownership import unlink
from kvledger.config import CacheConfig
from kvledger.doctor.finding import Finding, note, ok, problem, size
from workers.processes.programs import environment, python

LEAST_BYTES = 2 * CacheConfig.segment_bytes + (1 << 20)
"""What a ledger without pools begins with: a segment in use, one prepared, the control segment."""
_CGROUP_V1_LIMIT = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SEGMENT_BYTES = 1 << 16
_READ = "import sys; from ipc import memory; sys.stdout.buffer.write(memory.attach(sys.argv[1], write=False)[:16])"
_TIMEOUT_S = 20.0


def file_system() -> Finding:
    """Whether ``/dev/shm`` is there, ours to write, and memory."""
    if not SHM.is_dir():
        return problem(f"{SHM} does not exist", f"mkdir -m 1777 {SHM} && mount -t tmpfs -o nosuid,nodev tmpfs {SHM}")
    if not os.access(SHM, os.W_OK | os.X_OK, effective_ids=True):
        return problem(f"{SHM} cannot be written by user {os.geteuid()}", f"as root: chmod 1777 {SHM}; mount it rw")
    kind = _file_system_of(str(SHM.resolve()))
    if kind != "tmpfs":
        return note(
            f"{SHM} is {kind}, not a tmpfs: what is shared is also written to a disk",
            f"mount -t tmpfs -o nosuid,nodev tmpfs {SHM}",
        )
    return ok(f"{SHM} is a tmpfs that may be written")


def _file_system_of(path: str) -> str:
    """Type of the file system that holds a path (``/proc/self/mountinfo``, see ``proc(5)``; a later mount covers)."""
    kind, longest = "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, source = line.partition(" - ")
        mount = place.split()[4].rstrip("/")
        if (path == mount or path.startswith(f"{mount}/")) and len(mount) >= longest:
            kind, longest = source.split()[0], len(mount)
    return kind


def room() -> Finding:
    """How much fits, by the file system and by the memory behind it."""
    status = os.statvfs(SHM)
    free, whole = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    memory_free = available_memory()
    found = f"{size(free)} of {size(whole)} free in {SHM}, {size(memory_free)} of memory available"
    if memory_free < LEAST_BYTES:
        return problem(
            f"{found}; an empty ledger takes {size(LEAST_BYTES)}",
            "end what takes the memory, or give the machine or container more",
        )
    if free < LEAST_BYTES:
        return problem(
            f"{found}; an empty ledger takes {size(LEAST_BYTES)}",
            f"remove dead ledgers (kvledger segments --remove-dead), or mount -o remount,size=... {SHM}, "
            "in a container --shm-size",
        )
    retain = CacheConfig.retain_bytes
    assert retain is not None
    if free < retain + LEAST_BYTES:
        return note(
            f"{found}; by default a log may take {size(retain)}, and the host pool comes on top",
            f"mount -o remount,size=... {SHM}, in a container --shm-size; or lower retain_bytes and host_blocks",
        )
    limit = _cgroup_v1_limit()
    if limit is not None:
        return note(
            f"{found}; a cgroup of version 1 limits it to {size(limit)}, which kvledger does not take into account",
            "keep pools and log below that: who goes beyond is killed",
        )
    if memory_free < free:
        return note(f"{found}: {SHM} is larger than the memory behind it", f"plan with {size(memory_free)}")
    return ok(found)


def _cgroup_v1_limit() -> int | None:
    """The limit of a container under cgroup v1, if there is one below what the machine has."""
    try:
        limit = int(_CGROUP_V1_LIMIT.read_text())
    except (OSError, ValueError):
        return None
    return limit if limit < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") else None


def shared_segment(ledger: str) -> Finding:
    """Whether a segment can be made, that nobody else may touch, that another process reads, and that goes again."""
    name = segment_name(ledger, 1, 0)
    map = memory.create(name, _SEGMENT_BYTES)
    try:
        # Somebody who is killed here leaves what `kvledger segments` knows
        data = segment.MAGIC.to_bytes(8, "little") + os.urandom(8)
        map[:16] = data
        populated = memory.populate(map)
        mode = stat.S_IMODE(os.stat(SHM / name[1:]).st_mode)
        if mode != 0o600:
            return problem(f"a segment was made with mode {mode:o}, not 600", f"mount {SHM} as a plain tmpfs")
        command = python("-c", _READ, name)
        read = subprocess.run(command, env=environment(), capture_output=True, timeout=_TIMEOUT_S)
        if read.stdout != data:
            reason = read.stderr.decode(errors="replace").strip().splitlines()
            return problem(
                f"another process cannot read a segment: {reason[-1] if reason else 'it reads other bytes'}",
                "let all processes of the engine run as one user, with the same /dev/shm",
            )
    finally:
        map.close()
        unlink(name)
    if not populated:
        return note(
            "made, mapped, read by another process, removed; madvise(MADV_POPULATE_WRITE) is not supported",
            "nothing needs to be done; with Linux 5.14 or newer a new segment costs the engine no page faults",
        )
    return ok("made with mode 600, mapped and populated, read by another process, removed")


def semaphore(ledger: str) -> Finding:
    """Whether named semaphores work: a worker that waits is woken by one."""
    name = bell_name(ledger, 0)
    try:
        bell = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
    except (posix_ipc.Error, OSError) as error:
        return problem(
            f"a named semaphore cannot be made: {error}", f"let {SHM} be a writable tmpfs, with room and inodes"
        )
    try:
        bell.release()
        bell.acquire(_TIMEOUT_S)
    finally:
        bell.close()
        posix_ipc.unlink_semaphore(name)
    return ok("made, rung, removed")
