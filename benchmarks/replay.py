"""Events per second of a replay, and the time to any state of a long recording.

``python -m benchmarks.replay [TRACE]``: replays recordings of the trace (default: the sample), one tier and two.
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

from ipc import KvlogReader, KvlogWriter, LogReader
from kvledger import CacheConfig, CacheManager, sample, traces
from kvledger.recording import Recording
from kvledger.run import Run, RunOptions
from statemachine import codec
from statemachine.encoding import snapshot
from statemachine.events import HostPolicy
from statemachine.replay import replay

_BLOCKS, _BLOCK = 65_536, 16


def rate(trace: traces.Trace, policy: HostPolicy) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvlog"
        options = RunOptions(device_blocks=5000, host_blocks=25000, host_policy=policy, data=False, record=path)
        Run(trace, options).execute()
        reader = KvlogReader(path)
        begun = time.perf_counter()
        while reader.poll():
            pass
        floor = time.perf_counter() - begun
        rates = []
        for _ in range(5):
            begun = time.perf_counter()
            replayed = replay(KvlogReader(path))
            rates.append(replayed.events / (time.perf_counter() - begun))
        print(
            f"host tier {policy.name.lower():10} {replayed.events:,} events: {statistics.median(rates):,.0f} events/s, "
            f"{replayed.events / floor:,.0f} records/s read without applying them"
        )


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


def main() -> None:
    if sys.argv[1:2] == ["--seek"]:
        seek(int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000)
        return
    trace = traces.load(Path(sys.argv[1])) if len(sys.argv) > 1 else sample.generate(3000)
    for policy in (HostPolicy.OFF, HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH):
        rate(trace, policy)


if __name__ == "__main__":
    main()
