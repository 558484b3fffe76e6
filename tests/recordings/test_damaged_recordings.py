"""Damaged and cut-off recordings: what is intact is used, what is missing is said, no command calls them sound."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ipc import KvlogReader, KvlogWriter, LogCorrupt
from kvledger.cli import app
from kvledger.cli.sources import _NO_END
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions


def the_byte(path: Path) -> int:
    """The one that is spoiled: behind it is a third of the file."""
    return path.stat().st_size * 2 // 3


def kvledger(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.kvlog"
    Run(sample.generate(400), RunOptions(data=False, record=path)).execute(f"damaged-{os.getpid()}")
    return path


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[the_byte(path)] ^= 0xFF
    path.write_bytes(data)


def cut(path: Path, sound: Path) -> None:
    path.write_bytes(sound.read_bytes()[: the_byte(sound)])


@pytest.fixture(params=["damaged", "cut off", "damaged after it was indexed"])
def damaged(request: pytest.FixtureRequest, sound: Path, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.kvlog"
    shutil.copy(sound, path)
    if request.param == "cut off":
        cut(path, sound)
        return path
    if request.param == "damaged after it was indexed":
        assert kvledger("check", path).exit_code == 0
    spoil(path)
    return path


def intact(path: Path) -> tuple[int, int]:
    """How many events can be read, and the byte from which on nothing can."""
    reader = KvlogReader(path)
    events = sum(len(records) for records in iter(reader.poll, []))
    reader.close()
    assert reader.damage is not None and events > 3
    return events, reader.damage.offset


COMMANDS: list[tuple[str, ...]] = [
    ("check",),
    ("replay",),
    ("replay", "--decide"),
    ("what-if",),
    ("what-if", "--curve"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_command_calls_it_sound(command: tuple[str, ...], damaged: Path, sound: Path) -> None:
    name, *options = command
    done = kvledger(name, damaged, *options)
    assert done.exit_code == 2 and done.stdout, done.output
    read, at = intact(damaged)
    said = f"note: {damaged} at byte {at}: cut off or damaged here: "
    is_cut = damaged.stat().st_size < sound.stat().st_size
    lost = f"nothing after event {read} can be read" if is_cut else f"events {read + 1} to "
    assert said + lost in done.stderr
    assert "the answer holds for what was read only" in done.stderr
    done = kvledger(name, damaged, *options, "--json")
    assert done.exit_code == 2 and json.loads(done.stdout)["damaged_at"] == at
    done = kvledger(name, sound, *options, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["damaged_at"] is None and not done.stderr


def test_only_what_was_read_is_counted(damaged: Path) -> None:
    read, _ = intact(damaged)
    assert kvledger("check", damaged).stdout.startswith(f"{read:,} events, all invariants hold")
    assert json.loads(kvledger("check", damaged, "--json").stdout)["full_checks"] == 1
    told = kvledger("replay", damaged).stdout
    assert told.startswith(f"{read:,} events, ") and f"digest after event {read}: " in told


def test_questions_about_a_state(damaged: Path, sound: Path) -> None:
    """A state that can be had is shown; one that can not is an error, and not waited for."""
    _, at = intact(damaged)
    for command in (("leaks", damaged), ("show", damaged), ("explain", damaged, "block", 3)):
        done = kvledger(*command)
        assert f"at byte {at}: cut off or damaged here" in done.stderr
        if done.exit_code == 0:
            assert command[0] != "leaks" and "note: " in done.stderr
        else:
            assert done.exit_code == 2 and ("error " in done.stderr) == (not done.stdout)
    explained: dict[str, Any] = json.loads(kvledger("explain", sound, "block", 3, "--json").stdout)
    assert explained["damaged_at"] is None


def test_what_is_intact_is_shown(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.kvlog"
    cut(path, sound)
    read, at = intact(path)
    leaks = kvledger("leaks", path, "--json")
    assert leaks.exit_code == 2
    told = json.loads(leaks.stdout)
    assert told["damaged_at"] == at and told["leaks"]
    assert json.loads(kvledger("explain", path, "block", 0, "--json").stdout)["damaged_at"] == at
    assert kvledger("log", path).exit_code == 0, "it shows what there is, and answers nothing"
    target = tmp_path / "out.kvlog"
    done = kvledger("redact", path, target)
    assert done.exit_code == 2 and f"{read:,} events in " in done.stdout and f"at byte {at}" in done.stderr
    assert kvledger("check", target).exit_code == 0
    done = kvledger("export", path, tmp_path / "out.csv", "--to", "csv")
    assert (
        done.exit_code == 0
        and "note: " in done.stderr
        and len((tmp_path / "out.csv").read_text().splitlines()) == 1 + read
    )
    never = kvledger("bisect", path, "--predicate", f"sequence > {read}", "--json")
    assert never.exit_code == 2 and json.loads(never.stdout)["damaged_at"] == at, "it may be true in what is missing"
    assert kvledger("bisect", path, "--predicate", "sequence > 3").exit_code == 0
    assert kvledger("diff", path, path).exit_code == 2
    assert kvledger("diff", path, sound).exit_code == 1
    assert kvledger("diff", f"{path}@4", f"{sound}@4").exit_code == 0, "later events do not change a state"


def test_what_is_wrong_is_wrong_whatever_is_missing(tmp_path: Path) -> None:
    whole, path = tmp_path / "early.kvlog", tmp_path / "cut.kvlog"
    command = [sys.executable, "-m", "examples.garbled", "early", str(whole)]  # plants a bug, in its own process
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    reader = KvlogReader(whole)
    records = reader.poll()
    reader.close()
    with KvlogWriter(path, schema_hash=reader.schema_hash) as writer:
        writer.write(records)
        size = writer.size
        writer.write([records[-1]._replace(sequence=records[-1].sequence + 1)])
    path.write_bytes(path.read_bytes()[: size + 20])
    done = kvledger("check", path, "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["violation"]["event"]["sequence"] == 170 and told["damaged_at"] == size


def test_nothing_at_all_can_be_read(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.kvlog"
    path.write_bytes(sound.read_bytes()[:100])
    for command in ("check", "replay", "leaks", "what-if", "show", "log"):
        done = kvledger(command, path)
        assert done.exit_code == 2 and "holds no event that can be read" in done.stderr, (command, done.output)


def test_a_reader_that_asks_for_more_than_there_is_does_not_wait(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.kvlog"
    cut(path, sound)
    reader = KvlogReader(path)
    while reader.poll():
        pass
    with pytest.raises(LogCorrupt, match="cut off or damaged"):
        reader.poll()
    reader.close()
    reader = KvlogReader(path)
    assert reader.seek_damage() is not None
    reader.close()
    reader = KvlogReader(sound)
    assert reader.seek_damage() is None
    reader.close()


def test_a_recording_without_an_end_mark_is_used_and_said_to_be_unfinished(sound: Path, tmp_path: Path) -> None:
    """As a killed recorder leaves it, or a copy that stopped between two chunks."""
    path = tmp_path / "unfinished.kvlog"
    reader = KvlogReader(sound)
    with KvlogWriter(path, schema_hash=reader.schema_hash) as writer:
        for records in iter(lambda: reader.poll(1), []):
            writer.write(records)
            size = writer.size
    reader.close()
    done = kvledger("check", path)
    assert (
        done.exit_code == 0
        and not done.stderr
        and not json.loads(kvledger("check", path, "--json").stdout)["unfinished"]
    )
    path.write_bytes(path.read_bytes()[:size])
    for name, *options in COMMANDS:
        done = kvledger(name, path, *options)
        assert done.exit_code == 0 and done.stderr == f"note: {path} {_NO_END}\n"
        told = json.loads(kvledger(name, path, *options, "--json").stdout)
        assert told["unfinished"] and told["damaged_at"] is None
    target = tmp_path / "out.kvlog"
    assert kvledger("redact", path, target).exit_code == 0
    assert json.loads(kvledger("check", target, "--json").stdout)["unfinished"], "redacted it is no more whole"


def test_what_could_not_be_written_is_not_said_to_be_ended(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "full.kvlog"
    reader = KvlogReader(sound)
    records = reader.poll()
    reader.close()
    with KvlogWriter(path, schema_hash=reader.schema_hash) as writer:
        writer.write(records[:3])
        with pytest.raises(AttributeError):
            writer.write([*records[3:6], None])  # type: ignore[list-item]
    reader = KvlogReader(path)
    assert reader.poll() == records[:3] and reader.damage is None and not reader.ended
    reader.close()
