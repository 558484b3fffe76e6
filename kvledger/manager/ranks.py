"""The ranks of a manager: their workers, what they were ordered, what they answered.

The answers of all ranks become one ``TransferFinished``; a worker that dies is replaced; an order that takes too long
times out; a rank that keeps failing costs the host tier. Deadlines live here, never in the state machine.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ipc import LedgerError, LogWriter
from kvledger.config import CacheConfig
from kvledger.manager.notices import log_notice
from statemachine import commands
from statemachine.errors import OutOfOrder
from statemachine.events import Event, HostPolicy, Outcome, Tier
from statemachine.state.nodes import Request, Transfer
from statemachine.state.state import State
from workers.pools.backends import ids_after
from workers.processes.acknowledgements import Acknowledgement, EpochSeen, Status, reader_name
from workers.processes.supervisor import Change, Supervisor, WorkerFailed

BlockTable = npt.NDArray[np.int32]
"""Device block ids in token order, ``int32[blocks]``."""

_BACK_OFF_S = 0.05
_LONGEST_BACK_OFF_S = 5.0
_MOST_FAILURES = 8
"""Failures of a rank in a row (deaths, failed copies, time-outs) after which the host tier is given up."""
_OUTCOMES = {Status.OK: Outcome.DONE, Status.FAILED: Outcome.FAILED, Status.CORRUPT: Outcome.CORRUPT}


def back_off(failures: int) -> float:
    """Seconds until a worker that died is started again, after so many failures in a row."""
    return min(_BACK_OFF_S * float(2 ** min(failures, 16)), _LONGEST_BACK_OFF_S)


def table_text(table: BlockTable, most: int = 8) -> str:
    """The first ids of a block table, and how many follow."""
    ids = ", ".join(str(block) for block in table[:most].tolist())
    return f"[{ids}]" if len(table) <= most else f"[{ids}, and {len(table) - most} more]"


def table_of(request: Request) -> BlockTable:
    """The block table of a request."""
    return np.array(request.table, np.int32)


def sides_of(request: Request) -> tuple[BlockTable, ...]:
    """The block tables of a request in the layer groups beside group 0."""
    return tuple(np.array(side.table, np.int32) for side in request.sides)


class Progress(NamedTuple):
    """A request that waited can go on."""

    request_id: str
    block_table: BlockTable
    cached_blocks: int
    """Leading blocks whose KV is valid; fewer than promised if ``shortened``."""
    shortened: bool
    """A swap-in failed: allocate what is missing, and compute from ``cached_blocks`` on."""

    def __repr__(self) -> str:
        end = ", shortened" if self.shortened else ""
        return (
            f"<{self.request_id!r} goes on: {self.cached_blocks} blocks cached of {table_text(self.block_table)}{end}>"
        )


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
        self.supervisor = Supervisor(ledger, config.layout, epoch=state.epoch, ready_timeout_s=config.ready_timeout_s)
        self._ledger = ledger
        self._config = config
        self._writer = writer
        self._state = state
        self._execute = execute
        self._answers: dict[int, dict[int, Acknowledgement]] = {}
        """By transfer and rank, for transfers that some rank still works on."""
        self._orders: dict[int, _Order] = {}
        """By transfer in flight."""
        self._rotations = 0
        self._restarts: dict[int, float] = {}
        """Ranks without a worker: when to start it."""
        self._failures: dict[int, int] = {}
        """By rank, how often in a row its worker died or failed."""
        self._joined: dict[int, float] = {}
        """By rank, when its worker joined."""
        self._unheard: dict[int, float] = {}
        """Adopted workers that have not acknowledged this epoch, and until when they have to."""
        self._epoch_began = 0
        self._giving_up = ""
        """Why the host tier goes, as soon as no worker is left that could write to it."""
        self._changes: deque[Change] = deque()
        """Workers that joined or were lost, and stand in no event yet."""
        self._news: dict[int, bool] = {}
        """Requests that :meth:`poll` has to report, by number, and whether they were shortened."""
        writer.hold(self._oldest_in_flight)

    def start(self) -> None:
        """Start all workers and wait for them. Raises :class:`workers.WorkerFailed`."""
        for rank in range(self._config.ranks):
            self.supervisor.start(rank, self._writer.next_sequence)
        for change in self.supervisor.wait_until_ready():
            self._join(change)

    def adopt(self, started: Mapping[int, int], lost: Mapping[Tier, str], pools: str) -> None:
        """Take over from a dead engine: its workers, and the transfers in flight.

        Args:
            started: for each transfer in flight the event that started it.
            lost: tiers whose memory is not what it was, and why; then no worker is adopted.
            pools: ids of the pools that are there now.
        """
        self._epoch_began = self._writer.next_sequence
        for id in self._state.transfers:
            self._orders[id] = _Order(started.get(id, self._epoch_began), self._deadline())
        without_host = self._state.policy == HostPolicy.OFF != self._state.opened.host_policy
        adopted = self.supervisor.adopt(self._state.workers, keep=not lost and not without_host)
        for rank in range(self._config.ranks):
            if rank in adopted:
                self._unheard[rank] = time.monotonic() + self._config.ready_timeout_s
                self._joined[rank] = time.monotonic()
                continue
            if rank in self._state.workers:
                self._execute(commands.LoseWorker(rank, "it did not outlive the engine, or its pools"))
            self._abandon_overtaken(self._state.transfers)
            self._never_again(rank)
            if not without_host:
                self._restarts[rank] = 0.0
        if lost:
            self._end_transfers()
            for tier in sorted(lost, reverse=True):
                ids = ids_after(self._state.pools, pools, tier)
                self._execute(commands.LoseTier(tier, lost[tier], ids))
        self._writer.listen()
        deadline = time.monotonic() + self._config.ready_timeout_s
        while self._restarts and time.monotonic() < deadline:
            self.fold()
            time.sleep(0.005)

    def stop(self) -> None:
        """Stop all workers."""
        self.supervisor.stop()

    def worker_pid(self, rank: int) -> int | None:
        """Process id of a rank's worker; ``None`` while it has none."""
        return None if rank in self._restarts else self.supervisor.pid(rank)

    def started(self, sequence: int) -> None:
        """Give every transfer that is new since event ``sequence`` a deadline."""
        deadline = self._deadline()
        for id in self._state.transfers:
            if id not in self._orders:
                self._orders[id] = _Order(sequence, deadline)

    def _mend_orders(self) -> None:
        """A call that was interrupted has ordered or ended a transfer, and could not note it here."""
        for id in [id for id in self._orders if id not in self._state.transfers]:
            del self._orders[id]
            self._answers.pop(id, None)
        self.started(self._writer.next_sequence)

    def _deadline(self) -> float:
        return time.monotonic() + self._config.transfer_timeout_s

    def poll(self) -> list[Progress]:
        """Fold the answers into the log; never blocks. Returns the requests that can go on, each once."""
        self.fold()
        requests = self._state.requests
        progress = []
        for number, shortened in list(self._news.items()):
            request = requests.get(number)
            if request is not None and request.waits_for and not shortened:
                continue  # for other blocks now
            del self._news[number]
            if request is not None:
                progress.append(Progress(request.request_id, table_of(request), request.leaf.end, shortened))
        return progress

    def take_news(self, request: Request) -> bool:
        """Take the news of one request, which :meth:`poll` need not report then. Returns whether it was shortened."""
        return self._news.pop(request.number, False)

    def fold(self) -> None:
        """Fold the answers into the log; the next :meth:`poll` reports which requests can go on. Never blocks."""
        transfers = self._state.transfers
        if self._orders.keys() != transfers.keys():
            self._mend_orders()
        for answer in self.supervisor.acknowledgements():
            if isinstance(answer, EpochSeen):
                self._heard(answer)
                continue
            transfer = transfers.get(answer.transfer)
            if transfer is None:
                continue
            if (answer.status == Status.OK) != (answer.valid == len(transfer.targets)):
                self.supervisor.kill(answer.rank, f"it answered {answer.valid} of {len(transfer.targets)} blocks")
            else:
                self._answers.setdefault(answer.transfer, {})[answer.rank] = answer
                if answer.status == Status.FAILED:
                    self._failed(answer.rank, answer.error)
                else:
                    self._failures[answer.rank] = 0
                if answer.status == Status.CORRUPT:
                    log_notice(logging.ERROR, "host_block_corrupt", ledger=self._ledger, reason=answer.error)
        self._watch_workers()
        if self._giving_up:
            self._drop_host_tier()
        if not transfers:
            return
        now = time.monotonic()
        late: set[int] = set()
        for id, transfer in list(transfers.items()):
            answers = self._answers.get(id, {})
            if len(answers) == self._config.ranks:
                if transfer.quarantined:
                    self._execute(commands.EndQuarantine(id))
                else:
                    valid = min(answer.valid for answer in answers.values())
                    outcome = max(_OUTCOMES[answer.status] for answer in answers.values())
                    try:
                        self._finish(transfer, outcome, valid)
                    except OutOfOrder:
                        continue  # the transfer that brings the front of its path ends first
                del self._answers[id], self._orders[id]
            elif not transfer.quarantined and now > self._orders[id].deadline:
                late.update(range(self._config.ranks))
                late.difference_update(answers)
                self._finish(transfer, Outcome.TIMED_OUT, 0)
        for rank in sorted(late):
            self._failed(rank, f"its transfers took longer than {self._config.transfer_timeout_s:g} s")

    def _heard(self, answer: EpochSeen) -> None:
        """Note that an adopted worker follows this engine: what was ordered before is executed, for the last time."""
        if answer.epoch == self._state.epoch and self._unheard.pop(answer.rank, None) is not None:
            for id, transfer in self._state.transfers.items():
                if transfer.quarantined and self._orders[id].sequence < self._epoch_began:
                    self._no_more(id, answer.rank, "done before this epoch")

    def _replace_laggards(self) -> None:
        """A worker that does not read holds the whole log; that can only get worse at a rotation."""
        if self._writer.rotations == self._rotations:
            return
        self._rotations = self._writer.rotations
        most = self._config.worker_backlog_bytes
        backlogs = self._writer.backlogs()
        for rank in self.supervisor.ready_pids().values():
            size = backlogs.get(reader_name(rank), 0)
            if size > most:
                self.supervisor.kill(rank, f"it held {size:,} bytes of the log (worker_backlog_bytes {most:,})")

    def _watch_workers(self) -> None:
        """Log who came and who went, and start a dead rank's worker again."""
        self._replace_laggards()
        self._changes.extend(self.supervisor.changes())
        while self._changes:  # what cannot be logged now is not forgotten
            self._note(self._changes[0])
            self._changes.popleft()
        now = time.monotonic()
        for rank, when in list(self._unheard.items()):
            if now > when:
                del self._unheard[rank]
                self.supervisor.kill(rank, "it does not follow the new engine")
        for rank, when in list(self._restarts.items()):
            if now >= when and not self._giving_up:
                self._restarts[rank] = float("inf")
                try:
                    self.supervisor.start(rank, self._oldest_in_flight())
                except (LedgerError, WorkerFailed, OSError) as error:
                    self._lost(rank, str(error))

    def _note(self, change: Change) -> None:
        """Log that a worker joined or was lost, and what follows from it. The log first: it may be full."""
        rank = change.rank
        if change.ready:
            self._join(change)
            del self._restarts[rank]
            self._never_again(rank)  # what timed out before it joined is not executed by it
            return
        if self._state.workers.get(rank) == change.incarnation:
            self._execute(commands.LoseWorker(rank, change.reason))
        if time.monotonic() - self._joined.pop(rank, float("inf")) > _LONGEST_BACK_OFF_S:
            self._failures[rank] = 0
        self._unheard.pop(rank, None)
        self._lost(rank, change.reason)
        # What it answered is done again by its successor, except what it can no longer touch.
        answered = {id for id, answers in self._answers.items() if rank in answers}
        if change.answered is None or self._config.layout.on_gpu:  # on a GPU a copy begins before the last is answered
            self._abandon_overtaken(self._state.transfers)
        else:
            self._abandon_overtaken(answered | change.answered)
        for answers in self._answers.values():
            answers.pop(rank, None)
        self._never_again(rank)

    def _join(self, change: Change) -> None:
        self._execute(commands.JoinWorker(change.rank, change.incarnation, self.supervisor.pid(change.rank) or 0))
        self._joined[change.rank] = time.monotonic()
        self._writer.listen()

    def _lost(self, rank: int, reason: str) -> None:
        """Plan the next worker of a rank that has none, later each time."""
        failures = self._failures.get(rank, 0)
        self._restarts[rank] = time.monotonic() + back_off(failures)
        self._failed(rank, reason)

    def _failed(self, rank: int, reason: str) -> None:
        """Count one more failure of a rank; after too many in a row nothing more is asked of the workers."""
        self._failures[rank] = self._failures.get(rank, 0) + 1
        if self._failures[rank] >= _MOST_FAILURES and self._state.policy != HostPolicy.OFF and not self._giving_up:
            self._giving_up = f"rank {rank} failed {self._failures[rank]} times in a row: {reason}"
            for each in range(self._config.ranks):
                self.supervisor.kill(each, "the host tier is given up")

    def _drop_host_tier(self) -> None:
        """Once no worker is left: end all transfers, and go on without a host tier."""
        if self.supervisor.idle():
            self._end_transfers()
            self._execute(commands.LoseTier(Tier.HOST, self._giving_up, ""))
            self._giving_up = ""
            self._restarts.clear()

    def _end_transfers(self) -> None:
        """All workers are proven dead: nothing in flight can arrive, and nothing can be overwritten any more."""
        for id, transfer in list(self._state.transfers.items()):
            if transfer.quarantined:
                self._execute(commands.EndQuarantine(id))
            else:
                self._finish(transfer, Outcome.FAILED, 0)
        self._answers.clear()
        self._orders.clear()

    def _abandon_overtaken(self, done: Container[int]) -> None:
        """A worker is dead: give up what its successor cannot do again, of what it may have ``done``.

        It may have begun a transfer that writes where an earlier one has read, before the other ranks had done their
        part of that earlier one. To copy it once more would be to copy what the later one has written.
        """
        transfers = self._state.transfers
        overtaken = {
            id for transfer in transfers.values() for id in transfer.waits_for if id in transfers and id in done
        }
        for id in sorted(overtaken):
            if not transfers[id].quarantined:
                self._finish(transfers[id], Outcome.TIMED_OUT, 0)

    def _never_again(self, rank: int) -> None:
        """The worker that might still have written what is quarantined is dead: that counts as its answer."""
        for id, transfer in self._state.transfers.items():
            if transfer.quarantined:
                self._no_more(id, rank, "dead")

    def _no_more(self, transfer: int, rank: int, reason: str) -> None:
        self._answers.setdefault(transfer, {})[rank] = Acknowledgement(rank, transfer, 0, Status.FAILED, reason)

    def _oldest_in_flight(self) -> int:
        """Sequence from which on a new worker has to read the log."""
        return min((order.sequence for order in self._orders.values()), default=self._writer.next_sequence)

    def _finish(self, transfer: Transfer, outcome: Outcome, valid: int) -> None:
        state = self._state
        waiters = [(state.requests[id], state.requests[id].leaf.end) for id in transfer.waiters]
        self._execute(commands.FinishTransfer(transfer.id, outcome, valid))
        for request, before in waiters:
            if request.leaf.end < before or not request.waits_for:
                self._news[request.number] = self._news.get(request.number, False) or request.leaf.end < before
