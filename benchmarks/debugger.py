"""The debugger on a long recording: first opening, seeking, explaining, checking, memory.

``python -m benchmarks.debugger [EVENTS]``: records so many events of a cache of 65,536 blocks (default: 1 million;
about 0.3 GB of disk per million, and as much for the index), then asks questions all over it.
"""

from __future__ import annotations

import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.replay import record
from kvledger.debugger import Source, open_source
from kvledger.debugger.checking import check_log
from kvledger.debugger.explain import explain_block, explain_hash, explain_request
from kvledger.debugger.hashes import hash_of
from statemachine.events import Tier

_QUESTIONS = 25
_CHECKED = 100_000


def timed(name: str, question: Callable[[Source, int], object], source: Source) -> None:
    """Wall time and, for busy machines, CPU time."""
    random.seed(0)
    wall, cpu = [], []
    for _ in range(_QUESTIONS):
        at = random.randint(source.last // 10, source.last)
        begun, used = time.perf_counter(), time.process_time()
        question(source, at)
        wall.append((time.perf_counter() - begun) * 1e3)
        cpu.append((time.process_time() - used) * 1e3)
    line = f"p50 {statistics.median(wall):4.0f} ms, longest of {len(wall)} {max(wall):4.0f} ms"
    print(f"{name:24} {line} (CPU {statistics.median(cpu):4.0f} and {max(cpu):4.0f} ms)", flush=True)


def questions(path: Path) -> None:
    begun = time.perf_counter()
    with open_source(str(path)) as source:
        print(f"second opening           {(time.perf_counter() - begun) * 1e3:.0f} ms")
        timed("seek", lambda source, at: source.at(at), source)
        timed("explain block", lambda s, at: explain_block(s, random.randrange(65_536), Tier.DEVICE, at), source)
        timed("explain request", lambda s, at: explain_request(s, f"#{max(at // 5 - 500, 1)}", at), source)
        state = source.at(source.last)
        nodes = list(state.nodes.values())
        names = [hash_of(state, node, 0).hex() for node in random.sample(nodes, _QUESTIONS)]
        timed("explain hash, cached", lambda s, at: explain_hash(s, names.pop(), s.last), source)
        start = max(source.last - _CHECKED + 1, 1)
        begun, cpu = time.perf_counter(), time.process_time()
        checked = check_log(source, start, source.last)
        spent, cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert checked.violation is None
        rate = checked.events / spent
        print(f"check                    {rate:,.0f} events/s ({checked.events / cpu:,.0f} per CPU second)")
    print(f"memory                   {_memory()}")


def _memory() -> str:
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most"


def main() -> None:
    if sys.argv[1:2] == ["--ask"]:
        questions(Path(sys.argv[2]))
        return
    events = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.kvlog"
        begun = time.perf_counter()
        record(path, events)
        print(f"recorded {events:,} events in {time.perf_counter() - begun:.0f} s, {path.stat().st_size / 1e9:.2f} GB")
        begun = time.perf_counter()
        open_source(str(path)).close()
        index = path.with_name(path.name + ".index").stat().st_size / 1e9
        print(f"first opening            {time.perf_counter() - begun:.0f} s, index {index:.2f} GB")
        print(
            f"memory to here           {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB at most",
            flush=True,
        )
        subprocess.run([sys.executable, "-m", "benchmarks.debugger", "--ask", str(path)], check=True)


if __name__ == "__main__":
    main()
