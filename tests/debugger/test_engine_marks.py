"""Marks: what an engine notes of itself, and what ``kvledger check --engine`` finds in it."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.garbled import mistakes
from examples.scheduler.__main__ import SIZES, expected, traffic
from examples.scheduler.model import CountingModel, MarkingModel
from examples.scheduler.scheduler import Scheduler
from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy, Marks
from kvledger.cli import app
from kvledger.debugger import SourceError, open_source
from kvledger.debugger.verify.engine import check_engine, read_marks
from statemachine.events import RequestReleased


def told(name: str, folder: Path) -> tuple[int, dict[str, Any], str]:
    path = folder / f"{name}.kvlog"
    guilty = mistakes.record(name, path)
    words = ["check", str(path), "--engine", str(path.with_suffix(".marks"))]
    plain, found = (CliRunner().invoke(app, [*words, *more]) for more in ([], ["--json"]))
    assert plain.exit_code == found.exit_code == 1 and "all invariants hold" in plain.stdout, plain.output
    assert CliRunner().invoke(app, words[:2]).exit_code == 0, "the log itself is sound"
    (mistake,) = json.loads(found.stdout)["engine"]
    return guilty, mistake, plain.stdout


def test_kv_that_is_written_before_the_request_is_ready(tmp_path: Path) -> None:
    guilty, mistake, text = told("before_ready", tmp_path)
    assert (mistake["kind"], mistake["sequence"], mistake["request"]) == ("not ready", guilty, "again")
    with open_source(str(tmp_path / "before_ready.kvlog")) as source:
        waits = sorted(source.at(guilty).requests[3].waits_for)
    assert (
        f"before transfers {waits[0]} and {waits[1]} have ended" in text
        and f"event {guilty}, step 3: request 'again' writes" in text
    )
    assert "by MainThread at mistakes.py:" in text and ", row 0" in text


def test_blocks_that_are_published_and_never_computed(tmp_path: Path) -> None:
    guilty, mistake, text = told("ahead", tmp_path)
    assert (mistake["kind"], mistake["sequence"], mistake["request"]) == ("not computed", guilty, "gone")
    assert mistake["blocks"] == [4, 5, 6, 7, 8, 9] and "only its first 4 blocks are" in text
    assert mistake["by"].startswith("MainThread at mistakes.py:")


def test_a_block_table_that_is_older_than_its_last_change(tmp_path: Path) -> None:
    guilty, mistake, text = told("stale", tmp_path)
    assert (mistake["kind"], mistake["request"]) == ("old table", "slow")
    assert f"since event {guilty}: its table is older than that" in text


def test_the_use_of_blocks_after_their_release_and_who_released_them(tmp_path: Path) -> None:
    guilty, mistake, text = told("other_released", tmp_path)
    assert (mistake["kind"], mistake["request"]) == ("released", "running")
    assert f"after it was released at event {guilty} (finished) by MainThread at mistakes.py:" in text


@pytest.mark.parametrize("host", [0, 80])
def test_a_sound_engine_is_accused_of_nothing_and_each_wrong_block_is_found(host: int, tmp_path: Path) -> None:
    policy = HostPolicy.EXCLUSIVE if host else HostPolicy.OFF
    config = CacheConfig(device_blocks=80, host_blocks=host, host_policy=policy, **SIZES)  # type: ignore[arg-type]
    name, path = f"marks-{os.getpid()}", tmp_path / "engine.marks"
    requests = traffic(80, seed=3)
    texts = [expected(request) for request in requests]
    with CacheManager.create(name, config) as manager, Marks(manager, path) as marks:
        scheduler = Scheduler(
            marks.manager, MarkingModel(CountingModel(config, manager.pools), marks, config.block_size)
        )
        for request in requests:
            scheduler.submit(request)
        while scheduler.waiting or scheduler.running:
            scheduler.step()
        assert [request.tokens for request in requests] == texts
        with open_source(name) as source:
            assert check_engine(source, read_marks(path, name), source.last) == []
            noted = list(read_marks(path, name))
            begun = Counter(name for mark in noted if mark.what == "admit" for name in mark.values[0])
            once = {name for name, times in begun.items() if times == 1}  # never preempted: all of it is published
            computed = [m for m in noted if m.what == "computed" and len(m.values[3]) > 1 and m.values[0] in once]
            assert {"admit", "grow", "commit", "release", "append", "computed", "read"} <= {mark.what for mark in noted}
            assert {mark.step for mark in noted} == set(range(1, scheduler.number + 1))
            wrong = computed[len(computed) // 2]
            turned = [mark._replace(values=_swapped(mark.values)) if mark is wrong else mark for mark in noted]
            (mistake,) = check_engine(source, iter(turned), source.last)
            assert (mistake.kind, mistake.sequence, mistake.request) == (
                "not in the table",
                wrong.sequence,
                wrong.values[0],
            )
            place = next(i for i, mark in enumerate(noted) if mark.what == "computed" and mark.values[1] >= 4)
            again, (_, table, _) = noted[place], noted[place + 1].values
            over = again._replace(values=[again.values[0], 0, again.values[2], table, -1])
            found = check_engine(source, iter([*noted[:place], over, *noted[place + 1 :]]), source.last)
            assert [(one.kind, one.request) for one in found] == [("shared", again.values[0])]
            accused = [
                {one.request for one in check_engine(source, (m for m in noted if m is not mark), source.last)}
                for mark in computed[:8]
            ]
            assert all(found <= {mark.values[0]} for found, mark in zip(accused, computed))
            assert sum(map(bool, accused)) > 4, "what another request cached meanwhile need not be computed"
            ended = {
                entry.event.request: entry.sequence
                for entry in source.entries()
                if isinstance(entry.event, RequestReleased)
            }
            late = [mark._replace(sequence=max(ended.values())) if mark is wrong else mark for mark in noted]
            late.sort(key=lambda mark: mark.sequence)
            assert "released" in {found.kind for found in check_engine(source, iter(late), source.last)}


def _swapped(values: list[Any]) -> list[Any]:
    name, start, stop, blocks, row = values
    return [name, start, stop, blocks[::-1], row]


def test_who_calls_is_noted_from_any_thread(tmp_path: Path) -> None:
    path = tmp_path / "calls.marks"
    with CacheManager.create(f"calls-{os.getpid()}", CacheConfig(block_size=4, device_blocks=8)) as manager:
        with Marks(manager, path) as marks, marks.manager as same:
            same.admit("a", [1, 2, 3, 4, 5])
            other = threading.Thread(target=same.release, args=("a",), name="client")
            other.start()
            other.join()
            assert same.stats() and same.config is manager.config
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        calls = {mark.what: mark.by for mark in read_marks(path, manager.name)}
        assert calls["admit"].startswith("MainThread at test_engine_marks.py:")
        assert calls["release"].startswith("client at ")


def test_a_file_that_is_there_is_not_written_and_one_that_is_none_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "there.marks"
    path.write_text("something of somebody\n")
    with CacheManager.create(f"there-{os.getpid()}", CacheConfig(block_size=4, device_blocks=8)) as manager:
        with pytest.raises(ConfigError, match="is there already"):
            Marks(manager, path)
        with pytest.raises(ConfigError, match="cannot be written"):
            Marks(manager, tmp_path / "no" / "folder")
        good = tmp_path / "good.marks"
        with Marks(manager, good) as marks:
            marks.computed("a", 0, 4, [3])
    with pytest.raises(SourceError, match="no file of marks"):
        list(read_marks(path, ""))
    with pytest.raises(SourceError, match="is about ledger"):
        list(read_marks(good, "another"))
    good.write_bytes(good.read_bytes() + b'["computed", 1')  # its writer was killed
    assert len(list(read_marks(good, ""))) == 1
    good.write_bytes(good.read_bytes() + b"]\n")
    with pytest.raises(SourceError, match="line 3"):
        list(read_marks(good, ""))


@pytest.mark.parametrize(
    "line",
    [
        b'["computed", 1, 0, ["a"], 0, 4, [3], -1, "by"]',
        b'["computed", 1, 0, "a", "0", 4, [3], -1, "by"]',
        b'["computed", 1, 0, "a", 0, 4, 3, -1, "by"]',
        b'["read", 1, 0, "a", [[3]], -1, "by"]',
        b'["read", 1, 0, "a", [3], null, "by"]',
        b'["read", Infinity, 0, "a", [3], -1, "by"]',
        b'["release", 1, 0, 7, "by"]',
        b'["release", 1, 0, [["a"]], "by"]',
        b'["release", 1, 0, ["a"], 7]',
        b'[["release"], 1, 0, ["a"], "by"]',
        b"[" * 100_000,
    ],
    ids=lambda line: line[:60].decode(),
)
def test_marks_that_nobody_can_have_written_are_refused_by_their_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "hostile.marks"
    path.write_bytes(b'["kvledger marks 1", "a"]\n' + line + b"\n")
    with pytest.raises(SourceError, match="line 2"):
        list(read_marks(path, "a"))


def test_an_engine_goes_on_where_its_marks_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk ends the marks and not the engine; a name of another type is the manager's to answer."""
    path = tmp_path / "full.marks"
    with CacheManager.create(f"full-{os.getpid()}", CacheConfig(block_size=4, device_blocks=8)) as manager:
        with Marks(manager, path) as marks, marks.manager as same:
            same.admit(tokens=[1, 2, 3, 4, 5], request_id="a")
            assert same.commit({b"a": 5}) == [b"a"]  # type: ignore[dict-item,comparison-overlap]

            def full(file: int, data: bytes) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr("kvledger.manager.marks.os.write", full)
                same.commit({"a": 5})
            same.release("a")
        assert not manager.state.requests and "end here, and the engine goes on: No space left" in caplog.text
    noted = [(mark.what, mark.values) for mark in read_marks(path, "")]
    assert noted == [("admit", [["a"]]), ("commit", [[]])]
