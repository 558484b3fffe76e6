"""Hits and evictions of ``run --no-data`` equal those of an independent implementation, request by request."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import KvlogReader
from kvledger.run import traces
from kvledger.run.run import Run, RunOptions
from statemachine.apply import apply, genesis
from statemachine.events import BlocksEvicted, HostPolicy
from statemachine.records.replay import event_of
from tests.statemachine.leaf_lru import Served, serve

TRACES = Path(os.environ.get("KVLEDGER_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
OUTPUTS = iter(range(1 << 30))


def run(path: Path, folder: Path, **options: object) -> tuple[list[dict[str, int]], Path]:
    number = next(OUTPUTS)
    hits, log = folder / f"{number}.jsonl", folder / f"{number}.kvlog"
    options = {"data": False, "host_policy": HostPolicy.OFF, "host_blocks": 0, **options}
    job = Run(traces.load(path), RunOptions(per_request=hits, record=log, **options))  # type: ignore[arg-type]
    summary = job.execute()
    assert summary.digest == summary.replay_digest
    return [json.loads(line) for line in hits.read_text().splitlines()], log


def evicted_ids(log: Path) -> list[int]:
    """The Mooncake ids that the device gave up, in order, from the log alone."""
    reader = KvlogReader(log)
    state = None
    ids: list[int] = []
    while records := reader.poll():
        for record in records:
            event = event_of(record)
            if state is None:
                state = genesis(event)
                continue
            if isinstance(event, BlocksEvicted) and event.tier == 0:
                for id, count in zip(event.nodes, event.counts):
                    words = np.frombuffer(state.nodes[id].words, np.int32)[::4]
                    ids += words[::-1][:count].tolist()
            apply(state, event)
    reader.close()
    return ids


def compare(path: Path, folder: Path, capacity: int, **options: object) -> None:
    requests = [json.loads(line) for line in path.read_text().splitlines()]
    in_flight = int(options.get("in_flight", 64))  # type: ignore[call-overload]
    clock = bool(options.get("trace_clock", False))
    expected, victims = serve(requests, capacity, in_flight=in_flight, clock=clock)
    rows, log = run(path, folder, device_blocks=capacity, **options)
    assert [Served(row["blocks"], row["device_hit"], bool(row["bypassed"])) for row in rows] == expected
    assert evicted_ids(log) == victims


@st.composite
def mooncake(draw: st.DrawFn) -> list[dict[str, object]]:
    """A small trace: paths in a random tree of ids."""
    parents = [-1]
    for id in range(1, draw(st.integers(2, 40))):
        parents.append(draw(st.integers(-1, id - 1)))
    requests = []
    now = 0
    for _ in range(draw(st.integers(1, 40))):
        id = draw(st.integers(0, len(parents) - 1))
        path = []
        while id >= 0:
            path.insert(0, id)
            id = parents[id]
        now += draw(st.integers(0, 3000))
        output = draw(st.integers(0, 100))
        requests.append({"timestamp": now, "input_length": 4, "output_length": output, "hash_ids": path})
    return requests


@given(mooncake(), st.integers(1, 24), st.integers(1, 8), st.booleans())
@settings(max_examples=60)
def test_random_traces(
    tmp_path: Path, requests: list[dict[str, object]], capacity: int, in_flight: int, clock: bool
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, requests)))
    compare(path, tmp_path, capacity, in_flight=in_flight, trace_clock=clock)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the Mooncake traces are not here")
@pytest.mark.parametrize("name", ["conversation_trace.jsonl", "synthetic_trace.jsonl"])
@pytest.mark.parametrize(
    ("capacity", "in_flight", "clock"), [(5000, 64, False), (1500, 1, False), (300, 16, True), (5000, 64, True)]
)
def test_real_traces(tmp_path: Path, name: str, capacity: int, in_flight: int, clock: bool) -> None:
    compare(TRACES / name, tmp_path, capacity, in_flight=in_flight, trace_clock=clock)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the Mooncake traces are not here")
def test_exclusive_host_tier_adds_its_size(tmp_path: Path) -> None:
    path = TRACES / "conversation_trace.jsonl"
    both, _ = run(path, tmp_path, device_blocks=5000, host_blocks=25000, host_policy=HostPolicy.EXCLUSIVE)
    device, _ = run(path, tmp_path, device_blocks=5000)
    large, _ = run(path, tmp_path, device_blocks=30000)
    assert [row["device_hit"] for row in both] == [row["device_hit"] for row in device]
    found = sum(row["device_hit"] + row["host_hit"] for row in both)
    assert abs(found - sum(row["device_hit"] for row in large)) <= 0.001 * found
