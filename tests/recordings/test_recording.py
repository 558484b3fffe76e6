"""Recordings: every state of a .kvlog file, found through its index."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ipc import KvlogReader, LedgerError
from kvledger.recordings import index, recording
from kvledger.recordings.recording import Recording
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from statemachine.records.replay import Replay
from statemachine.records.snapshot import state_digest


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "SNAPSHOT_EVERY", 300)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.kvlog"
    options = RunOptions(device_blocks=400, host_blocks=800, data=False, in_flight=4, record=path)
    Run(sample.generate(800, seed=3), options).execute()
    return path


def digests(path: Path) -> dict[int, bytes]:
    """By sequence, from a plain replay."""
    reader = KvlogReader(path)
    replay = Replay()
    found = {}
    while records := reader.poll():
        for record in records:
            replay.feed([record])
            if not record.sequence % 97:
                found[record.sequence] = state_digest(replay.state)
    reader.close()
    return found


def test_any_state_equals_the_one_of_a_plain_replay(path: Path) -> None:
    expected = digests(path)
    with Recording(path) as opened:
        assert len(opened._places) > 3 and not opened.damage
        for sequence in sorted(expected, key=lambda sequence: sequence * 7919 % 1000):
            assert state_digest(opened.at(sequence)) == expected[sequence]
        assert opened.first == 1 and opened.last - 97 < max(expected) <= opened.last
        for outside in (0, opened.last + 1):
            with pytest.raises(IndexError, match="holds the events 1 to"):
                opened.at(outside)


def test_the_index_is_built_once_and_only_for_its_recording(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = path.with_name("run.kvlog.index")
    Recording(path).close()
    assert stat.S_IMODE(index.stat().st_mode) == 0o600 and sorted(os.listdir(path.parent)) == [path.name, index.name]
    built = index.read_bytes()
    Recording(path).close()
    assert index.read_bytes() == built
    for damaged in (b"", b"nonsense", built[:-100]):
        index.write_bytes(damaged)
        with Recording(path) as opened:
            opened.at(1000)
        assert index.read_bytes() != damaged
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with Recording(path) as opened:
        assert opened.damage and opened.last < max(digests_last(whole, path))
        assert state_digest(opened.at(97)) == digests(path)[97]


def digests_last(whole: bytes, path: Path) -> list[int]:
    path.with_name("whole.kvlog").write_bytes(whole)
    with Recording(path.with_name("whole.kvlog")) as opened:
        return [opened.last]


def test_a_folder_that_cannot_be_written_to(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = recording.tempfile.mkstemp

    def refuse(*arguments: object, **named: object) -> object:
        if "dir" in named:
            raise PermissionError("read-only")
        return real(*arguments, **named)

    monkeypatch.setattr(recording.tempfile, "mkstemp", refuse)
    with Recording(path) as opened:
        opened.at(opened.last)
    assert os.listdir(path.parent) == [path.name]


def test_what_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot read"):
        Recording(tmp_path / "absent.kvlog")
    (tmp_path / "text.kvlog").write_text("hello")
    with pytest.raises(LedgerError, match=r"not a \.kvlog file"):
        Recording(tmp_path / "text.kvlog")
