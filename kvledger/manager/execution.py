"""From a call to the log: who may call, how a command becomes events, what other threads have released, the end.

Thread rule: one thread (the scheduler's) makes all calls that change something; it is the thread that created the
manager, or the last one that called :meth:`Ledger.adopt_thread`. From any other they raise :class:`WrongThread`,
except :meth:`CacheManager.release`, which is applied at the owner's next call. Questions (``stats``, ``ready``,
``can_allocate``, …) may be asked from anywhere; their answer may be old when it arrives.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from threading import get_ident
from types import TracebackType
from typing import Self, SupportsIndex

from ipc import SharedMemoryFull
from kvledger.errors import CallTooLarge, ManagerClosed, WrongThread
from kvledger.manager import forks
from kvledger.manager.arguments import expect_count
from kvledger.manager.handoffs import Handoff
from kvledger.manager.lifecycle import Beginning
from kvledger.manager.notices import log_notices
from kvledger.manager.prompts import LiveRequest
from kvledger.manager.ranks import BlockTable, Progress, Ranks, sides_of, table_of
from kvledger.manager.retention import Retention
from kvledger.manager.transactions import Transactions
from kvledger.text import printable
from statemachine import commands
from statemachine.decide import decide, request_named
from statemachine.errors import InvalidCommand, OutOfBlocks, RequestNotReady
from statemachine.events import DigestScope, Event, HostPolicy, Outcome, Tier
from statemachine.records.snapshot import state_digest
from statemachine.state.nodes import Request
from statemachine.state.state import State
from workers.pools.backends import ids_of
from workers.pools.interface import Pools

_log = logging.getLogger(__name__)
_EVICTED_BYTES = 16
"""What a block of a one-block run takes in the log when it is evicted: its id, its run's id and size."""
_MOST_GONE = 1 << 16
"""So many names are kept of requests that other threads have released, for batches that still name them."""
_FORKED = "this process is a fork of the one that owns it"


class Step:
    """One scheduler step: the calls inside its ``with`` block are one transaction. See :meth:`Ledger.step`."""

    def __init__(self, transactions: Transactions, expect_owner: Callable[[], None]) -> None:
        self._transactions = transactions
        self._expect_owner = expect_owner

    def __enter__(self) -> None:
        self._expect_owner()
        self._transactions.begin()  # collects up to the end of the block

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transactions.end()


class Together:
    """What is one transaction also outside of a step: the calls inside its ``with`` block."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions
        self._outermost = False

    def __enter__(self) -> None:
        self._outermost = self._transactions.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._outermost:
            self._transactions.end()


class Ledger:
    """One ledger and the thread that owns it: executes commands, folds answers in, closes."""

    def __init__(self, name: str, beginning: Beginning) -> None:
        writer, state = beginning.writer, beginning.state
        self.name = name
        self.config = beginning.config
        self.pools: Sequence[Pools] = beginning.pools
        """The pools, by rank; none any more once it is closed.

        ``pools[rank].tensor(layer, name)`` is a device tensor for the engine's kernels.
        """
        self._writer = writer
        self._state = state
        self._retention = Retention(writer, beginning.config.retain_bytes, beginning.config.retain_seconds)
        self._ranks: Ranks | None = None
        self._handoffs: list[Handoff] = []
        """Sender and receiver of a split instance."""
        self._live: dict[str, LiveRequest] = {}
        """What the engine has said of each live request, beside the state."""
        self._evict_step = writer.max_transaction_bytes // _EVICTED_BYTES // 2
        self._transactions = Transactions(writer, state)
        self._step = Step(self._transactions, self._expect_owner)
        self._owner = get_ident()
        self._releases: deque[commands.Release] = deque()
        """Releases from other threads, to be applied."""
        self._gone: dict[str, None] = {}
        """Requests that other threads have released and that no batch has been told of yet, oldest first."""
        self._applying = False
        forks.watch(self)

    def _begin(self, beginning: Beginning, publish: Callable[[Sequence[Pools]], None] | None) -> None:
        """Log the first transaction of this engine, and start or take over the workers."""
        if beginning.rebuilt is None:
            if publish is not None:
                publish(self.pools)
            self._transactions.commit(beginning.events, apply_them=False)
            if self.config.ranks:
                self._ranks = Ranks(self.name, self.config, self._writer, self._state, self._execute_for_ranks)
                self._ranks.start()
            return
        self._transactions.commit(beginning.events)
        log_notices(self.name, beginning.events)
        if self.config.weights not in (None, self._state.weights):
            self._transactions.commit(decide(self._state, commands.LoadWeights(self.config.weights or "")))
        lost = beginning.lost
        if publish is not None and "device" in lost:
            publish(self.pools)
        if self.config.ranks:
            self._ranks = Ranks(self.name, self.config, self._writer, self._state, self._execute_for_ranks)
            reasons = {Tier[tier.upper()]: reason for tier, reason in lost.items()}
            self._ranks.adopt(beginning.rebuilt.started, reasons, ids_of(beginning.pools))
        else:
            self._end_transfers()

    # From command to log

    def _execute(self, command: commands.Command) -> list[Event]:
        if self._transactions.closed:
            raise ManagerClosed(f"ledger {self.name!r}: {self._transactions.closed}")
        if get_ident() != self._owner or self._releases:
            self._expect_owner()
        try:
            events = decide(self._state, command)
        except OutOfBlocks as refused:
            self._transactions.commit([refused.event])
            raise
        except TypeError as error:  # deciding only reads: nothing has changed
            raise InvalidCommand(f"a value of this call has the wrong type: {error}") from error
        if events:
            self._commit(events)
        return events

    def _commit(self, events: list[Event]) -> None:
        """Log and apply what was decided in the present state."""
        self._transactions.commit(events)
        if self._state.transfers:
            self._follow(events)

    def _together(self) -> Together:
        return Together(self._transactions)

    def _execute_for_ranks(self, command: commands.Command) -> list[Event]:
        events = self._execute(command)
        log_notices(self.name, events)
        return events

    def _follow(self, events: list[Event]) -> None:
        """Give the transfers that these events started a deadline; without workers end them at once."""
        if self._ranks is not None:
            self._ranks.started(self._transactions.next_sequence - len(events))
        else:
            self._end_transfers()

    def _end_transfers(self) -> None:
        """End every transfer as done: without workers there are no bytes to move."""
        for id, transfer in list(self._state.transfers.items()):
            done = commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets))
            self._transactions.commit(decide(self._state, commands.EndQuarantine(id) if transfer.quarantined else done))

    def _back_up(self, request_id: str) -> None:
        """The call that leads to a back-up has been logged: without one it is as good as done, never half done."""
        try:
            self._execute(commands.Backup(request_named(self._state, request_id).leaf.id))
        except SharedMemoryFull:
            pass  # the log's writer has said so; a later call makes up for it
        except CallTooLarge as error:
            why = printable(str(error))
            _log.warning(
                "ledger %s: what request %r has cached is not copied to the host: %s", self.name, request_id, why
            )

    # The owner, and what other threads release

    def adopt_thread(self) -> None:
        """Make the calling thread the owner of the manager; the thread that owned it must not call any more."""
        self._owner = get_ident()

    def _expect_thread(self) -> None:
        """Refuse calls from other threads, and after the end."""
        if self._transactions.closed:
            raise ManagerClosed(f"ledger {self.name!r}: {self._transactions.closed}")
        if get_ident() != self._owner:
            raise WrongThread(
                f"ledger {self.name!r} belongs to thread {self._owner}, this is {get_ident()}: make all calls from "
                "one thread (release() may come from any), or adopt_thread() in the new owner"
            )

    def _expect_owner(self) -> None:
        """Refuse calls from other threads, and apply what these have released."""
        if self._transactions.closed or get_ident() != self._owner:
            self._expect_thread()
        if self._releases:
            self._apply_releases()

    def _apply_releases(self) -> None:
        """What other threads have released. A request that is gone already is only reported.

        One that cannot be logged now stays, with those behind it, for the next call.
        """
        if self._applying:  # a release is a call, too
            return
        self._applying = True
        try:
            while self._releases:
                command = self._releases[0]
                if command.request_id in self._state.numbers:
                    self._end(command)
                    self._gone[command.request_id] = None
                    if len(self._gone) > _MOST_GONE:
                        del self._gone[next(iter(self._gone))]
                else:
                    _log.warning("ledger %s: request %r was released twice", self.name, command.request_id)
                self._releases.popleft()
        finally:
            self._applying = False

    def _is_gone(self, request_id: str) -> bool:
        """Whether another thread has released a request that a batch still names: told once, and never to others."""
        if type(request_id) is not str or request_id not in self._gone:
            return False
        del self._gone[request_id]
        return request_id not in self._state.numbers

    def _end(self, command: commands.Release) -> None:
        """End a request, in the owner's thread."""
        request_id = command.request_id
        request = request_named(self._state, request_id)
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._cover(request)
        for handoff in self._handoffs:
            handoff.released(request_id)
        try:
            self._execute(command)
        except CallTooLarge:  # more private blocks than a transaction holds: give them back in steps
            step = self._writer.max_transaction_bytes // 8
            kept = request.fixed(self.config.block_size)
            while len(request.table) > kept:
                self._execute(commands.Trim(request_id, max(kept, len(request.table) - step)))
            self._execute(command)
        if self._ranks is not None:
            self._ranks.take_news(request)
        self._live.pop(request_id, None)  # none, if a signal handler has interrupted its admission

    def _cover(self, request: Request) -> None:
        """What a request cached ahead counts as computed when it ends, and may be backed up."""
        if request.computed < request.leaf.end:
            self._execute(commands.Cache(request.request_id, request.leaf.end, b"", None))
            self._back_up(request.request_id)

    # What moves in the background

    def poll(self) -> list[Progress]:
        """Fold the workers' answers into the log; returns the requests that became ready, or lost a part, each once.

        Never blocks. Call it once per scheduler step.
        """
        self._expect_owner()
        self._writer.look_at_age()
        return self._ranks.poll() if self._ranks is not None else []

    def fold(self) -> None:
        """Fold the workers' answers into the log; what there is to report stays for the next :meth:`poll`.

        Not public.
        """
        self._expect_owner()
        if self._ranks is not None:
            self._ranks.fold()

    def attach(self, handoff: Handoff) -> None:
        """Attach a sender or receiver to this manager. Raises :class:`InvalidCommand`: one of its kind is attached.

        Not public.
        """
        self._expect_owner()
        if any(type(other) is type(handoff) for other in self._handoffs):
            raise InvalidCommand(f"ledger {self.name!r} has a {type(handoff).__name__.lower()} already")
        self._handoffs.append(handoff)

    def detach(self, handoff: Handoff) -> None:
        """Forget a sender or receiver that was closed. Not public."""
        if handoff in self._handoffs:
            self._handoffs.remove(handoff)

    def _expect_still(self, request_id: str) -> None:
        """Refuse to change the block table of a request that is being handed over."""
        if any(handoff.uses(request_id) for handoff in self._handoffs):
            raise RequestNotReady(f"request {request_id!r} is being handed over: poll its sender or receiver first")

    def _at_rest(self) -> bool:
        """Whether nobody but the engine reads or writes the device pool."""
        for handoff in self._handoffs:
            handoff.fold()
        return not self._state.transfers and not any(handoff.busy() for handoff in self._handoffs)

    # What it knows

    def block_table(self, request_id: str) -> BlockTable:
        """The device block ids of a request, in token order."""
        return table_of(request_named(self._state, request_id))

    def block_tables(self, request_id: str) -> tuple[BlockTable, ...]:
        """A block table for each layer group, as in :attr:`Admission.block_tables`, as they are now."""
        request = request_named(self._state, request_id)
        return (table_of(request), *sides_of(request))

    def stats(self) -> dict[str, int]:
        """Totals since the ledger was created, and present levels (blocks, requests, transfers, the log)."""
        state = self._state
        return {
            **state.counters.as_dict(),
            "device_free_blocks": len(state.device.pool.free),
            "device_evictable_blocks": state.device.evictable,
            "device_total_blocks": state.device.pool.capacity,
            "host_resident_blocks": state.host.resident,
            "host_total_blocks": state.host.limit,
            "live_requests": len(state.requests),
            "live_transfers": len(state.transfers),
            "runs": len(state.nodes),
            "events": self._transactions.next_sequence - 1,
            **self._retention.stats(),
        }

    def digest(self) -> bytes:
        """Digest of the whole state. Encodes everything: not for the scheduler loop."""
        return state_digest(self._state)

    def take_digest(self) -> bytes:
        """Digest of the whole state, also written into the log: any replay can prove that it agrees."""
        self._execute(commands.TakeDigest(self._transactions.next_sequence - 1, DigestScope.STATE))
        return self.digest()

    def worker_pid(self, rank: int) -> int | None:
        """Process id of a rank's transfer worker; ``None`` while it has none."""
        return self._ranks.worker_pid(rank) if self._ranks is not None else None

    @property
    def state(self) -> State:
        """The state itself, to be read only."""
        return self._state

    @property
    def next_sequence(self) -> int:
        """Sequence number of the next event."""
        return self._transactions.next_sequence

    def step(self, number: SupportsIndex) -> Step:
        """Number the scheduler step, and make what follows one transaction::

            with manager.step(number):
                ...  # commit, admit, grow, release

        Everything inside is published when the block ends, with one fence and one doorbell. If the process dies before,
        it is as if the step had not begun; so *give no block table to the device, or to anybody, before the block has
        ended*. An exception that leaves the block undoes nothing: what was done until then is published. A step that
        outgrows a quarter of a log segment is published in parts, and what waits for copies
        (:meth:`CacheManager.wait`, :meth:`pause`) cannot be called inside.

        The number is written beside every event from now on, in 32 bits (for people). Without ``with``, it is only
        that, and each call stands alone.

        Raises:
            InvalidCommand: it was called inside a step.
        """
        value = expect_count("a step", number) & 0xFFFFFFFF
        self.expect_published("step()")
        self._transactions.step = value
        return self._step

    def expect_published(self, call: str) -> None:
        """Refuse a call inside a step, where nobody else can see what it needs others to see. Not public."""
        if self._transactions.collecting:
            raise InvalidCommand(f"{call} inside a step: call it before the step begins, or when it has ended")

    def on_published(self, call: Callable[[], None]) -> None:
        """Call this function whenever something was published, in the owner's thread, before the caller goes on.

        Not public.
        """
        self._writer.on_published = call

    # The end

    def close(self, *, keep: bool = False) -> None:
        """Stop the workers and give everything back; with ``keep`` the log and the pools stay for inspection.

        From any thread, while no other is in a call. What fails to close keeps nothing else from it.
        """
        if self._transactions.closed in ("closed", _FORKED):
            return
        with contextlib.suppress(Exception):  # inside a step: its calls have answered
            self._transactions.end()
        self._transactions.closed = "closed"
        forks.unwatch(self)
        self.pools = []  # their memory goes as soon as nobody else holds them
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._writer.close, unlink=not keep)
            if self._ranks is not None:
                last_first.callback(self._ranks.stop)
            last_first.callback(self._retention.stop)
            for handoff in self._handoffs:
                last_first.callback(handoff.close, keep=keep)

    def disown(self) -> None:
        """Become closed, in a fork of the process that owns the ledger. See :mod:`kvledger.manager.forks`.

        Not public.
        """
        self._transactions.closed = _FORKED
        for handoff in self._handoffs:
            handoff.disown()
        self._writer.disown()

    def __repr__(self) -> str:
        """Its ledger, and what is in use; never what users wrote."""
        name = f"{type(self).__name__} {self.name!r}"
        if self._transactions.closed:
            return f"<{name}: {printable(self._transactions.closed)}>"
        device = self._state.device
        used = device.pool.capacity - len(device.pool.free) - device.evictable
        requests = len(self._state.requests)
        return f"<{name}: {requests} requests, {used} of {device.pool.capacity} device blocks in use>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
