"""The debugger on a long recording: first opening, seeking, explaining, checking, memory.

``python -m benchmarks.debugger [--quick] [EVENTS]``: records so many events of a cache of 65,536 blocks (default:
200,000; about 0.3 GB of disk per million, and as much for the index), then asks questions all over it.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures as f
from benchmarks.replay import record
from ipc import KvlogReader
from kvledger.debugger import Source, open_source
from kvledger.debugger.checking import check_log
from kvledger.debugger.explain import explain_block, explain_hash, explain_request
from kvledger.debugger.hashes import hash_of
from statemachine.events import Tier
from statemachine.replay import replay

_QUESTIONS = 15
_BLOCKS = 65_536
_CHECKED = 100_000


def timed(question: Callable[[Source, int], object], source: Source) -> list[float]:
    """CPU time in ms of each question, which other processes disturb least."""
    random.seed(0)
    spent = []
    for _ in range(_QUESTIONS):
        at = random.randint(source.last // 10, source.last)
        begun = time.process_time()
        question(source, at)
        spent.append((time.process_time() - begun) * 1e3)
    return spent


def questions(path: Path) -> dict[str, Any]:
    """Ask them all; returns times by question, events checked per second, and MB of memory."""
    with open_source(str(path)) as source:
        state = source.at(source.last)
        nodes = list(state.nodes.values())
        names = [hash_of(state, node, 0).hex() for node in random.choices(nodes, k=_QUESTIONS)]
        answers: dict[str, Any] = {
            "any state": timed(lambda source, at: source.at(at), source),
            "explain a block": timed(
                lambda s, at: explain_block(s, random.randrange(_BLOCKS), Tier.DEVICE, at), source
            ),
            "explain a request": timed(lambda s, at: explain_request(s, f"#{max(at // 5 - 500, 1)}", at), source),
            "explain a hash, cached": timed(lambda s, at: explain_hash(s, names.pop(), s.last), source),
        }
        start = max(source.last - _CHECKED + 1, 1)
        begun = time.process_time()
        checked = check_log(source, start, source.last)
        spent = time.process_time() - begun
        assert checked.violation is None
        answers["checked"] = checked.events / spent
    answers["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return answers


def figures(quick: bool, events: int = 0) -> tuple[list[f.Figure], list[str]]:
    """Beside replaying the whole recording, which is what a debugger without an index would do."""
    events = events or (3_000 if quick else 200_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.kvlog"
        record(path, events)
        begun = time.process_time()
        open_source(str(path)).close()
        opening = (time.process_time() - begun) * 1e3
        begun = time.process_time()
        replay(KvlogReader(path))
        whole = (time.process_time() - begun) * 1e3
        command = [sys.executable, "-m", "benchmarks.debugger", "--ask", str(path)]
        answers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    limits = {"any state": 200.0}
    made = [f.figure_of(f"first opening, {events:,} events", "ms CPU", [opening], "replaying all", [whole])]
    rate, memory = answers.pop("checked"), answers.pop("memory")
    for name, times in answers.items():
        longest = {"longest_ms": max(times)}
        limit = limits.get(name, 1000.0)
        p50 = [statistics.median(times)]
        made.append(
            f.figure_of(f"{name}, p50", "ms CPU", p50, "replaying all", [whole], at_most=limit, details=longest)
        )
    made.append(
        f.Figure(
            name="all invariants at every event",
            unit="events per CPU second",
            ours=rate,
            against="replaying alone",
            theirs=events / whole * 1e3,
            ratios=[rate / (events / whole * 1e3)],
            at_least=20_000,
        )
    )
    size = [events * 2.0e-4]  # what the records themselves take is no peer, but a scale: 200 bytes each
    made.append(f.figure_of("memory", "MB at most", [memory], "200 bytes per event", size, at_most=500.0))
    return made, []


def main() -> None:
    if sys.argv[1:2] == ["--ask"]:
        print(json.dumps(questions(Path(sys.argv[2]))))
        return
    numbers = [argument for argument in sys.argv[1:] if argument != "--quick"]
    f.show("debugger", *figures("--quick" in sys.argv, int(numbers[0]) if numbers else 0))


if __name__ == "__main__":
    main()
