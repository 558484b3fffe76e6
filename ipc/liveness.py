"""Whether a process of a ledger lives: it holds a lock that the kernel gives up when the last of its threads is gone.

Each process locks bytes of an object in shared memory for as long as it may write to the ledger or its pools: the
engine those of its control segment, a reader its line, a worker, pusher or auditor its signals. Such a lock means the
same to everybody who sees the object, in whatever PID or time namespace, and nothing about it has to be read from
``/proc``. It is an open file description lock (``fcntl(2)``): asking about one disturbs nobody, closing another
descriptor of the object does not lose it, and it is given up after the memory of the process is unmapped, so once it is
free nothing is written any more.

Nobody is taken for dead on other grounds. Where a lock is held, numbers may prove that its *owner* is dead all the same
(:func:`life_of`): a child that was forked and has not called ``exec`` yet holds it a moment longer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Self

from ipc.errors import LedgerError, TooManyFiles
from ipc.memory import open_own
from ipc.processes import Identity, Life, life_by_number

_FLOCK = struct.Struct("hhxxxxqqixxxx")
"""``struct flock`` on 64-bit Linux: type, whence, start, length, pid."""
_locks: dict[int, Lock] = {}
"""Of this process, by descriptor: a fork gives them up, they are its parent's."""


class NoLocks(LedgerError):
    """This system gives no locks by which processes could know of each other whether they live."""


class Lock:
    """An open file description of an object, and the locks on bytes of it that this process holds through it.

    Args:
        fd: of the object, open for writing; it belongs to the lock from now on, and nobody may have mapped it: a
            mapping would keep the locks.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        _locks[fd] = self

    @classmethod
    def on(cls, name: str, identity: int | None = None) -> Self:
        """A lock on a ledger's object. ``identity``: of the ledger; default: of the one that is there now.

        Raises:
            ipc.LedgerNotFound, ipc.NotPrivate, ipc.TooManyFiles
        """
        return cls(open_own(name, write=True, identity=identity)[0].fd)

    @classmethod
    def beside(cls, fd: int) -> Self:
        """A lock on the object that a descriptor stands for, whatever has become of its name.

        Raises:
            ipc.TooManyFiles, ipc.LedgerError
        """
        try:
            return cls(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyFiles(
                    "shared memory cannot be locked, too many files are open: raise the limit"
                ) from error
            raise LedgerError(f"shared memory cannot be opened once more through /proc: {error.strerror}") from error

    def take(self, start: int = 0, length: int = 1) -> bool:
        """Lock bytes, unless somebody else has; returns whether this lock has them.

        Raises:
            NoLocks
        """
        try:
            self._call(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, start, length)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, says POSIX
            return False
        return True

    def give_back(self, start: int = 0, length: int = 1) -> None:
        """Unlock bytes."""
        self._call(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, start, length)

    def is_taken(self, start: int = 0, length: int = 1) -> bool:
        """Whether somebody has locked one of these bytes, other than through this object.

        Raises:
            NoLocks
        """
        return self._call(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, length) != fcntl.F_UNLCK

    def _call(self, command: int, kind: int, start: int, length: int) -> int:
        try:
            answer = fcntl.fcntl(self.fd, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise NoLocks(
                    f"the system gives no open file description locks on shared memory ({error.strerror}): kvledger "
                    "needs them to know which processes live; a sandbox that forbids fcntl(F_OFD_SETLK) has to allow it"
                ) from error
            raise
        return int(_FLOCK.unpack(answer)[0])

    def disown(self) -> None:
        """This process is a fork of the one that holds the locks: go on with a description of its own, without any."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # rather no descriptor than its parent's locks
            self.close()
            return
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        """Give up all of it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:  # twice: the number may be another file's by now
            _locks.pop(fd, None)
            os.close(fd)


def life_of(locked: bool, owner: Identity) -> Life:
    """What is known of the owner of a lock: a free one is proof of its death."""
    if not locked or life_by_number(owner) is Life.DEAD:
        return Life.DEAD
    return Life.ALIVE


def _in_child() -> None:
    for lock in list(_locks.values()):
        lock.disown()


os.register_at_fork(after_in_child=_in_child)
