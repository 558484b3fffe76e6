"""The recorder: files that stand for themselves, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipc import KvlogReader, Overrun
from kvledger import CacheManager
from kvledger.recordings.recording import Recording
from statemachine.records.replay import Replay
from statemachine.records.snapshot import restore, state_digest
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.test_auditor import SMALL, config, drain, serve
from workers.followers.auditor import Auditor
from workers.followers.recorder import Recorder


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    with CacheManager.create(f"record-{os.getpid()}", config()) as manager:
        yield manager


def read(path: Path, cut_off: bool = False) -> tuple[Replay, int, int]:
    """A file replayed alone: its state, its first event and the one after its last."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    reader = KvlogReader(path)
    replay = Replay(restore(reader.snapshot) if reader.snapshot else None)
    while records := reader.poll():
        replay.feed(records)
    first, after = reader.base_sequence, reader.place.sequence
    assert reader.damage is None or cut_off
    reader.close()
    return replay, first, after


def record_all(recorder: Recorder) -> None:
    while recorder.step():
        pass


def test_files_stand_for_themselves_and_follow_each_other(manager: CacheManager, tmp_path: Path) -> None:
    recorder = Recorder(manager.name, tmp_path / "x.kvlog", rotate_bytes=3000)
    for first in range(0, 600, 20):
        serve(manager, first, 20)
        record_all(recorder)
        recorder.flush()
        recorder._written_at = 0.0  # as if a second had gone by
    manager.take_digest()
    record_all(recorder)
    recorder.close()
    assert len(recorder.files) > 3 and recorder.files[1].name == "x.0001.kvlog"
    assert sorted(tmp_path.iterdir()) == sorted(recorder.files)
    expected = 1
    for path in recorder.files:
        replay, first, after = read(path)
        assert first == expected
        expected = after
    assert expected == manager.next_sequence and state_digest(replay.state) == manager.digest()
    assert replay.digests == 1
    with Recording(recorder.files[2]) as opened:
        assert state_digest(opened.at(opened.last)) == state_digest(restore_of(recorder.files[3]))


def restore_of(path: Path) -> object:
    reader = KvlogReader(path)
    state = restore(reader.snapshot)
    reader.close()
    return state


def test_rotated_by_age(manager: CacheManager, tmp_path: Path) -> None:
    recorder = Recorder(manager.name, tmp_path / "x.kvlog", rotate_s=0.001)
    for first in range(3):
        serve(manager, first, 1)
        recorder._written_at = 0.0
        time.sleep(0.002)
        recorder.step()
    recorder.close()
    assert len(recorder.files) == 4 and read(recorder.files[0])[1] == 1


def test_a_late_recorder_begins_at_the_oldest_snapshot(manager: CacheManager, tmp_path: Path) -> None:
    serve(manager, 0, 600)
    one = Auditor(manager.name, snapshot_bytes=SMALL)
    drain(one)
    manager._writer._retain_bytes = 3 * SMALL
    serve(manager, 600, 200)
    manager._writer._helper.submit(int).result()
    recorder = Recorder(manager.name, tmp_path / "x.kvlog")
    began = recorder.follower.sequence
    assert began > 0
    record_all(recorder)
    drain(one)
    serve(manager, 800, 600)  # the recorder sleeps, and is overrun
    drain(one)
    serve(manager, 1400, 200)
    manager._writer._helper.submit(int).result()
    record_all(recorder)
    wait_until("the recorder notes what it has missed", lambda: recorder.skipped, meanwhile=recorder.step)
    record_all(recorder)
    recorder.close()
    one.close()
    (skipped,) = recorder.skipped
    first, second = recorder.files
    assert read(first)[1:] == (began + 1, skipped.first)
    replay, begins, after = read(second)
    assert begins == skipped.last + 1 and after == manager.next_sequence
    assert state_digest(replay.state) == manager.digest()


def test_a_broken_ledger_is_recorded_to_its_end(manager: CacheManager, tmp_path: Path) -> None:
    serve(manager, 0, 10)
    manager.state.counters.requests += 1
    manager.take_digest()
    serve(manager, 10, 10)
    recorder = Recorder(manager.name, tmp_path / "x.kvlog", rotate_bytes=100)
    record_all(recorder)
    recorder.close()
    assert "another digest" in recorder.broken and len(recorder.files) == 1
    reader = KvlogReader(tmp_path / "x.kvlog")
    assert len(reader.poll()) == manager.next_sequence - 1
    reader.close()


def test_an_overrun_without_a_snapshot_is_an_error(manager: CacheManager, tmp_path: Path) -> None:
    recorder = Recorder(manager.name, tmp_path / "x.kvlog")
    manager._writer.on_rotation = None
    manager._writer._retain_bytes = SMALL
    serve(manager, 0, 900)
    manager._writer._helper.submit(int).result()
    with pytest.raises(Overrun):
        record_all(recorder)
    recorder.follower.close = lambda: None  # type: ignore[method-assign]
    recorder.close()


def start(ledger: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kvledger.cli", "record", ledger, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None])
def test_however_it_ends_the_file_ends_with_a_whole_transaction(
    manager: CacheManager, tmp_path: Path, end: signal.Signals | None
) -> None:
    path = tmp_path / "x.kvlog"
    process = start(manager.name, path)
    served = 0

    def serve_more() -> None:
        nonlocal served
        serve(manager, served, 20)
        served += 20

    wait_until(
        "something is recorded",
        lambda: path.exists() and path.stat().st_size > 2000,
        meanwhile=serve_more,
        pause_s=0.02,
    )
    if end is None:
        last = manager.next_sequence
        wait_until("all is recorded", lambda: read(path, cut_off=True)[2] == last, pause_s=0.05)
        manager.close()
    else:
        process.send_signal(end)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == (-signal.SIGKILL if end == signal.SIGKILL else 0), errors
    _, _, after = read(path, cut_off=end == signal.SIGKILL)
    assert after > 100
    if end is None:
        assert after == last
    if end != signal.SIGKILL:
        assert f"{after - 1:,} events" in output


def test_a_ledger_that_is_removed_while_its_recorder_sleeps(manager: CacheManager, tmp_path: Path) -> None:
    recorder = Recorder(manager.name, tmp_path / "x.kvlog")
    serve(manager, 0, 900)  # several segments, of which it has mapped the first
    last = manager.next_sequence
    manager.close()
    record_all(recorder)
    assert recorder.follower.ended() and 1 < recorder.follower.missed_from < last
    missed_from = recorder.follower.missed_from
    recorder.close()
    assert read(tmp_path / "x.kvlog")[2] == missed_from and not recorder.skipped


def test_bad_input_is_one_line(manager: CacheManager, tmp_path: Path) -> None:
    (tmp_path / "there.kvlog").write_bytes(b"")
    for ledger, path, text in (
        ("there-is-none", tmp_path / "x.kvlog", "there is no ledger"),
        (manager.name, tmp_path / "there.kvlog", "exists"),
        (manager.name, tmp_path / "no" / "x.kvlog", "No such file"),
    ):
        process = start(ledger, path)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 2 and text in errors and "Traceback" not in errors and errors.count("\n") == 1


_SMALL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from kvledger.cli import main
sys.argv = ["kvledger", "record", sys.argv[1], sys.argv[2], "--once"]
main()
"""


def test_a_disk_without_room_leaves_a_file_that_can_be_read(manager: CacheManager, tmp_path: Path) -> None:
    serve(manager, 0, 900)
    path = tmp_path / "x.kvlog"
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, manager.name, str(path)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2 and "File too large" in done.stderr and "Traceback" not in done.stderr
    reader = KvlogReader(path)
    reader.poll()
    assert reader.damage is not None and path.stat().st_size == 3000
    reader.close()
