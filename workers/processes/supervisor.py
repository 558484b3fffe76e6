"""Starts the workers of all ranks, hears them get ready, notices when one dies, and collects their answers."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple, Self

from ipc import LedgerError, LedgerNotFound, LogCorrupt, LogReader, Overrun
from ipc.ownership import objects_of, remove_objects
from ipc.signals import Signals
from workers.pools.layout import PoolLayout
from workers.processes import loop
from workers.processes.acknowledgements import Acknowledgement, EpochSeen, answer_of, log_name, signals_name
from workers.processes.adopted import AdoptedProcess
from workers.processes.programs import environment, python

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.02
_STOP_S = 5.0
_PROGRAM = ("-m", "workers.transfer")


class WorkerFailed(RuntimeError):
    """A worker could not start, or does not stay alive; the message gives its reason."""


class Change(NamedTuple):
    """A worker became ready, or is gone (``reason`` says why)."""

    rank: int
    incarnation: int
    ready: bool
    reason: str = ""
    answered: frozenset[int] | None = frozenset()
    """Transfers that it had answered and :meth:`Supervisor.acknowledgements` has not told; ``None``: nobody knows."""


def end(process: subprocess.Popen[bytes] | AdoptedProcess) -> None:
    """Kill a process and wait for its end; one that hangs in the kernel is left behind, it will never return."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)


class _Worker:
    """One incarnation of a rank's process, started here or adopted from an engine that died."""

    def __init__(
        self,
        ledger: str,
        rank: int,
        incarnation: int,
        signals: Signals,
        process: subprocess.Popen[bytes] | AdoptedProcess,
        stderr: IO[bytes] | None,
    ) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.log = log_name(ledger, rank, incarnation)
        self.reader: LogReader | None = None
        self.started = time.monotonic()
        self.signals = signals
        self.process = process
        self.stderr = stderr
        self.condemned = False
        self._reason = ""

    @classmethod
    def start(
        cls,
        ledger: str,
        rank: int,
        incarnation: int,
        epoch: int,
        layout: PoolLayout,
        from_sequence: int,
        program: Sequence[str] = (),
    ) -> Self:
        """Start the process."""
        signals = Signals(signals_name(ledger, rank, incarnation), create=True)
        arguments = [str(rank), str(incarnation), str(epoch), str(from_sequence), layout.text()]
        stderr: IO[bytes] | None = None
        try:
            stderr = os.fdopen(os.memfd_create("worker-stderr"), "w+b")  # needs no directory that may be written
            # exec, never fork: an inherited descriptor would keep the engine's lock. A session of its own: what is
            # sent to the engine's terminal or process group is the engine's, and what is sent to a worker's, a worker's
            process = subprocess.Popen(
                python(*(program or _PROGRAM), ledger, *arguments),
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            signals.close(remove=True)
            if stderr is not None:
                stderr.close()
            raise WorkerFailed(f"the worker of rank {rank} cannot be started: {error}") from error
        return cls(ledger, rank, incarnation, signals, process, stderr)

    @classmethod
    def adopt(cls, ledger: str, rank: int, incarnation: int) -> Self | None:
        """Take over an incarnation that was ready and may still live; ``None``: there is none.

        Raises:
            WorkerFailed: it is of no use, and cannot be ended.
            ipc.NotPrivate, ipc.TooManyFiles: it cannot be told.
        """
        try:
            signals = Signals(signals_name(ledger, rank, incarnation))
        except LedgerNotFound:
            return None
        process = AdoptedProcess.of(signals)
        if process is None:
            signals.close()
            return None
        worker = cls(ledger, rank, incarnation, signals, process, None)
        try:
            if signals.words[loop.READY] != loop.IS_READY:
                raise LedgerNotFound("it is not ready")
            worker.listen()
        except (LedgerNotFound, LogCorrupt):  # its answers cannot be read: another one does it again
            process.kill()
            worker.discard()
            return None
        return worker

    def listen(self) -> None:
        """Read its answers, from the oldest that is still there."""
        oldest = 1
        while self.reader is None:
            try:
                self.reader = LogReader(self.log, from_sequence=oldest, name="engine", worker=True)
            except Overrun as overrun:
                oldest = overrun.available

    def condemn(self, reason: str) -> None:
        """Kill it, for this reason (empty: it has given one itself)."""
        self.condemned = True
        self._reason = reason
        self.process.kill()

    def reason(self) -> str:
        """Why it ended, as well as one can tell."""
        if self._reason:
            return self._reason
        if text := self.signals.text:
            return text
        if self.stderr is None:
            return "it ended; an earlier engine had started it, so its exit status is not known"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        if code is not None and code < 0:
            return f"killed by signal {-code}"
        return f"exit status {code}: {lines[-1]}" if lines else f"exit status {code}"

    def discard(self) -> None:
        """Make sure that it is dead, and remove what it leaves.

        Raises:
            WorkerFailed: it cannot be ended. What it leaves stays, and shows that it lives.
        """
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                end(self.process)
        if self.reader is not None:
            self.reader.close()
        if self.stderr is not None:
            self.stderr.close()
        ended = self.process.poll() is not None
        self.signals.close(remove=ended)
        if not ended:
            raise WorkerFailed(_still_runs(self.rank, self.process.pid))
        remove_objects(self.log, self.signals.identity)


def _still_runs(rank: int, pid: int) -> str:
    return (
        f"process {pid}, a worker of rank {rank}, still runs and cannot be ended from here: end it (it may belong to "
        "another container, or hang in the kernel), and try again"
    )


def end_strays(ledger: str, ranks: int, keep: Mapping[int, int]) -> None:
    """End the workers that a dead engine left, except the incarnation of each rank that ``keep`` names, if it is ready.

    Raises:
        WorkerFailed: one cannot be ended; it might still write to the pools.
        ipc.NotPrivate, ipc.TooManyFiles: it cannot be told.
    """
    for rank in range(ranks):
        for incarnation in incarnations_left(ledger, rank):
            with contextlib.suppress(LedgerNotFound):
                signals = Signals(signals_name(ledger, rank, incarnation))
                try:
                    ready = signals.words[loop.READY] == loop.IS_READY
                    if incarnation != keep.get(rank) or not ready:
                        _end_stray(signals, rank)
                finally:
                    signals.close()


def _end_stray(signals: Signals, rank: int) -> None:
    process = AdoptedProcess.of(signals)
    if process is not None:
        end(process)
        if process.poll() is None:
            raise WorkerFailed(_still_runs(rank, process.pid))


def incarnations_left(ledger: str, rank: int) -> list[int]:
    """Numbers of the incarnations of a rank that have objects in shared memory."""
    prefix = log_name(ledger, rank, 0)[:-1]
    names = (own.name.removeprefix("sem.") for own in objects_of(prefix[:-1]))
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in names}
    return sorted(int(number) for number in numbers if number.isdecimal())


class Supervisor:
    """The workers of one ledger. ``program``: what each of them runs; default: the transfer worker."""

    def __init__(
        self, ledger: str, layout: PoolLayout, *, epoch: int, ready_timeout_s: float, program: Sequence[str] = ()
    ) -> None:
        self._ledger = ledger
        self._program = program
        self._layout = layout
        self._ready_timeout_s = ready_timeout_s
        self._epoch = epoch
        self._workers: dict[int, _Worker] = {}
        self._incarnations: dict[int, int] = {}
        """By rank: the last number given to a worker, ready or not."""
        self._next_look = 0.0

    def start(self, rank: int, from_sequence: int) -> None:
        """Start a rank's worker; it executes what is in flight from ``from_sequence`` on, once it has joined.

        Raises:
            WorkerFailed: there is no process to be had.
            ipc.SharedMemoryFull
        """
        number = self._incarnations[rank] = self._incarnations.get(rank, 0) + 1
        self._workers[rank] = _Worker.start(
            self._ledger, rank, number, self._epoch, self._layout, from_sequence, self._program
        )

    def adopt(self, joined: Mapping[int, int], *, keep: bool) -> list[int]:
        """Take over what a dead engine left: the incarnation of each rank that had ``joined``, if it still lives.

        What other incarnations leave is removed. Without ``keep`` the joined ones are ended too. Returns the ranks
        that have a worker.

        Raises:
            WorkerFailed, ipc.LedgerError: see :func:`end_strays`.
        """
        end_strays(self._ledger, self._layout.ranks, joined if keep else {})
        for rank in range(self._layout.ranks):
            number = joined.get(rank, 0)
            worker = _Worker.adopt(self._ledger, rank, number) if number else None
            if worker is not None:
                self._workers[rank] = worker
            self._incarnations[rank] = number
            for incarnation in incarnations_left(self._ledger, rank):
                self._incarnations[rank] = max(self._incarnations[rank], incarnation)
                if worker is None or incarnation != number:
                    remove_objects(log_name(self._ledger, rank, incarnation))
        return self.ranks()

    def ranks(self) -> list[int]:
        """Ranks that have a worker, ready or not."""
        return sorted(self._workers)

    def pid(self, rank: int) -> int | None:
        """Process id of a rank's worker, if it has one."""
        worker = self._workers.get(rank)
        return worker.process.pid if worker is not None else None

    def kill(self, rank: int, reason: str) -> None:
        """End a rank's worker, if it has one; :meth:`changes` reports it."""
        worker = self._workers.get(rank)
        if worker is not None:
            worker.condemn(reason)

    def idle(self) -> bool:
        """Whether there is no worker, not even one that starts: nobody copies anything."""
        return not self._workers

    def ready_pids(self) -> dict[int, int]:
        """Process id → rank, of the workers that are ready."""
        workers = self._workers.items()
        return {
            worker.process.pid: rank for rank, worker in workers if worker.reader is not None and not worker.condemned
        }

    def changes(self) -> list[Change]:
        """Who became ready and who is gone since the last look; looks 50 times per second at most."""
        now = time.monotonic()
        if now < self._next_look:
            return []
        self._next_look = now + _LOOK_EVERY_S
        found = []
        for worker in list(self._workers.values()):
            ready = worker.signals.words[loop.READY]
            if worker.process.poll() is not None:
                found.append(self._gone(worker))
            elif worker.condemned:
                continue  # until it is proven dead
            elif ready == loop.HAS_FAILED:
                worker.condemn("")
            elif worker.reader is None:
                if ready == loop.IS_READY:
                    try:
                        worker.listen()
                    except LedgerError as error:
                        worker.condemn(f"its answers cannot be read: {error}")
                        continue
                    found.append(Change(worker.rank, worker.incarnation, True))
                elif now - worker.started > self._ready_timeout_s:
                    text = f": {worker.signals.text}" if worker.signals.text else ""
                    worker.condemn(f"not ready within {self._ready_timeout_s:g} s{text}")
        return found

    def _gone(self, worker: _Worker) -> Change:
        reason = worker.reason()
        answered = self._last_answers(worker)
        del self._workers[worker.rank]
        try:
            worker.discard()
        except (LedgerError, OSError) as error:  # it is dead, whatever it leaves
            _log.warning("what worker %d of rank %d leaves stays: %s", worker.incarnation, worker.rank, error)
        return Change(worker.rank, worker.incarnation, False, reason, answered)

    def _last_answers(self, worker: _Worker) -> frozenset[int] | None:
        if worker.reader is None:  # it never joined, and executed nothing
            return frozenset()
        if worker.condemned:
            return None
        try:
            answers = map(answer_of, worker.reader.poll())
            return frozenset(answer.transfer for answer in answers if isinstance(answer, Acknowledgement))
        except (ValueError, LedgerError):
            return None

    def wait_until_ready(self) -> list[Change]:
        """Wait for all workers that were started.

        Raises:
            WorkerFailed: one did not get ready; the others are stopped by :meth:`stop`.
        """
        ready: dict[int, Change] = {}
        waiting = len(self._workers)
        deadline = time.monotonic() + self._ready_timeout_s + _STOP_S
        while len(ready) < waiting:
            if time.monotonic() > deadline:
                raise WorkerFailed(f"ranks {sorted(self._workers.keys() - ready)} neither get ready nor end")
            for change in self.changes():
                if not change.ready:
                    raise WorkerFailed(f"the worker of rank {change.rank} did not start: {change.reason}")
                ready[change.rank] = change
            time.sleep(0.005)
        return [ready[rank] for rank in sorted(ready)]

    def acknowledgements(self) -> list[Acknowledgement | EpochSeen]:
        """The workers' answers since the last call."""
        answers: list[Acknowledgement | EpochSeen] = []
        for worker in self._workers.values():
            if worker.reader is not None and not worker.condemned:
                try:
                    for record in worker.reader.poll():
                        answer = answer_of(record)
                        if answer.rank != worker.rank:
                            raise ValueError(f"it answers for rank {answer.rank}")
                        answers.append(answer)
                except (ValueError, LedgerError) as error:  # whatever it writes, it harms itself alone
                    worker.condemn(f"its log is no good: {error}")
        return answers

    def stop(self) -> None:
        """Stop all workers: politely, then not. Nothing of theirs is left."""
        for worker in self._workers.values():
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in self._workers.values():
            try:
                worker.discard()
            except (WorkerFailed, LedgerError, OSError) as error:
                _log.warning("worker %d of rank %d: %s", worker.incarnation, worker.rank, error)
        self._workers.clear()
