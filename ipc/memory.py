"""Shared memory with its space reserved, so that a full ``/dev/shm`` is an error and never a SIGBUS."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import posix_ipc

from ipc.errors import LedgerNotFound, SharedMemoryFull
from ipc.names import SHM, unlink

_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None, use_errno=True)


def populate(map: mmap.mmap) -> None:
    """Map all pages now. Through ctypes, which releases the interpreter lock (``mmap.madvise`` holds it).

    Linux before 5.14 does not know the advice; pages then appear at their first touch, as they do without it.
    """
    first = ctypes.c_char.from_buffer(map)
    _libc.madvise(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(map)), _MADV_POPULATE_WRITE)
    del first


def create(name: str, size: int) -> mmap.mmap:
    """Create an object of ``size`` zero bytes, mode 0600, and map it for writing.

    Raises:
        SharedMemoryFull: with what is there and what is wanted.
        posix_ipc.ExistentialError: the name is taken.
    """
    memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
    try:
        free = os.statvfs(SHM)
        if size > free.f_bavail * free.f_frsize:  # do not fill the machine's memory only to find that out
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # ftruncate alone would succeed on a full tmpfs and kill the process at the first touch
        os.posix_fallocate(memory.fd, 0, size)
        return mmap.mmap(memory.fd, size)
    except OSError as error:
        unlink(name)
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        free = os.statvfs(SHM)
        raise SharedMemoryFull(
            f"{name} needs {size:,} bytes, {SHM} has {free.f_bavail * free.f_frsize:,} free: "
            "make the pools or segments smaller, remove dead ledgers, or remount it with a larger size="
        ) from error
    finally:
        memory.close_fd()


def attach(name: str, *, write: bool) -> mmap.mmap:
    """Map an object that exists, read-only unless ``write``.

    Raises:
        LedgerNotFound
    """
    try:
        memory = posix_ipc.SharedMemory(name, read_only=not write)
    except posix_ipc.ExistentialError:
        raise LedgerNotFound(f"there is no shared memory {name}: the ledger does not exist or was closed") from None
    try:
        if not memory.size:  # its creator has not reserved the space yet
            raise LedgerNotFound(f"shared memory {name} is only being created")
        return mmap.mmap(memory.fd, memory.size, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    finally:
        memory.close_fd()
