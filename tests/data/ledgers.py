"""Ledgers as they lay in shared memory, one per event table: packed by who wrote them, laid out again by tests."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from ipc.names import SHM
from ipc.ownership import STAMP_BYTES, read_stamp, stamp
from kvledger import CacheConfig, CacheManager

_NAME = "NAME"
CONFIG = CacheConfig(block_size=4, device_blocks=64, segment_bytes=64 << 10, retain_bytes=None)
PROMPT = [*range(1, 18)]


def written(name: str) -> str:
    """Leave a ledger with something cached, two requests under way and one event behind its last digest; the digest."""
    with CacheManager.create(name, CONFIG) as manager:
        for number in range(20):
            manager.admit(f"r{number}", [*PROMPT, number, number])
            manager.commit({f"r{number}": 19})
            if number < 18:
                manager.release(f"r{number}")
        manager.take_digest()
        digest = manager.digest().hex()
        manager.close(keep=True)
    return digest


def objects(name: str) -> list[str]:
    """The files of a ledger in shared memory."""
    return sorted(file for file in os.listdir(SHM) if file.startswith(f"{name}."))


def pack(name: str, path: Path) -> None:
    """Keep a ledger's files under a name for all, and remove them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in objects(name):
            entry = file.replace(name, _NAME, 1)
            archive.writestr(zipfile.ZipInfo(entry), _renamed(Path(SHM, file), file, entry), zipfile.ZIP_DEFLATED)
    remove(name)


def remove(name: str) -> None:
    """Remove a ledger's files, whoever wrote them."""
    for file in objects(name):
        Path(SHM, file).unlink()


def lay_out(path: Path, name: str) -> None:
    """Put a packed ledger into shared memory under another name."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        for entry in archive.namelist():
            file = entry.replace(_NAME, name, 1)
            data = _renamed(Path(archive.extract(entry, folder)), entry, file)
            with open(Path(SHM, file), "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as target:
                target.write(data)


def _renamed(path: Path, old: str, new: str) -> bytes:
    """What is in a file, stamped for another name: the stamp at its end is made of the name."""
    data = path.read_bytes()
    with path.open("rb") as file:
        identity = read_stamp(file.fileno(), len(data), old)
    assert identity is not None, old
    return data[:-STAMP_BYTES] + stamp(new, identity)
