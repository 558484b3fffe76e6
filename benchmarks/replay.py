"""Events per second of a replay.

``python -m benchmarks.replay [--quick] [TRACE]``: replays recordings of the trace (default: Mooncake's conversations
where they are at hand, else the sample), one tier and two. Jumping around in a long recording is
:mod:`benchmarks.debugger`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import figures as f
from ipc import KvlogReader
from kvledger.run import sample, traces
from kvledger.run.run import Run, RunOptions
from statemachine.events import HostPolicy
from statemachine.records.replay import replay

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
            reader.close()
            reader = KvlogReader(path)
            begun = time.perf_counter()
            events = replay(reader).events
            applied.append(events / (time.perf_counter() - begun))
            reader.close()
            read.append(events / floor)
        return applied, read, events


def figures(quick: bool, trace: traces.Trace | None = None) -> tuple[list[f.Figure], list[str]]:
    """Replay rates beside reading alone."""
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
    return made, []


def conversation(quick: bool = False) -> traces.Trace:
    """The Mooncake conversation trace where it is at hand, else the generated sample."""
    return (
        traces.load(_CONVERSATION) if _CONVERSATION.exists() and not quick else sample.generate(100 if quick else 3000)
    )


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
    f.show("replay", *figures("--quick" in sys.argv, traces.load(paths[0]) if paths else None))


if __name__ == "__main__":
    main()
