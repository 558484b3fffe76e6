"""What ``kvledger view`` knows of a log: pictures that follow it, windows, timelines."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipc import KvlogReader, KvlogWriter, snapshots
from kvledger import CacheConfig, CacheManager
from kvledger.debugger import SourceError, open_source
from kvledger.recordings.timeline import Timeline
from kvledger.view import log as view_log
from kvledger.view.log import Log
from kvledger.view.picture import Kind, Picture
from statemachine import commands
from statemachine.apply import genesis
from statemachine.decide import decide
from statemachine.errors import CommandRejected
from statemachine.events import KINDS, HostPolicy, LedgerOpened, Tier
from statemachine.records import codec
from statemachine.records.snapshot import restore, snapshot
from statemachine.state.ownership import owners
from statemachine.state.state import State
from tests.view.viewing import Page, played, record, showing

ROOT = Path(__file__).parents[2]


def traffic(policy: HostPolicy, seed: int, steps: int = 300) -> Iterator[tuple[State, Any]]:
    """Random commands of every kind: each event, and the state that it is about to meet."""
    ordinary = runpy.run_path(str(ROOT / "docs" / "generate.py"))["_command"]
    rng = random.Random(seed)
    host = (0, 0) if policy == HostPolicy.OFF else (8, 4)
    state = genesis(LedgerOpened(1, 12, *host, policy, 1, "", ""))
    tiers = [Tier.DEVICE] if policy == HostPolicy.OFF else list(Tier)
    for number in range(steps):
        rare: list[commands.Command] = [
            commands.Resize(rng.choice(tiers), rng.randrange(8, 16)),
            commands.LoseTier(rng.choice(tiers), "gone", "new"),
            commands.StartEpoch(state.epoch + 1, number),
        ]
        wanted = rng.choice(rare) if not number % 7 else ordinary(state, rng, number)
        if wanted is None:
            continue
        try:
            events = decide(state, wanted)
        except CommandRejected:
            continue
        for event in events:
            yield state, event


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_a_picture_that_follows_equals_one_that_is_painted_anew(policy: HostPolicy) -> None:
    seen: set[str] = set()
    for seed in range(12):
        picture = None
        for state, event in traffic(policy, seed):
            if picture is None:
                picture = Picture(state)
                page = Page(picture.keyframe())
            page.apply(picture.step(event))
            seen.add(type(event).__name__)
            anew = Picture(restore(snapshot(state)))
            assert not page.differs(Page(anew.keyframe())), event
    wanted = {kind.__name__ for kind in KINDS.values()}
    wanted -= {"LedgerOpened", "AllocationRefused", "WorkerJoined", "WorkerLost", "DigestTaken", "WeightsLoaded"}
    wanted -= {"WindowPassed", "SideAllocated", "SideFreed"}  # this traffic has one group of layers
    wanted -= {"BlocksChosen", "EngineDeparted"}  # and no manager is recorded in it
    if policy == HostPolicy.OFF:
        wanted -= {"TransferStarted", "TransferFinished", "QuarantineEnded"}
    assert wanted <= seen


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_every_block_is_drawn_as_its_owner_has_it(policy: HostPolicy) -> None:
    """Against :func:`statemachine.state.ownership.owners`, which knows nothing of pictures."""
    kinds: dict[str, set[Kind]] = {
        "free": {Kind.FREE},
        "run": {Kind.PINNED, Kind.EVICTABLE, Kind.ARRIVING},
        "request": {Kind.PRIVATE},
        "transfer": {Kind.HELD},
        "quarantined": {Kind.QUARANTINED},
    }
    drawn: Counter[int] = Counter()
    for seed in range(5):
        picture = None
        for state, event in traffic(policy, seed):
            picture = picture or Picture(state)
            picture.step(event)
            page = Page(picture.keyframe())
            for tier in Tier:
                for name, ids in owners(state, state.place(tier)):
                    number = 0 if name == "free list" else int(re.findall(r"\d+", name)[-1])
                    for block in ids:
                        kind, owner = (array[block] for array in page.blocks[tier.name.lower()])
                        assert kind in kinds[name.split()[0]] and owner == number, (event, tier, block, name)
                        drawn[kind] += 1
    assert set(drawn) >= {Kind.FREE, Kind.PRIVATE, Kind.PINNED, Kind.EVICTABLE}
    if policy == HostPolicy.EXCLUSIVE:
        assert set(drawn) == set(Kind)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "run.kvlog"
    record(path)
    return path


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    with showing(path) as log:
        yield log


def test_a_window_played_to_any_event_is_the_state_there(path: Path, log: Log) -> None:
    with open_source(str(path)) as source:
        for at in (1, 2, 256, 257, 700, 701, 512, log.last):  # on from the last window, and back
            assert not played(log, at).differs(Page(Picture(source.at(at)).keyframe())), at
    window = json.loads(log.window(300))
    assert [event["n"] for event in window["events"]] == [*range(257, 513)]
    assert all(event["text"] and event["t"] > 1e12 for event in window["events"])
    for outside in (0, log.last + 1):
        with pytest.raises(SourceError, match="has the events 1 to"):
            log.window(outside)


def test_a_timeline_counts_every_event_and_samples_states(path: Path, log: Log, monkeypatch: Any) -> None:
    monkeypatch.setattr(view_log, "_EXACT", 0)
    with open_source(str(path)) as source:
        kinds = Counter(type(entry.event).__name__ for entry in source.entries())
        whole = log.timeline(1, log.last, 40)
        assert {name: sum(counts) for name, counts in whole["kinds"].items() if sum(counts)} == kinds
        assert len(whole["last"]) <= 40 and whole["start"] == 1 and whole["last"][-1] == log.last
        for i in (0, len(whole["last"]) // 2, -1):
            state = source.at(whole["last"][i])
            assert whole["device_free"][i] == len(state.device.pool.free)
            assert whole["device_evictable"][i] == state.device.evictable
            assert whole["host_free"][i] == len(state.host.pool.free) and whole["requests"][i] == len(state.requests)
            assert whole["device_room_min"][i] <= whole["device_free"][i] + whole["device_evictable"][i]
        state = source.at(log.last)
        assert sum(whole["queried_blocks"]) == state.counters.queried_blocks
        assert sum(whole["device_evicted_blocks"]) == state.counters.device_evicted_blocks > 0
        part = log.timeline(300, 600, 10)
        assert part["start"] <= 300 and part["last"][-1] >= 600 and len(part["last"]) < 10
        assert sum(map(sum, part["kinds"].values())) == part["last"][-1] - part["start"] + 1


def test_a_close_look_at_a_timeline_is_exact(path: Path, log: Log) -> None:
    close = log.timeline(300, 399, 100)
    assert close["start"] == 300 and close["last"] == [*range(300, 400)]
    with open_source(str(path)) as source:
        for at in (300, 350, 399):
            assert close["device_free"][at - 300] == len(source.at(at).device.pool.free)
        assert sum(close["queried_blocks"]) == (
            source.at(399).counters.queried_blocks - source.at(299).counters.queried_blocks
        )


def test_ten_million_events_are_a_few_thousand_buckets() -> None:
    state = genesis(LedgerOpened(1, 12, 0, 0, HostPolicy.OFF, 1, "", ""))
    timeline = Timeline()
    for last in range(128, 10_000_001, 128):
        timeline.add(last, last, [2] * 128, state)
    timeline = Timeline.unpack(timeline.pack())
    whole = timeline.buckets(1, 10_000_000, 1500)
    assert len(whole["last"]) == 1500 and sum(whole["kinds"]["RequestMatched"]) == 10_000_000
    assert timeline.buckets(5_000_000, 5_000_500, 1500)["start"] <= 5_000_000
    assert timeline.buckets(20_000_000, 20_000_001, 10)["last"] == []
    for damaged in (b"", b"nonsense", timeline.pack()[:-3]):
        with pytest.raises(ValueError, match="timeline"):
            Timeline.unpack(damaged)


def test_a_log_that_contradicts_itself_is_shown_up_to_there(path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(view_log, "_EXACT", 0)
    reader = KvlogReader(path)
    records = reader.poll()
    reader.close()
    dropped = next(r.sequence for r in records if r.sequence > 400 and KINDS[r.kind].__name__ == "BlocksCached")
    kept = [r for r in records if r.sequence != dropped]
    wrong = tmp_path / "wrong.kvlog"
    with KvlogWriter(wrong, schema_hash=codec.SCHEMA_HASH) as writer:
        writer.write([r._replace(sequence=i, flags=3) for i, r in enumerate(kept, 1)])
    with showing(wrong) as log:
        said = log.summary()["contradiction"]
        assert dropped <= log.last + 1 < len(records) - 1 and f"event {log.last + 1}" in said
        window = json.loads(log.window(log.last))
        assert window["events"][-1]["n"] == log.last
        assert [event["n"] for event in window["beyond"]] == [*range(log.last + 1, log.last + 21)]
        assert json.loads(log.window(1))["beyond"] == []
        assert log.timeline(1, log.last, 10)["last"][-1] == log.last
        with pytest.raises(SourceError):
            log.window(log.last + 1)


def test_a_ledger_that_has_dropped_its_beginning_is_shown_from_its_snapshot_on() -> None:
    name = f"view-cut-{os.getpid()}"
    config = CacheConfig(device_blocks=64, ranks=0, segment_bytes=64 << 10, retain_bytes=128 << 10)
    with CacheManager.create(name, config) as manager:
        number = 0
        while open_source(name).first == 1:
            manager.admit(str(number), np.arange(number, number + 640, dtype=np.int32))
            manager.release(str(number))
            number += 1
        manager._retention.stop()  # its snapshots are what usually remains
        for sequence in snapshots.sequences(name):
            snapshots.remove(name, sequence)
        with showing(name) as log, pytest.raises(SourceError, match="there is no state to show"):
            log.prepare()
        known = manager.next_sequence - 1
        snapshots.write(name, known, snapshot(manager.state))
        manager.admit("x", np.arange(40, dtype=np.int32))
        with showing(name) as log:
            log.prepare()
            assert log.summary()["first"] == known + 1 and log.last == manager.next_sequence - 1
            assert not played(log, log.last).differs(Page(Picture(restore(snapshot(manager.state))).keyframe()))
            timeline = log.timeline(1, log.last, 100)
            assert timeline["start"] == known + 1 and sum(timeline["queried_blocks"]) == 2
        snapshots.remove(name, known)
