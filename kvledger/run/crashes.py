"""``kvledger run --crash``: a run whose processes are killed, and go on.

The engine part of the run lives in a process of its own (:mod:`kvledger.run.engine_process`). This module starts it,
sees it die, and starts the next one, which opens the ledger and serves what is not served yet.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ipc import KvlogWriter, LedgerError, LedgerNotFound, LogReader
from ipc.names import check_name
from ipc.ownership import objects_of, remove_objects
from kvledger import is_compiled
from kvledger.config import ConfigError
from kvledger.run.pattern import WrongBytes
from kvledger.run.run import Crashes, RunOptions, Summary
from statemachine.errors import InvariantViolation
from statemachine.records import codec
from workers.processes.programs import environment, python

DONE, BLOCKS, DEVICE, HOST = range(4)
"""Columns of the table of requests that outlives the engine's processes."""
PUBLISHED, VERIFIED, WRITTEN, FOLLOWER = range(4)
"""Columns of its last row: last event published, bytes in all, process id of the follower."""
_SPEC = re.compile(r"(engine|follower|worker:(\d{1,5}))@([1-9]\d{0,14})")
_FOLLOWER = "workers.followers.auditor"
_LOOK_S = 0.01
_MOST_CHAOS = 20
"""Engines killed by chaos; then the run may come to its end."""


class Crash(NamedTuple):
    """Somebody to kill as soon as an event is published."""

    event: int
    who: str
    rank: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``engine@EVENT``, ``worker:RANK@EVENT`` or ``follower@EVENT``. Raises :class:`ConfigError`."""
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"--crash {text!r} is none of engine@EVENT, worker:RANK@EVENT, follower@EVENT (events count from 1)"
            )
        return cls(int(match[3]), match[1].partition(":")[0], int(match[2] or 0))

    def __str__(self) -> str:
        return f"{self.who}{f':{self.rank}' if self.who == 'worker' else ''}@{self.event}"


def drawn(seed: int, after: int, ranks: int) -> Crash:
    """The next crash of ``--chaos SEED``: within a few hundred events, the engine as often as all workers."""
    rng = random.Random(f"{seed} {after}")
    event = after + rng.choice((rng.randrange(1, 20), rng.randrange(20, 200), rng.randrange(100, 1000)))
    if ranks and rng.random() < 0.5:
        return Crash(event, "worker", rng.randrange(ranks))
    return Crash(event, "engine")


def open_table(path: Path, requests: int) -> npt.NDArray[np.int64]:
    """Map the table of a run; it is made if it is not there."""
    shape = (requests + 1, 4)
    return np.memmap(path, np.int64, "r+" if path.exists() else "w+", shape=shape)


class CrashRun:
    """A run with crashes. :meth:`execute` does it all; ``stop`` asks it to end early.

    Args:
        source: what :mod:`kvledger.run.engine_process` makes the trace from: ``path``, ``requests``, ``seed``.
        requests: how many requests that trace has.
        crashes: whom to kill when.
        chaos: seed of further crashes; ``None``: none.

    Raises:
        ConfigError: a crash is impossible in this run.
    """

    def __init__(
        self,
        source: dict[str, Any],
        requests: int,
        options: RunOptions,
        crashes: list[Crash],
        chaos: int | None,
    ) -> None:
        if is_compiled():  # the moments of its kills are between two lines of the log's writer
            raise ConfigError("--crash and --chaos need a kvledger that was installed without KVLEDGER_NATIVE")
        ranks = options.ranks if options.data else 0
        for crash in crashes:
            if crash.who == "worker" and crash.rank >= ranks:
                raise ConfigError(f"--crash {crash}: this run has {ranks} workers, counted from 0")
        self._with_follower = any(crash.who == "follower" for crash in crashes)
        if self._with_follower and importlib.util.find_spec(_FOLLOWER) is None:
            raise ConfigError("--crash follower@EVENT: this version has no follower process")
        if options.per_request is not None:
            raise ConfigError("--per-request does not go with --crash and --chaos: a request may be served twice")
        self.stop = False
        self._source = source
        self._requests = requests
        self._options = options
        self._plan = sorted(crashes)
        self._chaos = chaos
        self._ranks = ranks
        self.progress: Callable[[int], None] = lambda done: None
        self._crashes = Crashes()
        self._follower: subprocess.Popen[bytes] | None = None
        self._recorder: LogReader | None = None

    def execute(self, name: str | None = None) -> Summary:
        """Run the trace through as many engine processes as it takes.

        Raises:
            WrongBytes, InvariantViolation: as :meth:`kvledger.run.run.Run.execute`.
            ipc.LedgerError: an engine process could not start or go on; the message is its own.
        """
        ledger = check_name(name or f"run-{os.getpid()}")
        if objects_of(ledger):
            raise LedgerError(f"there is a ledger {ledger!r} already: choose another name")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvledger-run-")))
            table = open_table(folder / "table", self._requests)
            if not self._options.keep:
                stack.callback(remove_objects, ledger)
            recording = None
            if self._options.record is not None:
                recording = stack.enter_context(KvlogWriter(self._options.record, schema_hash=codec.SCHEMA_HASH))
            stack.callback(self._end_follower)
            while True:
                answers, code = self._live(ledger, folder / "table", table, recording)
                self._account(answers)
                if code != -signal.SIGKILL:
                    return self._summary(answers, table)
                self._crashes.engine += 1

    def _live(
        self, ledger: str, path: Path, table: npt.NDArray[np.int64], recording: KvlogWriter | None
    ) -> tuple[dict[str, Any], int]:
        """One engine process, from its start to its end: what it said, and its exit status."""
        job = {
            "source": self._source,
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(self._options).items()
            },
            "ledger": ledger,
            "table": str(path),
            "first": not self._crashes.engine,
            "plan": self._plan,
            "chaos": self._chaos if self._crashes.engine < _MOST_CHAOS else None,
        }
        with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                python("-m", "kvledger.run.engine_process"),
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=errors,
                env=environment(),
            )
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode())
            process.stdin.close()
            try:
                while process.poll() is None:
                    time.sleep(_LOOK_S)
                    self.progress(int(table[:-1, DONE].sum()))
                    self._watch_follower(ledger, table)
                    self._record(ledger, recording)
                    if self.stop:
                        process.terminate()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                self._record(ledger, recording)
            said.seek(0)
            answers: dict[str, Any] = {"killed": []}
            for line in said.read().decode().splitlines():
                entry = json.loads(line)
                answers["killed"] += entry.pop("killed", [])
                answers |= entry
            if process.returncode not in (0, -signal.SIGKILL) and "error" not in answers:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines() or ["no reason given"]
                answers["error"] = ["LedgerError", f"the engine process ended ({process.returncode}): {lines[-1]}"]
            return answers, process.returncode

    def _account(self, answers: dict[str, Any]) -> None:
        if "recovery_ms" in answers:
            self._crashes.recovery_ms.append(answers["recovery_ms"])
            self._crashes.lost_events += answers["lost_events"]
        for crash in map(Crash._make, answers["killed"]):
            self._crashes.workers += crash.who == "worker"
            self._crashes.followers += crash.who == "follower"
            if crash in self._plan:
                self._plan.remove(crash)

    def _record(self, ledger: str, recording: KvlogWriter | None) -> None:
        if recording is None:
            return
        if self._recorder is None:
            try:
                self._recorder = LogReader(ledger)
            except LedgerNotFound:
                return
        while records := self._recorder.poll():
            recording.write(records)

    def _watch_follower(self, ledger: str, table: npt.NDArray[np.int64]) -> None:
        if not self._with_follower or (self._follower is not None and self._follower.poll() is None):
            return
        if self._follower is None and not table[-1, PUBLISHED]:
            return  # there is no ledger yet
        self._follower = subprocess.Popen(
            python("-m", _FOLLOWER, ledger), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment()
        )
        table[-1, FOLLOWER] = self._follower.pid

    def _end_follower(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        if self._follower is not None and self._follower.poll() is None:
            self._follower.terminate()
            try:
                self._follower.wait(10)
            except subprocess.TimeoutExpired:
                self._follower.kill()
                self._follower.wait()

    def _summary(self, answers: dict[str, Any], table: npt.NDArray[np.int64]) -> Summary:
        if "error" in answers:
            kind, text = answers["error"]
            raise {"WrongBytes": WrongBytes, "InvariantViolation": InvariantViolation}.get(kind, LedgerError)(text)
        summary = Summary(**answers["summary"])
        served = table[:-1]
        summary.requests = int(served[:, DONE].sum())
        summary.blocks = int(served[:, BLOCKS].sum())
        summary.device_hit_blocks = int(served[:, DEVICE].sum())
        summary.host_hit_blocks = int(served[:, HOST].sum())
        summary.verified_bytes, summary.written_bytes = int(table[-1, VERIFIED]), int(table[-1, WRITTEN])
        self._crashes.not_reached = [str(crash) for crash in self._plan]
        summary.crashes = self._crashes
        return summary


def read_job(file: IO[str]) -> dict[str, Any]:
    """What :meth:`CrashRun.execute` tells an engine process."""
    job: dict[str, Any] = json.load(file)
    job["plan"] = [Crash(*crash) for crash in job["plan"]]
    return job
