"""The sending side of split prefill and decode: one pusher per rank, what they were ordered, what they answered.

A request that is being pushed keeps its blocks: they are its own, or cached on its path and pinned by it, until it is
released, and a release ends its pushes first. So a push needs no event of the ledger; what was ordered and how it
ended stands in the log of pushes (:mod:`workers.handoff.pushes`).
"""

from __future__ import annotations

import logging
import time
from array import array
from typing import TYPE_CHECKING, NamedTuple

from ipc import LedgerError, LogWriter, TransactionTooLarge
from kvledger.config import ConfigError
from kvledger.errors import HandoffError
from kvledger.handoff.peer import Handed
from kvledger.manager.handoffs import end_pushers
from kvledger.manager.ranks import back_off
from kvledger.text import logged
from statemachine.decide import request_named
from statemachine.errors import InvalidCommand, RequestNotReady
from statemachine.events import Outcome
from workers.handoff import pusher, pushes
from workers.handoff.progress import LayerProgress
from workers.handoff.pushes import Address, PushFinished, PushStarted
from workers.handoff.shared_memory import same_blocks
from workers.pools.layout import PoolLayout
from workers.processes.acknowledgements import Acknowledgement, Status
from workers.processes.supervisor import Supervisor, WorkerFailed

if TYPE_CHECKING:
    from kvledger.manager.manager import CacheManager

_log = logging.getLogger(__name__)
_SEGMENT_BYTES = 1 << 20
_RETAIN_BYTES = 16 << 20


class _Push(NamedTuple):
    """A push under way."""

    request_id: str
    ticket: int
    sequence: int
    """Sequence of its start in the log of pushes."""
    deadline: float
    answers: dict[int, Acknowledgement]
    """The ranks' answers so far, by rank."""


class Sender:
    """Pushes requests of one manager to decode instances on this host.

    Starts the pushers and waits until they are ready. The manager's thread makes all calls; closing the manager
    closes the sender.

    ::

        sender = Sender(manager)
        ...  # admit the request, with all its blocks
        sender.send("request-1", address, step=7)  # before or while step 7 computes the last of them
        for done in sender.poll():  # once per scheduler step
            manager.release(done.request_id)

    Raises:
        ConfigError: the manager has no pools, or pools that are not shared memory.
        workers.WorkerFailed: a pusher did not get ready, with its reason.
        ipc.SharedMemoryFull
    """

    def __init__(self, manager: CacheManager) -> None:
        config = manager.config
        if not config.ranks or config.layout.on_gpu:
            raise ConfigError(
                "pushing needs pools in shared memory: ranks of 1 or more, and backend numpy or paddle "
                f"(not {config.ranks} ranks, backend {config.backend})"
            )
        self._manager = manager
        self._config = config
        self._pushes: dict[int, _Push] = {}
        self._ended: list[Handed] = []
        self._next = 1
        self._restarts: dict[int, float] = {}
        """Ranks without a pusher: when to start it."""
        self._failures: dict[int, int] = {}
        """By rank, how often in a row its pusher died."""
        self._reasons: dict[int, str] = {}
        """By rank: why its last pusher ended."""
        self._closed = False
        self.progress: list[LayerProgress] = []
        """By rank, for an engine that computes in this process; other processes make their own."""
        manager.attach(self)
        try:
            end_pushers(manager.name)
            self._writer = LogWriter.create(
                pushes.log_name(manager.name),
                schema_hash=pushes.SCHEMA_HASH,
                segment_bytes=_SEGMENT_BYTES,
                retain_bytes=_RETAIN_BYTES,
            )
        except BaseException:
            manager.detach(self)
            raise
        self._writer.hold(self._oldest)
        self.supervisor = Supervisor(
            self._writer.ledger,
            config.layout,
            epoch=1,
            ready_timeout_s=config.ready_timeout_s,
            program=pusher.PROGRAM,
        )
        try:
            for rank in range(config.ranks):
                self.progress.append(LayerProgress(manager.name, rank, create=True))
                self.supervisor.start(rank, self._writer.next_sequence)
            self.supervisor.wait_until_ready()
            self._writer.listen()
        except BaseException:
            self.close()
            raise

    def send(self, request_id: str, address: Address, *, step: int = 0) -> None:
        """Push blocks of a request to where a decode instance has reserved room for them.

        They stay the request's until :meth:`poll` has reported the end, or the request is released, which ends the
        push.

        Args:
            address: from :meth:`kvledger.handoff.receiver.Receiver.reserve`, for this ledger.
            step: the engine's step that writes the last of these blocks; each rank's pusher sends a layer as soon as
                :class:`workers.handoff.progress.LayerProgress` says that it is written. 0: everything is written
                already.

        Raises:
            HandoffError: the address is for another instance, or the two do not fit together.
            RequestNotReady: the request still waits for copies.
            InvalidCommand, UnknownRequest
        """
        if self._closed:
            raise HandoffError("the sender is closed")
        if type(step) is not int or not 0 <= step < 1 << 47:
            raise InvalidCommand(f"a step is a whole number from 0, not {step!r:.80}")
        request = request_named(self._manager.state, request_id)
        if request.waits_for:
            raise RequestNotReady(
                f"request {request_id!r} still waits for transfers {[*request.waits_for]}: poll() first"
            )
        self._expect_fitting(address)
        stop = address.first + len(address.blocks)
        if stop > len(request.table):
            raise InvalidCommand(
                f"request {request_id!r} has {len(request.table)} blocks, the address wants {address.first} to {stop}: "
                "allocate all of them first"
            )
        sources = request.table[address.first : stop]
        push = self._next
        started = PushStarted(
            push,
            step,
            address.ticket,
            address.board,
            address.slot,
            request_id,
            address.ledger,
            address.layout,
            address.pools,
            sources,
            array("i", address.blocks),
        )
        sequence = self._writer.next_sequence
        try:
            self._writer.append([pushes.record_of(started)])
        except TransactionTooLarge as error:
            raise InvalidCommand(f"{len(sources)} blocks are too many for one push: {error}") from error
        self._next += 1
        deadline = time.monotonic() + self._config.transfer_timeout_s
        self._pushes[push] = _Push(request_id, address.ticket, sequence, deadline, {})

    def _expect_fitting(self, address: Address) -> None:
        name = self._manager.name
        if address.peer != name:
            raise HandoffError(f"the address is meant for instance {address.peer!r}, this is {name!r}")
        if address.ledger == name:
            raise HandoffError(f"instance {name!r} cannot push to itself")
        try:
            theirs = PoolLayout.parse(address.layout)
        except ValueError as error:
            raise HandoffError(f"{address.ledger!r}: {error}") from error
        if address.block_size != self._config.block_size or not same_blocks(self._config.layout, theirs):
            raise HandoffError(
                f"a block of {address.ledger!r} has {address.block_size} tokens in pools {address.layout}, here it has "
                f"{self._config.block_size} in {self._config.layout.text()}: both need the same shape, in shared memory"
            )

    def poll(self) -> list[Handed]:
        """What has ended since the last call. Never blocks; call it once per scheduler step."""
        self.fold()
        ended, self._ended = self._ended, []
        return ended

    def fold(self) -> None:
        """Fold the pushers' answers into the log of pushes. Not public."""
        if self._closed:
            return
        for answer in self.supervisor.acknowledgements():
            push = self._pushes.get(answer.transfer) if isinstance(answer, Acknowledgement) else None
            if push is not None and isinstance(answer, Acknowledgement):
                push.answers[answer.rank] = answer
        for number, push in list(self._pushes.items()):
            self._failures.update(dict.fromkeys(push.answers, 0))
            errors = [answer.error for answer in push.answers.values() if answer.status != Status.OK]
            if errors:
                self._finish(number, Outcome.FAILED, errors[0])
            elif len(push.answers) == self._config.ranks:
                self._finish(number, Outcome.DONE, "")
            elif time.monotonic() > push.deadline:
                late = sorted(set(range(self._config.ranks)) - push.answers.keys())
                why = "; ".join(f"rank {rank} {self._reasons[rank]}" for rank in late if rank in self._reasons)
                reason = f"ranks {late} have not sent it within {self._config.transfer_timeout_s:g} s"
                self._finish(number, Outcome.TIMED_OUT, f"{reason} ({why})" if why else reason)
        self._watch()

    def _finish(self, number: int, outcome: Outcome, reason: str) -> None:
        push = self._pushes[number]
        record = pushes.record_of(PushFinished(number, push.ticket, outcome, reason[:1000]))
        self._writer.stage([(*record, b"")], giving_back=True)
        self._writer.publish()
        del self._pushes[number]
        self._ended.append(Handed(push.request_id, outcome, reason))
        if outcome != Outcome.DONE:
            ledger = self._manager.name
            _log.warning(
                "push_%s ledger=%s request=%s reason=%s",
                outcome.name.lower(),
                ledger,
                logged(push.request_id),
                logged(reason),
            )

    def _watch(self) -> None:
        """Start dead pushers again. What one had sent is sent again by the next."""
        for change in self.supervisor.changes():
            rank = change.rank
            if change.ready:
                self._reasons.pop(rank, None)
                self._writer.listen()
                continue
            for push in self._pushes.values():
                push.answers.pop(rank, None)
            self._lost(rank, change.reason)
        now = time.monotonic()
        for rank, when in list(self._restarts.items()):
            if now >= when:
                del self._restarts[rank]
                try:
                    self.supervisor.start(rank, self._oldest())
                except (LedgerError, WorkerFailed) as error:
                    self._lost(rank, str(error))

    def _lost(self, rank: int, reason: str) -> None:
        self._reasons[rank] = reason
        self._restarts[rank] = time.monotonic() + back_off(self._failures.get(rank, 0))
        self._failures[rank] = self._failures.get(rank, 0) + 1
        _log.warning("pusher_lost ledger=%s rank=%d reason=%s", self._manager.name, rank, logged(reason))

    def _oldest(self) -> int:
        """Sequence from which on a new pusher has to read the log of pushes."""
        return min((push.sequence for push in self._pushes.values()), default=self._writer.next_sequence)

    def pid(self, rank: int) -> int | None:
        """Process id of a rank's pusher; ``None`` while it has none."""
        return self.supervisor.pid(rank)

    # For the manager

    def busy(self) -> bool:
        """Whether some push has not ended."""
        return bool(self._pushes)

    def uses(self, request_id: str) -> bool:
        """Whether a request is being pushed. Not public."""
        return any(push.request_id == request_id for push in self._pushes.values())

    def released(self, request_id: str) -> None:
        """End the pushes of a request that is released: what has not arrived never counts. Not public."""
        for number, push in list(self._pushes.items()):
            if push.request_id == request_id:
                self._finish(number, Outcome.FAILED, "the prefill instance has released the request")

    def disown(self) -> None:
        """See :mod:`kvledger.manager.forks`. Not public."""
        self._closed = True
        self._writer.disown()

    def close(self, *, keep: bool = False) -> None:
        """End all pushes, stop the pushers, and remove what is theirs."""
        if self._closed:
            return
        self._closed = True
        self._manager.detach(self)
        for number in list(self._pushes):
            self._finish(number, Outcome.FAILED, "the prefill instance was closed")
        self.supervisor.stop()
        for word in self.progress:
            word.close(remove=True)
        self._writer.close(unlink=True)
