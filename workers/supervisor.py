"""Starts the workers of all ranks, hears them get ready, notices when one dies, and collects their answers."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from typing import IO, NamedTuple

from ipc import LedgerError, LogReader
from ipc.names import remove_objects
from ipc.signals import Signals
from workers import transfer
from workers.acknowledgements import Acknowledgement, log_name, signals_name
from workers.layout import PoolLayout

_LOOK_EVERY_S = 0.02
_STOP_S = 5.0


class WorkerFailed(RuntimeError):
    """A worker could not start, or does not stay alive; the message gives its reason."""


class Change(NamedTuple):
    """A worker became ready, or is gone (``reason`` says why)."""

    rank: int
    incarnation: int
    ready: bool
    reason: str = ""


class _Worker:
    """One incarnation of a rank's process."""

    def __init__(self, ledger: str, rank: int, incarnation: int, layout: PoolLayout, from_sequence: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.log = log_name(ledger, rank, incarnation)
        self.reader: LogReader | None = None
        self.started = time.monotonic()
        self.signals = Signals(signals_name(ledger, rank, incarnation), create=True)
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        # exec, never fork: an inherited descriptor would keep the engine's lock
        arguments = [str(rank), str(incarnation), str(from_sequence), layout.text()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.transfer", ledger, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.stderr,
        )

    def reason(self) -> str:
        """Why it ended, as well as one can tell."""
        if text := self.signals.text:
            return text
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        ended = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        return f"{ended}: {lines[-1]}" if lines else ended

    def discard(self) -> None:
        """Make sure that it is dead, and remove what it leaves."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.reader is not None:
            self.reader.close()
        self.stderr.close()
        self.signals.close(remove=True)
        remove_objects(self.log)


class Supervisor:
    """The workers of one ledger."""

    def __init__(self, ledger: str, layout: PoolLayout, *, ready_timeout_s: float) -> None:
        self._ledger = ledger
        self._layout = layout
        self._ready_timeout_s = ready_timeout_s
        self._workers: dict[int, _Worker] = {}
        self._next_look = 0.0

    def start(self, rank: int, incarnation: int, from_sequence: int) -> None:
        """Start a rank's worker; it executes what is in flight from ``from_sequence`` on, once it has joined."""
        self._workers[rank] = _Worker(self._ledger, rank, incarnation, self._layout, from_sequence)

    def pid(self, rank: int) -> int:
        """Process id of a rank's worker."""
        return self._workers[rank].process.pid

    def changes(self) -> list[Change]:
        """Who became ready and who is gone since the last look; looks 50 times per second at most."""
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + _LOOK_EVERY_S
        found = []
        for worker in list(self._workers.values()):
            ready = worker.signals.words[transfer.READY]
            if worker.process.poll() is not None or ready == transfer.HAS_FAILED:
                found.append(self._gone(worker, ""))
            elif worker.reader is None:
                if ready == transfer.IS_READY:
                    worker.reader = LogReader(worker.log, name="engine", worker=True)
                    found.append(Change(worker.rank, worker.incarnation, True))
                elif now - worker.started > self._ready_timeout_s:
                    found.append(self._gone(worker, f"not ready within {self._ready_timeout_s:g} s"))
        return found

    def _gone(self, worker: _Worker, reason: str) -> Change:
        if worker.process.poll() is None:
            worker.process.kill()
            worker.process.wait()
        reason = reason or worker.reason()
        del self._workers[worker.rank]
        worker.discard()
        return Change(worker.rank, worker.incarnation, False, reason)

    def wait_until_ready(self) -> list[Change]:
        """Wait for all workers that were started.

        Raises:
            WorkerFailed: one did not get ready; the others are stopped by :meth:`stop`.
        """
        ready: dict[int, Change] = {}
        waiting = len(self._workers)
        while len(ready) < waiting:
            for change in self.changes():
                if not change.ready:
                    raise WorkerFailed(f"the worker of rank {change.rank} did not start: {change.reason}")
                ready[change.rank] = change
            time.sleep(0.005)
        return [ready[rank] for rank in sorted(ready)]

    def acknowledgements(self) -> list[Acknowledgement]:
        """The workers' answers since the last call."""
        answers = []
        for worker in self._workers.values():
            if worker.reader is not None:
                answers += [Acknowledgement.of(record) for record in worker.reader.poll()]
        return answers

    def stop(self) -> None:
        """Stop all workers: politely, then not. Nothing of theirs is left."""
        for worker in self._workers.values():
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in self._workers.values():
            with contextlib.suppress(LedgerError):
                worker.discard()
        self._workers.clear()
