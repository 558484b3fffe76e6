"""Shared memory with its space reserved, so that a full ``/dev/shm`` is an error and never a SIGBUS."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path

import posix_ipc

from ipc import ownership
from ipc.errors import (
    LedgerError,
    LedgerExists,
    LedgerNotFound,
    NotOurs,
    NotPrivate,
    SharedMemoryFull,
    TooManyFiles,
)
from ipc.names import SHM, control_name, ledger_of

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


class Begun:
    """An object that has no name yet: nobody sees half of it, and with its process it is gone.

    Args:
        identity: of the ledger that it will belong to; ``None``: it carries no stamp (see :mod:`ipc.ownership`), since
            others know it by its name and its bytes alone.

    Raises:
        SharedMemoryFull: with what is there and what is wanted.
        TooManyFiles
    """

    def __init__(self, name: str, size: int, identity: int | None) -> None:
        self.name = name
        self.identity = identity
        _check_room(name, size)
        self.fd, self._temporary = _unnamed(name)
        try:
            os.fchmod(self.fd, 0o600)  # whatever the umask is
            # ftruncate alone would succeed on a full tmpfs and kill the process at the first touch
            stamp = b"" if identity is None else ownership.stamp(name, identity)
            os.posix_fallocate(self.fd, 0, size + len(stamp))
            os.pwrite(self.fd, stamp, size)
            self.map = mmap.mmap(self.fd, size)
            """Without the stamp."""
        except OSError as error:
            self.close()
            raise _no_room(name, size, error) from error

    def publish(self) -> str:
        """Give it its name, or one beside it where something that is not the ledger's stands there; the file's name.

        Raises:
            LedgerExists: the ledger has such an object already, or the name is taken and there is no other one.
        """
        name, identity = self.name, self.identity
        taken = identity is not None and ownership.find(name, identity) is not None
        file = name[1:]
        try:
            if taken or not self._link(file):
                if taken or identity is None or name == control_name(ledger_of(name)):
                    raise LedgerExists(f"shared memory {name} exists already: choose another name for the ledger")
                file = f"{file}~{os.urandom(4).hex()}"
                self._link(file)
                if ownership.find(name, identity) != file:  # somebody else of the ledger's was as quick
                    ownership.unlink("/" + file)
                    raise LedgerExists(f"shared memory {name} exists already")
        except OSError as error:
            raise _refused(name, error) from error
        return file

    def _link(self, file: str) -> bool:
        """Whether the name was free."""
        source = SHM / self._temporary if self._temporary else Path(f"/proc/self/fd/{self.fd}")
        try:
            # Both paths are absolute; with a descriptor Python calls linkat(2), which follows, and not link(2).
            os.link(source, SHM / file, src_dir_fd=self.fd, follow_symlinks=True)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor; what has not been published is gone."""
        os.close(self.fd)
        if self._temporary:
            ownership.unlink("/" + self._temporary)


def _unnamed(name: str) -> tuple[int, str]:
    """A new file that has no name; where the kernel knows no such thing, one with a name that nobody looks for."""
    try:
        if os.path.exists("/proc/self/fd"):  # a name is given through it
            return os.open(SHM, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), ""
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise _refused(name, error) from error
    temporary = f"{name[1:]}.begun~{os.urandom(4).hex()}"
    try:
        return os.open(SHM / temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), temporary
    except OSError as error:
        raise _refused(name, error) from error


def open_own(name: str, *, write: bool, identity: int | None = None) -> tuple[posix_ipc.SharedMemory, int]:
    """A ledger's object that exists, and how many bytes it has without its stamp.

    Args:
        identity: of the ledger; default: of the one that is there now.

    Raises:
        LedgerNotFound: there is none. With :class:`NotOurs` something that is not this user's stands in its place.
        NotPrivate: others may touch it.
        TooManyFiles
    """
    wanted = ownership.identity_of(name) if identity is None else identity
    refusal: LedgerError | None = None
    for file in ownership.places(name):
        try:
            memory = _open("/" + file, write)
        except LedgerNotFound as error:
            refusal = refusal or error
            continue
        size = memory.size
        if ownership.read_stamp(memory.fd, size, name) == wanted:
            _expect_private(name, memory)
            return memory, size - ownership.STAMP_BYTES
        memory.close_fd()
        refusal = LedgerNotFound(f"shared memory {name} is not the ledger's: it is of an earlier one, or damaged")
    assert refusal is not None
    try:
        raise refusal
    finally:
        del refusal  # its traceback leads back here: what the callers have mapped would stay until a collection


def open_private(name: str, *, write: bool) -> posix_ipc.SharedMemory:
    """An object that exists, if this user owns it and nobody else may touch it.

    Raises:
        LedgerNotFound, NotPrivate, TooManyFiles
    """
    try:
        memory = _open(name, write)
    except NotOurs as error:
        raise NotPrivate(str(error)) from None
    _expect_private(name, memory)
    return memory


def _open(name: str, write: bool) -> posix_ipc.SharedMemory:
    """An object that exists, if this user owns it. Raises: see :func:`open_own`."""
    try:
        memory = posix_ipc.SharedMemory(name, read_only=not write)
    except posix_ipc.ExistentialError:
        raise LedgerNotFound(f"there is no shared memory {name}: the ledger does not exist or was closed") from None
    except posix_ipc.PermissionsError:
        raise NotOurs(f"shared memory {name} belongs to another user: run this as that user") from None
    except OSError as error:
        raise _refused(name, error) from error
    status = os.fstat(memory.fd)
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        memory.close_fd()
        raise NotOurs(_not_alone(name, status))
    return memory


def _expect_private(name: str, memory: posix_ipc.SharedMemory) -> None:
    status = os.fstat(memory.fd)
    if status.st_mode & 0o077:
        memory.close_fd()
        raise NotPrivate(_not_alone(name, status))


def _not_alone(name: str, status: os.stat_result) -> str:
    return (
        f"shared memory {name} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, not to "
        f"user {os.geteuid()} alone: run this as its owner, and if others could write it, remove it and start anew"
    )


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
    with open("/proc/meminfo", "rb") as lines:
        machine = {line.split()[0]: int(line.split()[1]) << 10 for line in lines}
    available = machine[b"MemAvailable:"] + machine[b"SwapFree:"]
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


def _no_room(name: str, size: int, error: OSError) -> LedgerError:
    if error.errno == errno.EFBIG:
        return SharedMemoryFull(f"{name} needs {size:,} bytes, a file may not be so large (ulimit -f)")
    if error.errno == errno.ENOMEM:
        return SharedMemoryFull(f"{name} needs {size:,} bytes, this process may not map them (ulimit -v)")
    return _full(name, size) if error.errno in (errno.ENOSPC, errno.EDQUOT) else _refused(name, error)


def create(name: str, size: int, content: bytes = b"", *, identity: int | None = None) -> mmap.mmap:
    """Create a ledger's object of ``size`` bytes, mode 0600, and map it for writing. It appears when it is complete.

    Args:
        content: what it begins with; the rest is zero.
        identity: of the ledger; default: of the one that is there now.

    Raises:
        SharedMemoryFull: with what is there and what is wanted.
        LedgerExists: the ledger has such an object already.
        TooManyFiles
    """
    return _made(Begun(name, size, ownership.identity_of(name) if identity is None else identity), content)


def create_plain(name: str, size: int) -> mmap.mmap:
    """Create an object that belongs to no ledger and has nothing but its bytes; else as :func:`create`."""
    return _made(Begun(name, size, None), b"")


def _made(begun: Begun, content: bytes) -> mmap.mmap:
    map = begun.map
    try:
        map[: len(content)] = content
        begun.publish()
    except BaseException:
        map.close()
        raise
    finally:
        begun.close()
    return map


def attach(name: str, *, write: bool, identity: int | None = None) -> mmap.mmap:
    """Map a ledger's object that exists, read-only unless ``write``. Raises: see :func:`open_own`."""
    return _mapped(name, *open_own(name, write=write, identity=identity), write)


def attach_plain(name: str, *, write: bool) -> mmap.mmap:
    """Map what :func:`create_plain` or another program has made.

    Raises:
        LedgerNotFound: it is not there, or empty.
        NotPrivate, TooManyFiles
    """
    memory = open_private(name, write=write)
    return _mapped(name, memory, memory.size, write)


def _mapped(name: str, memory: posix_ipc.SharedMemory, size: int, write: bool) -> mmap.mmap:
    try:
        if not size:
            raise LedgerNotFound(f"shared memory {name} is empty")
        return mmap.mmap(memory.fd, size, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    except OSError as error:
        raise _refused(name, error) from error
    finally:
        memory.close_fd()
