"""The ranks of a manager: their workers, what they were ordered, what they answered.

The answers of all ranks become one ``TransferFinished``; a worker that dies is replaced; an order that takes too long
times out. Deadlines live here, never in the state machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ipc import LogWriter
from kvledger.config import CacheConfig
from statemachine import commands
from statemachine.errors import OutOfOrder
from statemachine.events import Event, Outcome
from statemachine.state import Request, State, Transfer
from workers.acknowledgements import Acknowledgement, Status
from workers.supervisor import Supervisor

BlockTable = npt.NDArray[np.int32]
"""Device block ids in token order, ``int32[blocks]``."""

_BACK_OFF_S = 0.05
_LONGEST_BACK_OFF_S = 5.0
_OUTCOMES = {Status.OK: Outcome.DONE, Status.FAILED: Outcome.FAILED, Status.CORRUPT: Outcome.CORRUPT}


def table_of(request: Request) -> BlockTable:
    """The block table of a request."""
    return np.array(request.table, np.int32)


class Progress(NamedTuple):
    """A request that waited can go on."""

    key: str
    block_table: BlockTable
    cached_blocks: int
    """Leading blocks whose KV is valid; fewer than promised if ``shortened``."""
    shortened: bool
    """A swap-in failed: allocate what is missing, and compute from ``cached_blocks`` on."""


class _Order(NamedTuple):
    """A transfer in flight: where in the log it started, and when it is too late."""

    sequence: int
    deadline: float


class Ranks:
    """One worker process per rank. ``execute`` is how the manager turns a command into logged events."""

    def __init__(
        self,
        ledger: str,
        config: CacheConfig,
        writer: LogWriter,
        state: State,
        execute: Callable[[commands.Command], list[Event]],
    ) -> None:
        self.supervisor = Supervisor(ledger, config.layout, ready_timeout_s=config.ready_timeout_s)
        self._config = config
        self._writer = writer
        self._state = state
        self._execute = execute
        self._answers: dict[int, dict[int, Acknowledgement]] = {}
        """By transfer and rank, for transfers that some rank still works on."""
        self._orders: dict[int, _Order] = {}
        """By transfer in flight."""
        self._restarts: dict[int, tuple[float, int]] = {}
        """Ranks without a worker: when to start it, and the incarnations that failed in a row."""

    def start(self) -> None:
        """Start all workers and wait for them. Raises :class:`workers.WorkerFailed`."""
        for rank in range(self._config.ranks):
            self.supervisor.start(rank, 1, self._writer.next_sequence)
        for change in self.supervisor.wait_until_ready():
            self._execute(commands.JoinWorker(change.rank, self.supervisor.pid(change.rank)))
        self._writer.listen()

    def stop(self) -> None:
        """Stop all workers."""
        self.supervisor.stop()

    def started(self, sequence: int) -> None:
        """Transfers that are new since event ``sequence`` get a deadline."""
        deadline = time.monotonic() + self._config.transfer_timeout_s
        for id in self._state.transfers:
            if id not in self._orders:
                self._orders[id] = _Order(sequence, deadline)

    def poll(self) -> list[Progress]:
        """Fold the answers into the log; never blocks. Returns the requests that can go on."""
        progress: dict[str, Progress] = {}
        transfers = self._state.transfers
        for answer in self.supervisor.acknowledgements():
            if answer.transfer in transfers:
                self._answers.setdefault(answer.transfer, {})[answer.rank] = answer
        self._watch_workers()
        if not transfers:
            return []
        now = time.monotonic()
        for id, transfer in list(transfers.items()):
            answers = self._answers.get(id, {})
            if len(answers) == self._config.ranks:
                if transfer.quarantined:
                    self._execute(commands.EndQuarantine(id))
                else:
                    valid = min(answer.valid for answer in answers.values())
                    outcome = max(_OUTCOMES[answer.status] for answer in answers.values())
                    try:
                        self._finish(transfer, outcome, valid, progress)
                    except OutOfOrder:
                        continue  # the transfer that brings the front of its path ends first
                del self._answers[id], self._orders[id]
            elif not transfer.quarantined and now > self._orders[id].deadline:
                self._finish(transfer, Outcome.TIMED_OUT, 0, progress)
        return list(progress.values())

    def _watch_workers(self) -> None:
        """Log who came and who went, and start a dead rank's worker again."""
        for change in self.supervisor.changes():
            rank = change.rank
            if change.ready:
                del self._restarts[rank]
                if not self._restarts:
                    self._writer.hold(None)
                self._execute(commands.JoinWorker(rank, self.supervisor.pid(rank)))
                self._writer.listen()
                self._never_again(rank)  # what timed out before it joined is not executed by it
                continue
            _, failures = self._restarts.get(rank, (0.0, 0))
            self._restarts[rank] = time.monotonic() + min(_BACK_OFF_S * 2**failures, _LONGEST_BACK_OFF_S), failures + 1
            if rank in self._state.workers:
                self._execute(commands.LoseWorker(rank, change.reason))
            # What it answered is done again by its successor, except what it can no longer touch.
            for answers in self._answers.values():
                answers.pop(rank, None)
            self._never_again(rank)
            self._writer.hold(self._oldest_in_flight())
        if self._restarts:
            now = time.monotonic()
            for rank, (when, failures) in self._restarts.items():
                if now >= when:
                    self._restarts[rank] = float("inf"), failures
                    self.supervisor.start(rank, self._state.workers.get(rank, 0) + 1, self._oldest_in_flight())

    def _never_again(self, rank: int) -> None:
        """The worker that might still have written what is quarantined is dead: that counts as its answer."""
        for id, transfer in self._state.transfers.items():
            if transfer.quarantined:
                self._answers.setdefault(id, {})[rank] = Acknowledgement(rank, id, 0, Status.FAILED, "dead")

    def _oldest_in_flight(self) -> int:
        """Sequence from which on a new worker has to read the log."""
        return min((order.sequence for order in self._orders.values()), default=self._writer.next_sequence)

    def _finish(self, transfer: Transfer, outcome: Outcome, valid: int, progress: dict[str, Progress]) -> None:
        state = self._state
        waiters = [(state.requests[id], state.requests[id].leaf.end) for id in transfer.waiters]
        self._execute(commands.FinishTransfer(transfer.id, outcome, valid))
        for request, before in waiters:
            shortened = request.leaf.end < before
            earlier = progress.get(request.key)
            shortened = shortened or (earlier is not None and earlier.shortened)
            if shortened or not request.waits:
                progress[request.key] = Progress(request.key, table_of(request), request.leaf.end, shortened)
