"""Exports: every event in every format, and a timeline that obeys the rules of Perfetto's track events."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from pyarrow import parquet
from typer.testing import CliRunner

from kvledger import CacheConfig, CacheManager
from kvledger.cli import app
from kvledger.debugger import open_source
from kvledger.debugger.export import export as exporting
from kvledger.debugger.export.export import Format, export
from kvledger.debugger.export.output import CannotWrite
from kvledger.debugger.export.rows import COLUMNS, RENAMED
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from statemachine.events import (
    KINDS,
    AllocationRefused,
    BlocksEvicted,
    Event,
    HostPolicy,
    RequestMatched,
    Tier,
    TransferStarted,
)
from statemachine.state.state import State


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with real workers: transfers take time, and requests wait for them."""
    path = tmp_path_factory.mktemp("export") / "run.kvlog"
    options = RunOptions(device_blocks=400, host_blocks=800, layers=1, block_bytes=64, in_flight=4, record=path)
    Run(sample.generate(200, seed=1), options).execute(f"export-{os.getpid()}")
    return path


def events(path: Path) -> list[tuple[int, int, Event]]:
    with open_source(str(path)) as source:
        return [(entry.sequence, entry.time_ns, entry.event) for entry in source.entries()]


def written(path: Path, folder: Path, format: Format, **options: Any) -> Path:
    out = folder / f"out.{format}"
    with open_source(str(path)) as source:
        export(source, format, out, **options)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600 and os.listdir(folder) == [out.name]
    return out


def plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return value.tolist() if hasattr(value, "tolist") else value


def expect_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Every field of every event stands in its row."""
    expected = events(path)
    assert len(rows) == len(expected) > 1000
    for row, (sequence, time_ns, event) in zip(rows, expected, strict=True):
        assert (row["sequence"], row["time_ns"], row["kind"]) == (sequence, time_ns, type(event).__name__)
        assert row["transaction"] <= sequence
        for name, value in zip(event._fields, event):
            if name in ("reason", "tier", "direction", "outcome", "scope", "host_policy"):
                assert isinstance(row[name], str) and row[name].isupper()
            elif name == "words":
                assert row["words"] == np.frombuffer(value, np.int32).tolist()
            else:
                column = RENAMED.get((type(event).__name__, name), name)
                assert row[column] == plain(value), (sequence, name)
        assert sum(value is not None for value in row.values()) == 5 + len(event._fields)


def test_json_lines(recorded: Path, tmp_path: Path) -> None:
    out = written(recorded, tmp_path, Format.JSONL, words=True)
    expect_rows([json.loads(line) for line in out.read_text().splitlines()], recorded)


def test_parquet_in_row_groups(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ROW_GROUP", 500)
    out = written(recorded, tmp_path, Format.PARQUET, words=True)
    expect_rows(parquet.read_table(out).to_pylist(), recorded)
    with parquet.ParquetFile(out) as file:
        assert file.num_row_groups > 2 and file.schema_arrow.names == [column.name for column in COLUMNS]


def test_csv(recorded: Path, tmp_path: Path) -> None:
    out = written(recorded, tmp_path, Format.CSV, words=True)
    types = {column.name: column.type for column in COLUMNS}
    rows = []
    with open(out, newline="") as file:
        for row in csv.DictReader(file):
            kind = KINDS[next(number for number, event in KINDS.items() if event.__name__ == row["kind"])]
            own = {RENAMED.get((kind.__name__, name), name) for name in kind._fields}
            have = {"sequence", "transaction", "time_ns", "step", "kind"} | own
            assert all(not value for name, value in row.items() if name not in have)
            values = {name: value for name, value in row.items() if name in have}
            rows.append({name: v if types[name] == "text" else json.loads(v) for name, v in values.items()})
    expect_rows(rows, recorded)


@pytest.mark.parametrize("format", [Format.JSONL, Format.CSV, Format.PARQUET])
def test_words_stay_at_home_unless_asked_for(recorded: Path, tmp_path: Path, format: Format) -> None:
    out = written(recorded, tmp_path, format)
    if format == Format.PARQUET:
        assert "words" not in parquet.read_table(out).column_names
    else:
        assert "words" not in out.read_text()


def test_every_event_has_its_columns() -> None:
    names = {column.name for column in COLUMNS}
    for event in KINDS.values():
        assert {RENAMED.get((event.__name__, name), name) for name in event._fields} <= names


class Slice:
    """A slice as a reader of the trace sees it."""

    def __init__(self, track: int, depth: int, name: str, start: int) -> None:
        self.track, self.depth, self.name, self.start = track, depth, name, start
        self.end: int | None = None
        self.values: dict[str, object] = {}


class Read:
    """A reader that accepts only what Perfetto documents: tracks are declared before they are used, belong to a tree,
    and have one kind; slices of a track nest; packets of one sequence start with cleared state."""

    def __init__(self, path: Path) -> None:
        trace = Trace()
        trace.ParseFromString(path.read_bytes())
        packets = list(trace.packet)
        assert packets[0].sequence_flags == 1 and {p.trusted_packet_sequence_id for p in packets} == {1}
        clocks = {clock.clock_id: clock.timestamp for clock in packets[0].clock_snapshot.clocks}
        assert set(clocks) == {1, 6} and clocks[1] == clocks[6]
        self.names: dict[int, str] = {}
        self.parents: dict[int, int] = {}
        self.counters: dict[str, list[tuple[int, float]]] = {}
        self.instants: list[tuple[str, int, str]] = []
        self.slices: list[Slice] = []
        stacks: dict[int, list[Slice]] = {}
        counting: set[int] = set()
        for packet in packets[1:]:
            assert packet.WhichOneof("data") in ("track_descriptor", "track_event")
            if packet.HasField("track_descriptor"):
                track = packet.track_descriptor
                assert track.uuid not in self.names and track.name
                assert (track.parent_uuid in self.names) == (track.parent_uuid != 0) == (len(self.names) > 0)
                self.names[track.uuid], self.parents[track.uuid] = track.name, track.parent_uuid
                if track.HasField("counter"):
                    counting.add(track.uuid)
                    assert track.counter.unit_name
                continue
            event, time = packet.track_event, packet.timestamp
            assert packet.timestamp_clock_id == 6 and time >= clocks[6] and event.track_uuid in self.names
            assert (event.type == TrackEvent.TYPE_COUNTER) == (event.track_uuid in counting)
            name = self.names[event.track_uuid]
            values = {note.name: getattr(note, note.WhichOneof("value")) for note in event.debug_annotations}
            stack = stacks.setdefault(event.track_uuid, [])
            if event.type == TrackEvent.TYPE_COUNTER:
                field = event.WhichOneof("counter_value_field")
                self.counters.setdefault(name, []).append((time, getattr(event, field)))
            elif event.type == TrackEvent.TYPE_INSTANT:
                self.instants.append((name, time, event.name))
            elif event.type == TrackEvent.TYPE_SLICE_BEGIN:
                assert event.name and (not stack or stack[-1].start <= time)
                stack.append(Slice(event.track_uuid, len(stack), event.name, time))
                stack[-1].values.update(values)
                self.slices.append(stack[-1])
            else:
                assert event.type == TrackEvent.TYPE_SLICE_END and stack
                stack[-1].end = time
                stack.pop().values.update(values)
        self.open = sum(map(len, stacks.values()))

    def at_end(self, counter: str) -> float:
        return self.counters[counter][-1][1]


def count_of(state: State, tier: Tier) -> int:
    found = 0
    for node in state.nodes.values():
        copy = node.copies[tier]
        found += node.size if copy is not None else 0
    return found


def test_timeline(recorded: Path, tmp_path: Path) -> None:
    read = Read(written(recorded, tmp_path, Format.PERFETTO))
    log = events(recorded)
    kinds = Counter(type(event) for _, _, event in log)
    with open_source(str(recorded)) as source:
        state = source.at(source.last)
    requests = [piece for piece in read.slices if piece.name.startswith("request ")]
    assert len(requests) == kinds[RequestMatched] == 200 and read.open == 0
    assert len({piece.track for piece in requests}) == 200  # a track each
    begun = {event.request: (time, event) for _, time, event in log if isinstance(event, RequestMatched)}
    for piece in requests:
        number = piece.values["request"]
        assert isinstance(number, int)
        time, event = begun[number]
        assert piece.start == time and piece.end is not None and piece.name == f"request {event.key}"
        assert piece.values["device_hit_blocks"] == event.device_blocks and piece.values["reason"] == "finished"
        phases = [inner for inner in read.slices if inner.track == piece.track and inner.depth == 1]
        assert phases[0].start == piece.start and phases[-1].end == piece.end and phases[-1].name == "running"
        assert all(a.end == b.start and a.name != b.name for a, b in itertools.pairwise(phases))
    waits = {piece.name for piece in read.slices if piece.name.startswith("waiting")}
    assert waits == {"waiting for blocks to arrive", "waiting for blocks to leave"}
    transfers = [piece for piece in read.slices if "transfer" in piece.values]
    assert len(transfers) == kinds[TransferStarted] and {read.names[piece.track] for piece in transfers} == {
        "swap in",
        "swap out",
    }
    assert {piece.values["outcome"] for piece in transfers} == {"done"}
    assert len(read.instants) == kinds[BlocksEvicted] + kinds[AllocationRefused]
    for tier in Tier:
        label = tier.name.lower()
        assert read.at_end(f"{label} free") == len(state.pool(tier).free)
        assert read.at_end(f"{label} cached") == count_of(state, tier)
    assert read.at_end("device private") == 0
    assert max(value for _, value in read.counters["device private"]) > 0
    (rates,) = [values for name, values in read.counters.items() if name.startswith("hit rate")]
    assert all(0 <= value <= 100 for _, value in rates) and len(rates) > 50


def test_timeline_of_a_ledger_that_still_runs(tmp_path: Path) -> None:
    config = CacheConfig(block_size=4, device_blocks=12, host_blocks=8, host_policy=HostPolicy.WRITE_THROUGH)
    with CacheManager.create(f"export-{os.getpid()}", config) as manager:
        manager.admit("a", np.arange(16, dtype=np.int32))
        manager.cache("a")
        manager.admit("b", np.arange(16, dtype=np.int32))
        with pytest.raises(ValueError, match="device blocks wanted"):
            manager.allocate({"b": 100})
        out = tmp_path / "a.pftrace"
        done = CliRunner().invoke(app, ["export", manager.name, str(out), "--to", "perfetto"])
        assert done.exit_code == 0, done.output
    read = Read(out)
    assert read.open == 4  # two requests, each in a phase
    assert [name for name, _, _ in read.instants] == ["refused allocations"]
    assert read.at_end("device cached") == 4 and read.at_end("host cached") == 4 and read.at_end("device private") == 1


@pytest.mark.skipif(not shutil.which("trace_processor_shell"), reason="Perfetto's trace_processor_shell is not here")
def test_perfettos_own_trace_processor_agrees(recorded: Path, tmp_path: Path) -> None:
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    out = written(recorded, tmp_path, Format.PERFETTO)
    config = TraceProcessorConfig(bin_path=shutil.which("trace_processor_shell"))
    with TraceProcessor(trace=str(out), config=config) as processor:

        def one(query: str) -> int:
            return int(next(iter(processor.query(query))).n)

        assert one("select count(*) as n from slice where name glob 'request *'") == 200
        assert one("select count(*) as n from counter_track where name = 'device free'") == 1
        assert one("select coalesce(sum(value), 0) as n from stats where severity in ('error', 'data_loss')") == 0


def test_nothing_is_left_after_an_error(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int) -> None:
        if done > 500:
            raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "_ROW_GROUP", 100)
    for format in Format:
        with open_source(str(recorded)) as source, pytest.raises(KeyboardInterrupt):
            export(source, format, tmp_path / "out", progress=stop)
        assert not os.listdir(tmp_path)
    (tmp_path / "there").write_text("mine")
    with open_source(str(recorded)) as source, pytest.raises(CannotWrite, match="exists: remove it"):
        export(source, Format.CSV, tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine" and os.listdir(tmp_path) == ["there"]


def test_a_full_disk_is_one_line(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_jsonl", full)
    done = CliRunner().invoke(app, ["export", str(recorded), str(tmp_path / "a"), "--to", "jsonl"])
    assert done.exit_code == 2 and "No space left" in done.stderr and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here", "OUT", "--to", "csv"], "neither a .kvlog file nor a ledger"),
        (["SRC", "OUT", "--to", "xml"], "takes parquet, jsonl, csv, perfetto"),
        (["SRC", "/no/such/folder/a.csv", "--to", "csv"], "cannot write"),
        (["SRC", "/", "--to", "csv"], "exists"),
        (["SRC", "OUT", "--to", "perfetto", "--words"], "holds no words"),
    ],
)
def test_wrong_input(recorded: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    names = {"SRC": str(recorded), "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, ["export", *(names.get(part, part) for part in arguments)])
    assert done.exit_code == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not os.listdir(tmp_path)


def test_a_cut_recording_is_exported_up_to_its_end(recorded: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.kvlog"
    cut.write_bytes(recorded.read_bytes()[:-1])
    done = CliRunner().invoke(app, ["export", str(cut), str(tmp_path / "out"), "--to", "jsonl"])
    assert done.exit_code == 0 and "cut off or damaged" in done.stderr
    last = json.loads((tmp_path / "out").read_text().splitlines()[-1])["sequence"]
    assert done.stdout.startswith(f"{tmp_path / 'out'}: events 1 to {last:,}, ") and done.stdout.endswith(" MB\n")
