"""Which objects in shared memory are a ledger's own.

Anybody on the machine may make a file in ``/dev/shm``, under any name that is free. So an object counts as a ledger's
only if this user owns it and it carries the ledger's *stamp* behind its last byte::

    magic u64 | identity u64 | crc32c of its name u32, crc of these 20 bytes u32

The identity is random, and drawn with the control segment: what has another one belonged to a ledger of that name
which is long gone. Where something else stands in the place of a name, an object gets the name with ``~`` and a random
number behind it; whoever looks for the name finds it there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

import posix_ipc
from crc32c import crc32c

from ipc.errors import LedgerError, NotPrivate, TooManyFiles
from ipc.names import SHM, check_log_name, control_name, ledger_of

TOO_MANY = (errno.EMFILE, errno.ENFILE)
_STAMP = struct.Struct("<8sQI")
STAMP_BYTES = _STAMP.size + 4
_MAGIC = b"kvlstamp"
_ELSEWHERE = re.compile(r"~[0-9a-f]{8}$")
_SEGMENT = r"[0-9]{1,18}\.[0-9]{1,18}"
_BELL = re.compile(r"bell\.\d{1,3}")


class Own(NamedTuple):
    """An object of this user that carries a stamp, or a doorbell of one of his logs."""

    name: str
    """What it is called, without a slash; of a doorbell the file's name."""
    file: str
    """Name of its file in ``/dev/shm``."""
    identity: int
    """Of the ledger that it belongs to; 0: of a doorbell, or it was made where there was no ledger."""
    bytes: int


def new_identity() -> int:
    """A random one, never 0."""
    return int.from_bytes(os.urandom(8), "little") | 1


def stamp(name: str, identity: int) -> bytes:
    """What an object of that name ends with."""
    data = _STAMP.pack(_MAGIC, identity, crc32c(name.lstrip("/").encode()))
    return data + crc32c(data).to_bytes(4, "little")


def read_stamp(fd: int, size: int, name: str) -> int | None:
    """The identity with which an open object of ``size`` bytes is stamped; ``None``: none, or one of another name."""
    data = os.pread(fd, STAMP_BYTES, size - STAMP_BYTES) if size >= STAMP_BYTES else b""
    if len(data) != STAMP_BYTES or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        return None
    magic, identity, crc = _STAMP.unpack(data[:-4])
    return identity if magic == _MAGIC and crc == crc32c(name.lstrip("/").encode()) else None


def listing() -> list[str]:
    """All files in ``/dev/shm``.

    Raises:
        TooManyFiles
    """
    try:
        return os.listdir(SHM)
    except OSError as error:
        raise TooManyFiles(f"{SHM} cannot be read: {error.strerror}") from error


def places(name: str) -> Iterator[str]:
    """The files, without a slash, in which an object may be: the one of its name, then those beside it."""
    name = name.lstrip("/")
    yield name
    yield from sorted(file for file in listing() if file.startswith(f"{name}~") and _ELSEWHERE.search(file))


def _look(file: str) -> Own | None:
    """A file's object; ``None``: it is not this user's, or has no stamp."""
    try:
        memory = posix_ipc.SharedMemory("/" + file, read_only=True)
    except (posix_ipc.Error, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in TOO_MANY:
            raise TooManyFiles(f"{SHM / file} cannot be looked at: {error.strerror}") from error
        return None
    try:
        status = os.fstat(memory.fd)
        name = _ELSEWHERE.sub("", file)
        if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
            return None
        identity = read_stamp(memory.fd, status.st_size, name)
        return None if identity is None else Own(name, file, identity, status.st_size)
    finally:
        memory.close_fd()


def identity_of(name: str) -> int:
    """The identity of the ledger that an object or log belongs to by its name; 0: there is no such ledger."""
    found = _look(control_name(ledger_of(name))[1:])
    return 0 if found is None else found.identity


def find(name: str, identity: int) -> str | None:
    """The file, without a slash, of the object that has this name and identity."""
    for file in places(name):
        found = _look(file)
        if found is not None and found.identity == identity:
            return file
    return None


def stamped(pattern: str = ".*") -> list[Own]:
    """All objects of this user that carry a stamp, and whose whole name matches a regular expression."""
    wanted = re.compile(pattern)
    files = [file for file in sorted(listing()) if wanted.fullmatch(_ELSEWHERE.sub("", file))]
    return [found for file in files if (found := _look(file)) is not None]


def objects_of(log: str, identity: int | None = None) -> list[Own]:
    """What belongs to a ledger, or to a log of its, doorbells included; by default of the ledger that is there now.

    Where there is none: of all that ever had this name.
    """
    return [*_objects_of(log, identity, ".*"), *_bells(log + ".")]


def _objects_of(log: str, identity: int | None, pattern: str) -> list[Own]:
    wanted = identity_of(check_log_name(log)) if identity is None else identity
    found = stamped(re.escape(log + ".") + pattern)
    return [own for own in found if own.identity == wanted or not wanted]


def _bells(prefix: str) -> Iterator[Own]:
    """Semaphores have no room for a stamp; a log has 128 of them at most, under numbered names of its own."""
    for file in sorted(listing()):
        name = file.removeprefix("sem.")
        if name != file and name.startswith(prefix) and _BELL.fullmatch(".".join(name.split(".")[-2:])):
            with contextlib.suppress(FileNotFoundError):
                status = os.lstat(SHM / file)
                if status.st_uid == os.geteuid():
                    yield Own(file, file, 0, status.st_size)


def segments_of(log: str, identity: int | None = None) -> list[tuple[int, int]]:
    """``(epoch, index)`` of the log segments that exist, oldest first."""
    names = {own.name for own in _objects_of(log, identity, _SEGMENT)}
    parts = (name[len(log) + 1 :].split(".") for name in names)
    return sorted((int(epoch), int(index)) for epoch, index in parts)


def log_bytes(log: str) -> int:
    """Size of the log segments that exist."""
    return sum(own.bytes for own in _objects_of(log, None, _SEGMENT))


def ledger_names() -> list[str]:
    """Names of this user's ledgers on this machine."""
    suffix = control_name("")[1:]
    return [own.name.removesuffix(suffix) for own in stamped(r"[^.]+" + re.escape(suffix))]


def unlink(name: str) -> None:
    """Remove the file that has this name, whatever it is; it may be gone already.

    Raises:
        NotPrivate: it is another user's.
    """
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        pass
    except posix_ipc.PermissionsError:
        raise NotPrivate(f"{SHM / name.lstrip('/')} belongs to another user and cannot be removed") from None
    except OSError as error:
        raise LedgerError(f"{SHM / name.lstrip('/')} cannot be removed: {error.strerror}") from error


def remove_object(name: str, identity: int) -> None:
    """Remove the object with this name and identity, if it is there."""
    if (file := find(name, identity)) is not None:
        unlink("/" + file)


def remove_objects(log: str, identity: int | None = None) -> None:
    """Remove everything that belongs to a ledger, or to a log of its. The caller has made sure that nobody uses it.

    Its control segment goes last: as long as something is left it can be found by it.
    """
    control = control_name(log)[1:]
    for own in sorted(objects_of(log, identity), key=lambda own: (own.name == control, own.file)):
        if own.file.startswith("sem."):
            with contextlib.suppress(posix_ipc.Error):
                posix_ipc.unlink_semaphore("/" + own.file.removeprefix("sem."))
        else:
            unlink("/" + own.file)
