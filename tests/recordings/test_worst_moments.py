"""Recordings at the worst moment: full disks, media that cannot be written to, flipped bytes, files that lie."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from crc32c import crc32c
from typer.testing import CliRunner

from ipc import KvlogReader, KvlogWriter, Record
from ipc.record import TXN_BEGIN, TXN_END
from kvledger.cli import app
from kvledger.debugger import SourceError, open_source
from kvledger.recordings import recording
from kvledger.recordings.recording import Recording
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from statemachine.events import HostPolicy, LedgerOpened, PoolResized
from statemachine.records import codec
from statemachine.records.snapshot import state_digest
from statemachine.state.state import MOST_BLOCKS


def kvledger(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About ten chunks, and more than one kept state."""
    path = tmp_path_factory.mktemp("sound") / "sound.kvlog"
    Run(sample.generate(1_000), RunOptions(data=False, record=path)).execute(f"worst-{os.getpid()}")
    return path


def chunks(path: Path) -> list[tuple[int, int, int]]:
    """Offset, first event and last event of each chunk."""
    reader = KvlogReader(path)
    found = []
    offset = reader.place.offset
    while events := reader.poll(1):
        found.append((offset, events[0].sequence, events[-1].sequence))
        offset = reader.place.offset
    reader.close()
    return found


def everything(path: Path) -> tuple[list[Record], list[str]]:
    """All that can be read, and what was said about what cannot."""
    reader = KvlogReader(path)
    records: list[Record] = []
    damage = []
    while True:
        while found := reader.poll(1):
            records += found
        if reader.damage is None:
            break
        damage.append(str(reader.damage))
        if not reader.resume():
            break
    reader.close()
    return records, damage


# where nothing can be written


@pytest.mark.parametrize("stage", ["making a file", "writing", "taking its place"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_an_index_that_cannot_be_kept_is_no_error(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, everywhere: bool
) -> None:
    path = tmp_path / "here" / "full.kvlog"
    path.parent.mkdir()
    shutil.copy(sound, path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    full = OSError(28, "No space left on device")
    if stage == "making a file":
        mkstemp = tempfile.mkstemp

        def making(dir: object = None, prefix: str = "") -> tuple[int, str]:
            if everywhere or dir == path.parent:
                raise full
            return mkstemp(dir=str(dir), prefix=prefix)

        monkeypatch.setattr(tempfile, "mkstemp", making)
    elif stage == "writing":
        build = recording.build

        def building(reader: object, upcast: object, identity: object, file: object, progress: object) -> None:
            if hasattr(file, "name") and (everywhere or not str(file.name).startswith(str(elsewhere))):
                if everywhere or not building.failed:  # type: ignore[attr-defined]
                    building.failed = True  # type: ignore[attr-defined]
                    raise full
            build(reader, upcast, identity, file, progress)  # type: ignore[arg-type]

        building.failed = False  # type: ignore[attr-defined]
        monkeypatch.setattr(recording, "build", building)
    else:

        def replacing(source: object, target: object) -> None:
            raise full

        monkeypatch.setattr(os, "replace", replacing)
    with Recording(path) as one, Recording(sound) as other:
        assert one.last == other.last and state_digest(one.at(one.last)) == state_digest(other.at(other.last))
        assert one.spans("device", 3) == other.spans("device", 3) and one.timeline() is not None
    assert [entry.name for entry in path.parent.iterdir()] == ["full.kvlog"] and not list(elsewhere.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_all_commands_read_on_a_full_disk(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    size = sound.stat().st_size + (64 << 10)
    if os.system(f"mount -t tmpfs -o size={size} none {small} 2>/dev/null"):
        pytest.skip("this place lets nobody mount a file system")
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    try:
        path = small / "a.kvlog"
        shutil.copy(sound, path)
        with contextlib.suppress(OSError), open(small / "fill", "wb", 0) as file:
            while True:
                file.write(os.urandom(4096))
        for name in ("log", "check", "replay", "show"):
            done = kvledger(name, path)
            assert done.exit_code == 0 and not done.stderr, (name, done.stderr)
        assert {entry.name for entry in small.iterdir()} == {"a.kvlog", "fill"}
    finally:
        os.system(f"umount {small}")


# one flipped byte


def test_a_flipped_byte_costs_one_chunk(sound: Path, tmp_path: Path) -> None:
    """In the header of the chunk, in its body, at their borders: what comes after it is read all the same."""
    places = chunks(sound)
    assert len(places) > 4
    whole, _ = everything(sound)
    path = tmp_path / "flipped.kvlog"
    for (offset, first, last), (end, *_) in list(pairwise(places))[:3]:
        for at in (offset, offset + 4, offset + 12, offset + 31, offset + 32, offset + 40, end - 1):
            data = bytearray(sound.read_bytes())
            data[at] ^= 0x40
            path.write_bytes(data)
            records, damage = everything(path)
            assert records == [record for record in whole if not first <= record.sequence <= last], at
            assert len(damage) == 1
            assert f"at byte {offset}: cut off or damaged here: events {first} to {last} cannot be read" in damage[0]
            assert f"it goes on with event {last + 1}" in damage[0]


def test_several_places_and_the_last_chunk(sound: Path, tmp_path: Path) -> None:
    places = chunks(sound)
    data = bytearray(sound.read_bytes())
    for number in (1, 2, 4, len(places) - 1):
        data[places[number][0] + 50] ^= 1
    path = tmp_path / "flipped.kvlog"
    path.write_bytes(data)
    records, damage = everything(path)
    missing = {n for number in (1, 2, 4, len(places) - 1) for n in range(places[number][1], places[number][2] + 1)}
    whole, _ = everything(sound)
    assert records == [record for record in whole if record.sequence not in missing]
    assert len(damage) == 3 and f"events {places[1][1]} to {places[2][2]} cannot be read" in damage[0]
    assert f"nothing after event {places[-2][2]} can be read" in damage[2]


def test_what_commands_say_behind_damage(sound: Path, tmp_path: Path) -> None:
    places = chunks(sound)
    offset, first, last = places[2]
    data = bytearray(sound.read_bytes())
    data[offset + 60] ^= 1
    path = tmp_path / "flipped.kvlog"
    path.write_bytes(data)
    said = f"note: {path} at byte {offset}: cut off or damaged here: events {first} to {last} cannot be read"
    lines = kvledger("log", sound, "--json").stdout.splitlines()
    for _ in range(2):  # also with an index that is there
        done = kvledger("log", path, "--json")
        assert done.exit_code == 0 and said in done.stderr
        assert done.stdout.splitlines() == lines[: first - 1] + lines[last:]
    done = kvledger("log", path, "--from", last + 5, "--to", last + 9, "--json")
    assert done.stdout.splitlines() == lines[last + 4 : last + 9]
    for words in (["--kind", "RequestMatched"], ["--block", "3"]):
        of_them = kvledger("log", sound, *words, "--json").stdout.splitlines()
        expected = [line for line in of_them if not first <= json.loads(line)["sequence"] <= last]
        assert kvledger("log", path, *words, "--json").stdout.splitlines() == expected
    done = kvledger("check", path, "--json")
    assert done.exit_code == 2 and json.loads(done.stdout)["events"] == first - 1
    assert json.loads(done.stdout)["violation"] is None, "the log is damaged, it contradicts nothing"
    with open_source(str(path)) as source, open_source(str(sound)) as other:
        assert source.last == other.last and source.last_state == first - 1 and not source.contradiction
        assert source.intact() == [(1, first - 1), (last + 1, source.last)]
        assert state_digest(source.at(first - 1)) == state_digest(other.at(first - 1))
        with pytest.raises(SourceError, match=f"no state is known after event {first - 1}: .*at byte {offset}"):
            source.at(last + 1)
    done = kvledger("show", path, "--at", last + 1)
    assert done.exit_code == 2 and f"no state is known after event {first - 1}" in done.stderr


# files that ask for more than they are


def test_a_search_for_the_next_chunk_is_bounded_by_the_file(sound: Path, tmp_path: Path) -> None:
    """Intact headers that name large bodies, one in the other: each is read once, not each with all behind it."""
    begin = chunks(sound)[1][0]
    head = struct.Struct("<IIIIQI")
    lies = bytearray()
    count = 20_000
    for number in range(count):
        header = head.pack(1, 64, 44 * (count - number), 0, 1_000_000 + number, 7)
        lies += header + crc32c(header).to_bytes(4, "little") + b"\x28\xb5\x2f\xfd" + bytes(8)
    path = tmp_path / "lies.kvlog"
    path.write_bytes(sound.read_bytes()[:begin] + b"x" + lies)
    reader = KvlogReader(path)
    read = 0
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        nonlocal read
        read += size
        return pread(fd, size, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", counting)
        while reader.poll(1):
            pass
    assert reader.damage is not None and not reader.resume()
    reader.close()
    assert read < 8 * path.stat().st_size + (4 << 20)


def small_file(path: Path, *events: object) -> None:
    """A recording of these events that is made of nothing but them."""
    with KvlogWriter(path, schema_hash=codec.SCHEMA_HASH) as writer:
        records = []
        for sequence, event in enumerate(events, 1):
            kind, subject, args, payload = codec.encode(event)
            args = args.ljust(codec.ARGS_BYTES, b"\0")
            records.append(Record(sequence, 0, kind, TXN_BEGIN | TXN_END, 0, subject, args, payload))
        writer.write(records)


MANY = MOST_BLOCKS
LARGE = [
    [LedgerOpened(16, MANY, 0, 0, HostPolicy.OFF, 0, "", "")],
    [LedgerOpened(16, 10, MANY // 2, MANY // 2, HostPolicy.EXCLUSIVE, 0, "", "")],
    [LedgerOpened(16, 10, 0, 0, HostPolicy.OFF, 0, "", ""), PoolResized(0, MANY)],
]


@pytest.mark.parametrize("events", LARGE)
def test_a_small_file_with_huge_pools_is_refused_by_all_that_read_it(tmp_path: Path, events: list[object]) -> None:
    path = tmp_path / "small.kvlog"
    small_file(path, *events)
    assert path.stat().st_size < 400
    for name in ("check", "log", "show", "redact"):
        done = kvledger(name, path, *([tmp_path / "out.kvlog"] if name == "redact" else []))
        assert done.exit_code == 2 and f"event {len(events)} wants pools of" in done.stderr, (name, done.stderr)
        assert "a file of" in done.stderr and "it is damaged, or made to use up memory" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["small.kvlog"]


def test_a_small_file_with_the_pools_of_a_large_engine_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small.kvlog"
    small_file(path, LedgerOpened(16, 4 << 20, 3 << 20, 1 << 20, HostPolicy.EXCLUSIVE, 0, "", ""))
    with Recording(path) as one:
        state = one.at(1)
        assert state.device.pool.free[-1] == 0 and state.device.pool.free[0] == (4 << 20) - 1
