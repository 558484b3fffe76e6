"""Snapshot objects in shared memory: complete, intact, or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ipc import Control, LedgerNotFound, LogCorrupt, snapshots
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects


@pytest.fixture
def ledger() -> Iterator[str]:
    name = f"snap-{os.getpid()}"
    yield name
    remove_objects(name)


def test_the_newest_intact_snapshot_is_found(ledger: str) -> None:
    assert snapshots.newest(ledger) is None and snapshots.sequences(ledger) == []
    for sequence in (7, 300, 40):
        snapshots.write(ledger, sequence, b"state %d" % sequence)
    assert snapshots.sequences(ledger) == [7, 40, 300]
    assert snapshots.newest(ledger) == (300, b"state 300")
    assert snapshots.newest(ledger, at_or_before=299) == (40, b"state 40")
    assert all((SHM / f"{ledger}.snapshot.{n}").stat().st_mode & 0o777 == 0o600 for n in (7, 40, 300))
    snapshots.remove(ledger, 300)
    snapshots.remove(ledger, 300)
    assert snapshots.newest(ledger) == (40, b"state 40")
    with pytest.raises(LedgerNotFound):
        snapshots.read(ledger, 300)


@pytest.mark.parametrize("offset", [0, 9, 17, 25, 29, 33, -1])
def test_a_damaged_snapshot_is_passed_over(ledger: str, offset: int) -> None:
    snapshots.write(ledger, 1, b"older")
    snapshots.write(ledger, 2, b"newer, damaged below")
    with open(SHM / f"{ledger}.snapshot.2", "r+b") as file:
        file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(LogCorrupt if offset >= 0 else LedgerNotFound):  # the last byte says whose it is
        snapshots.read(ledger, 2)
    assert snapshots.newest(ledger) == (1, b"older")
    (SHM / f"{ledger}.snapshot.2").unlink()


def test_a_half_written_snapshot_is_not_seen(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object, **options: object) -> None:
        assert snapshots.sequences(ledger) == [] and not objects_of(ledger)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", killed)
    with pytest.raises(KeyboardInterrupt):
        snapshots.write(ledger, 5, b"state")
    assert snapshots.sequences(ledger) == [] and not objects_of(ledger)


def test_a_ledger_that_is_removed_while_a_snapshot_is_written(ledger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not become a snapshot of the ledger that has the name now."""
    first = Control.create(ledger, 1)
    remove_objects(ledger, first.identity)
    second = Control.create(ledger, 1)
    snapshots.write(ledger, 3, b"state", first.identity)
    assert snapshots.sequences(ledger) == [] and [own.name for own in objects_of(ledger)] == [f"{ledger}.control"]
    snapshots.remove(ledger, 3, first.identity)
    first.close()
    second.close()
