"""Shared memory with its space reserved, so that a full ``/dev/shm`` is an error and never a SIGBUS."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path

import posix_ipc

from ipc.errors import LedgerError, LedgerExists, LedgerNotFound, NotPrivate, SharedMemoryFull, TooManyFiles
from ipc.names import SHM, unlink

_MADV_POPULATE_WRITE = 23
_PIECE_BYTES = 2 << 20
_CGROUP = Path("/sys/fs/cgroup")
_libc = ctypes.CDLL(None, use_errno=True)


def populate(map: mmap.mmap) -> bool:
    """Map all pages now. Through ctypes, which releases the interpreter lock (``mmap.madvise`` holds it).

    In pieces: the kernel locks the address space meanwhile, and a ``malloc`` that wants more of it waits.
    Linux before 5.14 does not know the advice; pages then appear at their first touch, as they do without it.
    Returns whether it was taken.
    """
    first = ctypes.c_char.from_buffer(map)
    start, end = ctypes.addressof(first), ctypes.addressof(first) + len(map)
    taken = True
    for piece in range(start, end, _PIECE_BYTES):
        size = min(_PIECE_BYTES, end - piece)
        taken &= not _libc.madvise(ctypes.c_void_p(piece), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)
    del first
    return taken


def open_new(name: str) -> posix_ipc.SharedMemory:
    """A new empty object that only this user may read and write, whatever the umask is.

    Raises:
        LedgerExists: the name is taken.
        TooManyFiles
    """
    try:
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    except posix_ipc.ExistentialError:
        raise LedgerExists(f"shared memory {name} exists already: choose another name for the ledger") from None
    except OSError as error:
        raise _refused(name, error) from error
    os.fchmod(memory.fd, 0o600)
    return memory


def open_private(name: str, *, write: bool) -> posix_ipc.SharedMemory:
    """An object that exists, if this user owns it and nobody else may touch it.

    Raises:
        LedgerNotFound, NotPrivate, TooManyFiles
    """
    try:
        memory = posix_ipc.SharedMemory(name, read_only=not write)
    except posix_ipc.ExistentialError:
        raise LedgerNotFound(f"there is no shared memory {name}: the ledger does not exist or was closed") from None
    except posix_ipc.PermissionsError:
        raise NotPrivate(f"shared memory {name} belongs to another user: run this as that user") from None
    except OSError as error:
        raise _refused(name, error) from error
    status = os.fstat(memory.fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        memory.close_fd()
        raise NotPrivate(
            f"shared memory {name} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, not to "
            f"user {os.geteuid()} alone: run this as its owner, and if others could write it, remove it and start anew"
        )
    return memory


def _refused(name: str, error: OSError) -> LedgerError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyFiles(f"{name} cannot be opened, too many files are open: raise the limit (ulimit -n)")
    return LedgerError(f"shared memory {name} cannot be opened: {error.strerror}")


def available_memory() -> int:
    """Bytes that the kernel can still give before it kills somebody: of the machine, and of a container's limit.

    A tmpfs may be larger than the memory that holds it, so its free space alone says too much. Containers see their
    limit as the root of cgroup v2; page cache that was not used lately counts as free in both (Linux, ``proc(5)`` and
    ``cgroup-v2.rst``).
    """
    with open("/proc/meminfo", encoding="ascii") as lines:
        machine = {line.split()[0]: int(line.split()[1]) << 10 for line in lines}
    available = machine["MemAvailable:"] + machine["SwapFree:"]
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            cache = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            available = min(available, max(int(limit) - int(used) + int(cache["inactive_file"]), 0))
    except FileNotFoundError:  # no container, or one of cgroup v1
        pass
    return available


def free_bytes() -> int:
    """Bytes that can still be reserved: by the size of the file system, and by the memory behind it."""
    free = os.statvfs(SHM)
    return min(free.f_bavail * free.f_frsize, available_memory())


def _check_room(name: str, size: int) -> None:
    """Refuse what cannot fit before a page of it is taken: reserving pages that do not exist gets a process killed."""
    free = os.statvfs(SHM)
    if size > free.f_bavail * free.f_frsize:
        raise _full(name, size)
    try:
        available = available_memory()
    except OSError as error:
        raise _refused(name, error) from error
    if size > available:
        raise SharedMemoryFull(
            f"{name} needs {size:,} bytes, {available:,} of memory are free: make the pools or segments smaller, or "
            f"give the machine or container more ({SHM} may be larger than the memory behind it)"
        )


def _full(name: str, size: int) -> SharedMemoryFull:
    free = os.statvfs(SHM)
    return SharedMemoryFull(
        f"{name} needs {size:,} bytes, {SHM} has {free.f_bavail * free.f_frsize:,} free: "
        "make the pools or segments smaller, remove dead ledgers, or give it more room (remount it with a larger "
        "size=, in a container --shm-size)"
    )


def create(name: str, size: int) -> mmap.mmap:
    """Create an object of ``size`` zero bytes, mode 0600, and map it for writing.

    Raises:
        SharedMemoryFull: with what is there and what is wanted.
        LedgerExists: the name is taken.
        TooManyFiles
    """
    _check_room(name, size)
    memory = open_new(name)
    try:
        # ftruncate alone would succeed on a full tmpfs and kill the process at the first touch
        os.posix_fallocate(memory.fd, 0, size)
        return mmap.mmap(memory.fd, size)
    except OSError as error:
        unlink(name)
        if error.errno == errno.EFBIG:
            raise SharedMemoryFull(f"{name} needs {size:,} bytes, a file may not be so large (ulimit -f)") from error
        if error.errno == errno.ENOMEM:
            raise SharedMemoryFull(f"{name} needs {size:,} bytes, this process may not map them (ulimit -v)") from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise _refused(name, error) from error
        raise _full(name, size) from error
    finally:
        memory.close_fd()


def attach(name: str, *, write: bool) -> mmap.mmap:
    """Map an object that exists, read-only unless ``write``.

    Raises:
        LedgerNotFound, NotPrivate, TooManyFiles
    """
    memory = open_private(name, write=write)
    try:
        if not memory.size:  # its creator has not reserved the space yet
            raise LedgerNotFound(f"shared memory {name} is only being created")
        return mmap.mmap(memory.fd, memory.size, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    except OSError as error:
        raise _refused(name, error) from error
    finally:
        memory.close_fd()
