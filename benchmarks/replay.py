"""Events per second of a replay, and the time to any state of a long recording.

``python -m benchmarks.replay [--quick] [TRACE]``: replays recordings of the trace (default: Mooncake's conversations
where they are at hand, else the sample), one tier and two, and jumps around in a recording of 200,000 events.
``python -m benchmarks.replay --seek [EVENTS]``: records so many events of a cache of 65,536 blocks (default: 10
million; 7 GB of disk, ten minutes), opens the recording, and jumps around in it.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import figures as f
from ipc import KvlogReader, KvlogWriter, LogReader
from kvledger import CacheConfig, CacheManager, sample, traces
from kvledger.recording import Recording
from kvledger.run import Run, RunOptions
from statemachine import codec
from statemachine.encoding import snapshot
from statemachine.events import HostPolicy
from statemachine.replay import replay

_BLOCKS, _BLOCK = 65_536, 16
_CONVERSATION = Path(__file__).resolve().parents[2] / "shared" / "traces" / "conversation_trace.jsonl"


def rate(trace: traces.Trace, policy: HostPolicy, times: int = 5) -> tuple[list[float], list[float], int]:
    """Events per second applied, records per second only read, and events."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvlog"
        with_host = policy != HostPolicy.OFF
        options = RunOptions(
            device_blocks=5000, host_blocks=25000 * with_host, host_policy=policy, data=False, record=path
        )
        Run(trace, options).execute()
        applied, read = [], []
        for _ in range(times):
            reader = KvlogReader(path)
            begun = time.perf_counter()
            while reader.poll():
                pass
            floor = time.perf_counter() - begun
            begun = time.perf_counter()
            events = replay(KvlogReader(path)).events
            applied.append(events / (time.perf_counter() - begun))
            read.append(events / floor)
        return applied, read, events


def record(path: Path, events: int) -> None:
    """Requests of 8 to 64 blocks, half of them continuing an earlier one."""
    rng = np.random.default_rng(0)
    known = [rng.integers(0, 128_000, 16 * _BLOCK, np.int32) for _ in range(4096)]
    config = CacheConfig(block_size=_BLOCK, device_blocks=_BLOCKS)
    with CacheManager.create(f"seek-{os.getpid()}", config) as manager:
        reader = LogReader(manager.name)
        with KvlogWriter(path, schema_hash=codec.SCHEMA_HASH) as writer:
            number = 0
            while manager.next_sequence <= events:
                slot = int(rng.integers(len(known)))
                new = rng.integers(0, 128_000, int(rng.integers(8, 33)) * _BLOCK, np.int32)
                tokens = np.concatenate([known[slot], new]) if number % 2 else new
                known[slot] = tokens[: 32 * _BLOCK]
                key = str(number)
                manager.admit(key, tokens)
                manager.cache(key)
                manager.release(key)
                number += 1
                if not number % 512:
                    writer.write(reader.poll())
            writer.write(reader.poll())
        reader.close()


def seek(events: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.kvlog"
        begun = time.perf_counter()
        record(path, events)
        print(f"recorded {events:,} events in {time.perf_counter() - begun:.0f} s, {path.stat().st_size / 1e9:.2f} GB")
        begun = time.perf_counter()
        Recording(path).close()
        index = path.with_name(path.name + ".index").stat().st_size
        print(f"first opening: {time.perf_counter() - begun:.0f} s, index {index / 1e9:.2f} GB")
        begun = time.perf_counter()
        recording = Recording(path)
        print(f"second opening: {(time.perf_counter() - begun) * 1e3:.0f} ms")
        random.seed(0)
        times = []
        for _ in range(60):
            target = random.randint(1, recording.last)
            begun = time.perf_counter()
            state = recording.at(target)
            times.append((time.perf_counter() - begun) * 1e3)
        times.sort()
        print(f"seek: p50 {statistics.median(times):.0f} ms, longest of {len(times)} {times[-1]:.0f} ms")
        print(f"a snapshot of that cache: {len(snapshot(state)):,} bytes in {len(state.nodes):,} runs")
        recording.close()


def seeks(events: int) -> tuple[list[float], float]:
    """ms to each of 30 states of a recording of so many events, and ms of replaying it from its beginning."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.kvlog"
        record(path, events)
        with Recording(path) as recording:
            rng = random.Random(0)
            times = []
            for _ in range(30):
                target = rng.randint(recording.last // 10, recording.last)
                begun = time.perf_counter()
                recording.at(target)
                times.append((time.perf_counter() - begun) * 1e3)
        begun = time.perf_counter()
        replay(KvlogReader(path))
        return times, (time.perf_counter() - begun) * 1e3


def figures(quick: bool, trace: traces.Trace | None = None) -> tuple[list[f.Figure], list[str]]:
    """Replay rates beside reading alone, seeks beside a replay."""
    trace = trace or conversation(quick)
    made = []
    for policy in (HostPolicy.OFF, HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH):
        applied, read, events = rate(trace, policy, 1 if quick else 5)
        tiers = "one tier" if policy == HostPolicy.OFF else f"host tier {policy.name.lower().replace('_', '-')}"
        made.append(
            f.Figure(
                name=f"replay, {tiers}",
                unit="events/s",
                ours=statistics.median(applied),
                against="reading alone",
                theirs=statistics.median(read),
                ratios=f.faster(read, applied),
                at_least=150_000,
                details={"events": events},
            )
        )
    events = 2_000 if quick else 200_000
    times, whole = seeks(events)
    name = f"any state of {events:,} events, p50"
    made.append(f.figure_of(name, "ms", [statistics.median(times)], "replaying all", [whole], at_most=200.0))
    return made, []


def conversation(quick: bool = False) -> traces.Trace:
    """The Mooncake conversation trace where it is at hand, else the generated sample."""
    return (
        traces.load(_CONVERSATION) if _CONVERSATION.exists() and not quick else sample.generate(100 if quick else 3000)
    )


def main() -> None:
    if sys.argv[1:2] == ["--seek"]:
        seek(int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000)
        return
    paths = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
    f.show("replay", *figures("--quick" in sys.argv, traces.load(paths[0]) if paths else None))


if __name__ == "__main__":
    main()
