"""Events per second of a single-threaded replay from a file: reading, decoding and applying, without checks.

``python -m benchmarks.replay [TRACE]`` records a run of a trace (default: 3,000 requests of the sample).
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from ipc import KvlogReader
from kvledger import sample, traces
from kvledger.replay import replay
from kvledger.run import Run, RunOptions


def main() -> None:
    trace = traces.load(Path(sys.argv[1])) if len(sys.argv) > 1 else sample.generate(3000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.kvlog"
        Run(trace, RunOptions(device_blocks=5000, host_blocks=25000, data=False, record=path)).execute()
        size = path.stat().st_size
        reader = KvlogReader(path)
        begun = time.perf_counter()
        replayed = replay(reader)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        path.read_bytes()
        floor = time.perf_counter() - begun
        print(f"{replayed.events:,} events, {size:,} bytes: {replayed.events / seconds:,.0f} events/s,")
        print(f"{seconds / floor:,.0f} times as long as reading the file")


if __name__ == "__main__":
    main()
