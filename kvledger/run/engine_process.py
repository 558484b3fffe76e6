"""One engine process of a run with crashes: ``python -m kvledger.run.engine_process``, started by that run.

It creates the ledger, or opens what the process before it left, serves the requests that are not served yet, and kills
whom it is told to kill, itself too, at the moment when an event is published.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from ipc import LedgerError
from kvledger.config import CacheConfig, ConfigError
from kvledger.manager.manager import CacheManager
from kvledger.run import sample, traces
from kvledger.run.crashes import (
    BLOCKS,
    DONE,
    FOLLOWER,
    PUBLISHED,
    VERIFIED,
    WRITTEN,
    Crash,
    drawn,
    open_table,
    read_job,
)
from kvledger.run.pattern import WrongBytes
from kvledger.run.run import Run, RunOptions
from kvledger.run.traces import Trace, TraceRequest
from statemachine.errors import CommandRejected, InvariantViolation
from statemachine.events import HostPolicy
from workers import WorkerFailed


def say(**what: Any) -> None:
    """Tell the process that started this one; it may be the last word."""
    print(json.dumps(what), flush=True)


class EngineProcess(Run):
    """The run from here to its end, or to the next crash."""

    def __init__(self, trace: Trace, options: RunOptions, job: dict[str, Any]) -> None:
        super().__init__(trace, options)
        self._table = open_table(Path(job["table"]), len(trace.requests))
        self._first: bool = job["first"]
        self._plan: list[Crash] = job["plan"]
        self._chaos: int | None = job["chaos"]
        self._rows: dict[int, tuple[int, int, int]] = {}
        self._bytes = int(self._table[-1, VERIFIED]), int(self._table[-1, WRITTEN])

    def manager(self, name: str, config: CacheConfig) -> CacheManager:
        """Create the ledger in the first life, and take it over in every other."""
        if self._first:
            manager = CacheManager.create(name, config)
        else:
            begun = time.perf_counter()
            manager = CacheManager.open(name, config)
            recovered = manager.next_sequence - 1
            say(
                recovery_ms=round((time.perf_counter() - begun) * 1e3, 1),
                lost_events=max(int(self._table[-1, PUBLISHED]) - recovered, 0),
            )
        if self._chaos is not None:
            self._plan.append(drawn(self._chaos, manager.next_sequence, config.ranks))
            self._plan.sort()

        def published() -> None:
            self._table[-1, PUBLISHED] = manager.next_sequence - 1
            if self._plan and self._plan[0].event < manager.next_sequence:
                self._crash(manager)

        manager.on_published(published)
        return manager

    def _crash(self, manager: CacheManager) -> None:
        crash = self._plan[0]
        pid = os.getpid()
        if crash.who == "worker":
            worker = manager.worker_pid(crash.rank)
            if worker is None:
                return  # it has no worker just now; the next event will do
            pid = worker
        elif crash.who == "follower":
            pid = int(self._table[-1, FOLLOWER])
            if not pid:
                return
        del self._plan[0]
        say(killed=[crash])
        if crash.who == "follower":
            self._table[-1, FOLLOWER] = 0
        os.kill(pid, signal.SIGKILL)
        if self._chaos is not None:
            self._plan.append(drawn(self._chaos, manager.next_sequence, manager.config.ranks))
            self._plan.sort()

    def is_served(self, number: int) -> bool:
        """Whether a request was released, in any life."""
        return bool(self._table[number, DONE])

    def _count(self, request: TraceRequest, blocks: int, device: int, host: int, *, bypassed: bool = False) -> None:
        super()._count(request, blocks, device, host, bypassed=bypassed)
        self._rows[request.number] = blocks, device, host
        if bypassed:
            self._served(request.number)

    def _release(self, manager: CacheManager) -> None:
        number = self._in_flight.first().number
        super()._release(manager)
        self._served(number)

    def _served(self, number: int) -> None:
        self._table[number, BLOCKS:] = self._rows.pop(number)
        self._table[number, DONE] = 1
        if self._engine is not None:
            verified, written = self._bytes
            self._table[-1, VERIFIED] = verified + self._engine.verified_bytes
            self._table[-1, WRITTEN] = written + self._engine.written_bytes


def main() -> int:
    """Read the job, live, and say how it went."""
    job = read_job(sys.stdin)
    options = job["options"] | {"record": None, "host_policy": HostPolicy(job["options"]["host_policy"])}
    source = job["source"]
    process: EngineProcess | None = None
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        if process is not None:
            process.stop = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        if source["path"] is None:
            trace = sample.generate(source["requests"], source["seed"])
        else:
            trace = traces.load(Path(source["path"]))
            trace = trace._replace(requests=trace.requests[: source["requests"]])
        process = EngineProcess(trace, RunOptions(**options), job)
        process.stop = stopped
        say(summary=asdict(process.execute(job["ledger"])))
    except (
        WrongBytes,
        InvariantViolation,
        LedgerError,
        ConfigError,
        CommandRejected,
        WorkerFailed,
        traces.TraceError,
        OSError,
    ) as error:
        with contextlib.suppress(BrokenPipeError):
            say(error=[type(error).__name__, str(error)])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
