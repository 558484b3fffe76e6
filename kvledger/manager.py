"""The block manager an engine imports.

Every call decides, reserves room in the log, applies, and publishes, in that order: nobody can act on something that
is not in the log, and a call that is refused leaves no trace but the record of the refusal.

Thread rule: one thread (the scheduler's) makes all calls.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ipc import LogWriter, TransactionTooLarge, record_bytes
from kvledger.config import CacheConfig
from statemachine import codec, commands
from statemachine.apply import apply, genesis
from statemachine.content import Item, Tokens, words_of
from statemachine.decide import available_blocks, decide, peek, request_named
from statemachine.encoding import state_digest
from statemachine.errors import InvalidCommand, OutOfBlocks, OutOfOrder
from statemachine.events import BlocksAllocated, Event, Outcome, ReleaseReason, RequestMatched, Tier
from statemachine.state import Request, State, Transfer
from workers import PoolLayout
from workers.acknowledgements import Acknowledgement, Status
from workers.pools import Pools, create_pools
from workers.supervisor import Supervisor

BlockTable = npt.NDArray[np.int32]
"""Device block ids in token order, ``int32[blocks]``."""

_EVICT_STEP = 1 << 16
_BACK_OFF_S = 0.05
_LONGEST_BACK_OFF_S = 5.0
_OUTCOMES = {Status.OK: Outcome.DONE, Status.FAILED: Outcome.FAILED, Status.CORRUPT: Outcome.CORRUPT}


class ManagerClosed(RuntimeError):
    """The manager was closed, or an internal error ended it; reopen the ledger."""


class Admission(NamedTuple):
    """What a request got."""

    block_table: BlockTable
    device_blocks: int
    """Leading blocks that were on the device, or on their way there."""
    host_blocks: int
    """Blocks after those that are being swapped in."""
    ready: bool
    """False: nothing may be written or attended before :meth:`CacheManager.poll` reports the request."""


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


class CacheManager:
    """Decides which KV block holds which tokens, on which tier, for which request.

    ::

        with CacheManager.create("demo", CacheConfig(device_blocks=1000)) as manager:
            admission = manager.admit("request-1", prompt_tokens)
            ...  # compute the KV of admission.block_table[admission.device_blocks:]
            manager.cache("request-1")
            manager.release("request-1")
    """

    def __init__(self, name: str, config: CacheConfig, writer: LogWriter, state: State, pools: list[Pools]) -> None:
        self.name = name
        self.config = config
        self.pools = pools
        """The shared-memory pools, by rank."""
        self._writer = writer
        self._state = state
        self._supervisor: Supervisor | None = None
        self._answers: dict[int, dict[int, Acknowledgement]] = {}
        """By transfer and rank, for transfers that some rank still works on."""
        self._orders: dict[int, _Order] = {}
        """By transfer in flight."""
        self._restarts: dict[int, tuple[float, int]] = {}
        """Ranks without a worker: when to start it, and the incarnations that failed in a row."""
        self._tails: dict[str, bytes] = {}
        """By live request: the words after its last full block."""
        self._step = 0
        self._closed = ""

    @classmethod
    def create(cls, name: str, config: CacheConfig) -> Self:
        """Create a ledger with its pools, start its workers, and wait until they are ready.

        Raises:
            ipc.LedgerExists: there is a ledger of that name.
            ipc.SharedMemoryFull: the log or the pools do not fit.
            workers.WorkerFailed: a worker did not get ready, with its reason.
        """
        writer = LogWriter.create(
            name,
            schema_hash=codec.SCHEMA_HASH,
            segment_bytes=config.segment_bytes,
            retain_bytes=config.retain_bytes,
        )
        manager = None
        try:
            layout = config.layout if config.ranks else None
            pools = create_pools(name, layout) if layout is not None else []
            opened = config.opened(layout.text() if layout is not None else "", ";".join(pool.id for pool in pools))
            manager = cls(name, config, writer, genesis(opened), pools)
            manager._publish([opened], apply_them=False)
            if layout is not None:
                manager._start_workers(layout)
        except BaseException:
            if manager is not None:
                manager.close()
            else:
                writer.close(unlink=True)
            raise
        return manager

    def _start_workers(self, layout: PoolLayout) -> None:
        self._supervisor = Supervisor(self.name, layout, ready_timeout_s=self.config.ready_timeout_s)
        for rank in range(layout.ranks):
            self._supervisor.start(rank, 1, self._writer.next_sequence)
        for change in self._supervisor.wait_until_ready():
            self._execute(commands.JoinWorker(change.rank, self._supervisor.pid(change.rank)))
        self._writer.listen()

    # The life of a request

    def match(
        self,
        key: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: int | None = None,
    ) -> Admission:
        """Begin a request: find, pin and if need be swap in the cached prefix of its prompt.

        Args:
            key: the engine's own name of the request.
            tokens: the whole prompt; an int32 array or buffer is used without copying, a list costs 20 to 30 ns
                per token.
            items: multimodal items in the prompt.
            namespace: see :func:`statemachine.content.namespace_key`.
            max_blocks: match at most so many blocks; default ``(tokens - 1) // block_size``, so that at least one
                token is left to compute.

        Raises:
            statemachine.content.InvalidTokens, DuplicateRequest
        """
        words, limit = self._prompt(tokens, items, max_blocks)
        events = self._execute(commands.Match(key, words, namespace, limit))
        return self._admission(events[0], words)

    def admit(
        self,
        key: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: int | None = None,
        blocks: int | None = None,
    ) -> Admission:
        """Match and allocate in one transaction, or not at all.

        ``blocks`` is the length of the block table, by default enough for the prompt; the rest as in :meth:`match`.

        Raises:
            OutOfBlocks: there is no room; nothing is pinned.
        """
        words, limit = self._prompt(tokens, items, max_blocks)
        if blocks is None:
            blocks = -(-len(words) // self._state.block_bytes)
        events = self._execute(commands.Admit(key, words, namespace, limit, blocks))
        return self._admission(events[0], words)

    def peek(self, tokens: Tokens, *, items: Sequence[Item] = (), namespace: bytes = b"") -> tuple[int, int]:
        """How many leading blocks would match now, on the device and after those on the host. Changes nothing."""
        words, _ = self._prompt(tokens, items, 0)
        return peek(self._state, words, namespace, len(words))

    def allocate(self, counts: Mapping[str, int]) -> dict[str, BlockTable]:
        """Give each named request so many more blocks: one call per scheduler step, all or nothing.

        Returns the new ids per request. A request whose new blocks are still being copied out is not
        :meth:`ready` until :meth:`poll` says so.

        Raises:
            OutOfBlocks: with how many of the requests, in order, would fit.
            UnknownRequest, InvalidCommand
        """
        for key, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise InvalidCommand(f"request {key!r} cannot get {count!r} blocks: counts are whole numbers from 0")
        events = self._execute(commands.Allocate(list(counts), list(counts.values())))
        granted = np.empty(0, np.int32)
        if events:
            allocated = events[-1]
            assert isinstance(allocated, BlocksAllocated)
            granted = np.array(allocated.blocks, np.int32)
        new = {}
        start = 0
        for key, count in counts.items():
            new[key] = granted[start : start + count]
            start += count
        return new

    def cache(self, key: str, blocks: int | None = None, *, generated: Tokens | None = None) -> None:
        """Publish computed blocks: from now on other requests can match them.

        Args:
            blocks: the first so many blocks of the request are computed; default: all full blocks of known content.
            generated: the tokens that follow those known so far. What does not fill a block is remembered.

        Raises:
            RequestNotReady: some of the blocks are still being copied.
            InvalidCommand, UnknownRequest
        """
        request = request_named(self._state, key)
        size = self._state.block_bytes
        words = tail = b""
        if generated is not None:
            words = self._tails[key] + words_of(generated)
            full = len(words) // size * size
            words, tail = words[:full], words[full:]
        if blocks is None:
            blocks = request.leaf.end + (len(request.words) + len(words)) // size
        elif isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 0:
            raise InvalidCommand(f"{blocks!r} blocks cannot be cached")
        self._execute(commands.Cache(key, blocks, words))
        if generated is not None:
            self._tails[key] = tail

    def trim(self, key: str, blocks: int) -> None:
        """Give back all but the first ``blocks`` blocks of a request (a rejected speculation, an undone chunk)."""
        self._execute(commands.Trim(key, blocks))

    def reassign(self, key: str, target: str, blocks: Sequence[int]) -> None:
        """Move private blocks of one request to the end of another's block table."""
        self._execute(commands.Reassign(key, target, array("i", blocks)))

    def release(self, key: str, reason: ReleaseReason = ReleaseReason.FINISHED, *, final: bool = False) -> None:
        """End a request. What it cached stays until it is evicted.

        ``final=True`` says that nobody is expected to continue it: what only it used is evicted first.
        """
        self._execute(commands.Release(key, reason, final))
        del self._tails[key]

    # What moves in the background

    def poll(self) -> list[Progress]:
        """Fold the workers' answers into the log; returns the requests that became ready, or lost a part.

        Never blocks. Call it once per scheduler step.
        """
        progress: dict[str, Progress] = {}
        supervisor = self._supervisor
        if supervisor is None:
            return []
        transfers = self._state.transfers
        for answer in supervisor.acknowledgements():
            if answer.transfer in transfers:
                self._answers.setdefault(answer.transfer, {})[answer.rank] = answer
        self._watch_workers(supervisor)
        if not transfers:
            return []
        now = time.monotonic()
        for id, transfer in list(transfers.items()):
            answers = self._answers.get(id, {})
            if len(answers) == self.config.ranks:
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

    def _watch_workers(self, supervisor: Supervisor) -> None:
        """Log who came and who went, and start a dead rank's worker again."""
        for change in supervisor.changes():
            rank = change.rank
            if change.ready:
                del self._restarts[rank]
                if not self._restarts:
                    self._writer.hold(None)
                self._execute(commands.JoinWorker(rank, supervisor.pid(rank)))
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
                    supervisor.start(rank, self._state.workers.get(rank, 0) + 1, self._oldest_in_flight())

    def _never_again(self, rank: int) -> None:
        """The worker that might still have written what is quarantined is dead: that counts as its answer."""
        for id, transfer in self._state.transfers.items():
            if transfer.quarantined:
                self._answers.setdefault(id, {})[rank] = Acknowledgement(rank, id, 0, Status.FAILED, "dead")

    def _oldest_in_flight(self) -> int:
        """Sequence from which on a new worker has to read the log."""
        return min((order.sequence for order in self._orders.values()), default=self.next_sequence)

    def _finish(self, transfer: Transfer, outcome: Outcome, valid: int, progress: dict[str, Progress]) -> None:
        state = self._state
        waiters = [(state.requests[id], state.requests[id].leaf.end) for id in transfer.waiters]
        self._execute(commands.FinishTransfer(transfer.id, outcome, valid))
        for request, before in waiters:
            shortened = request.leaf.end < before
            earlier = progress.get(request.key)
            shortened = shortened or (earlier is not None and earlier.shortened)
            if shortened or not request.waits:
                progress[request.key] = Progress(request.key, _table(request), request.leaf.end, shortened)

    def cached_blocks(self, key: str) -> int:
        """Leading blocks of a request's block table that are cached: their KV is valid once it is ready."""
        return request_named(self._state, key).leaf.end

    def ready(self, key: str) -> bool:
        """Whether every block of a request may be used."""
        return not request_named(self._state, key).waits

    def wait(self, key: str, timeout: float | None = None) -> list[Progress]:
        """Poll until a request is ready. For tests and simple programs: a scheduler polls once per step.

        Raises:
            TimeoutError: it was not ready in time.
        """
        deadline = time.monotonic() + (self.config.transfer_timeout_s * 2 if timeout is None else timeout)
        progress: list[Progress] = []
        pause = 0.0
        while not self.ready(key):
            progress += self.poll()
            if time.monotonic() > deadline:
                raise TimeoutError(f"request {key!r} still waits for {[*request_named(self._state, key).waits]}")
            time.sleep(pause)
            pause = min(pause + 2e-6, 1e-3)
        return progress

    # The cache as a whole

    def clear(self, *, force: bool = False) -> None:
        """Forget everything cached. With ``force`` also while requests run: what they hold can never match again.

        Raises:
            Busy: requests or transfers use the cache, and ``force`` is not given.
        """
        self._execute(commands.Clear(force))
        for tier in (Tier.HOST, Tier.DEVICE):
            while self._execute(commands.Evict(tier, _EVICT_STEP)):
                pass

    def resize(self, tier: Tier, blocks: int) -> None:
        """Change the number of blocks of a tier. Shrinking drops what is cached in the highest ids.

        The pools themselves are not moved: with workers a tier can only shrink below its first size and grow back.

        Raises:
            Busy: somebody uses a block that would go.
            InvalidCommand
        """
        if self.pools:
            most = self.config.device_blocks if tier == Tier.DEVICE else self.config.host_blocks
            if blocks > most:
                raise InvalidCommand(f"the {tier.name} pool has room for {most} blocks, not for {blocks}")
        self._execute(commands.Resize(tier, blocks))

    def available_blocks(self) -> int:
        """Device blocks that are free or can be evicted."""
        return available_blocks(self._state)

    def block_table(self, key: str) -> BlockTable:
        """The device block ids of a request, in token order."""
        return _table(request_named(self._state, key))

    def stats(self) -> dict[str, int]:
        """Totals since the ledger was created, and present levels (blocks, requests, transfers)."""
        state = self._state
        return {
            **state.counters.as_dict(),
            "device_free_blocks": len(state.device.free),
            "device_evictable_blocks": state.evictable,
            "device_total_blocks": state.device.capacity,
            "host_resident_blocks": state.host_resident,
            "host_total_blocks": state.host_blocks,
            "live_requests": len(state.requests),
            "live_transfers": len(state.transfers),
            "runs": len(state.nodes),
            "events": self._writer.next_sequence - 1,
        }

    def digest(self) -> bytes:
        """Digest of the whole state. Encodes everything: not for the scheduler loop."""
        return state_digest(self._state)

    def take_digest(self) -> bytes:
        """Digest of the whole state, also written into the log: any replay can prove that it agrees."""
        self._execute(commands.TakeDigest(self._writer.next_sequence - 1, True))
        return self.digest()

    @property
    def state(self) -> State:
        """The state itself, to be read only."""
        return self._state

    @property
    def next_sequence(self) -> int:
        """Sequence number of the next event."""
        return self._writer.next_sequence

    def step(self, number: int) -> None:
        """Number of the scheduler step, written beside every event from now on (for people)."""
        self._step = number & 0xFFFFFFFF

    def close(self, *, keep: bool = False) -> None:
        """Stop the workers and give everything back; with ``keep`` the log and the pools stay for inspection."""
        if self._closed == "closed":
            return
        self._closed = "closed"
        try:
            if self._supervisor is not None:
                self._supervisor.stop()
        finally:
            self._writer.close(unlink=not keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # From command to log

    def _execute(self, command: commands.Command) -> list[Event]:
        if self._closed:
            raise ManagerClosed(f"ledger {self.name!r}: {self._closed}")
        try:
            events = decide(self._state, command)
        except OutOfBlocks as refused:
            if refused.event is not None:
                self._publish([refused.event])
            raise
        if events:
            self._publish(events)
            if self._state.transfers:
                self._watch(events)
        return events

    def _publish(self, events: list[Event], apply_them: bool = True) -> None:
        encode = codec.encode
        records = [encode(event) for event in events]
        size = 0
        for record in records:
            size += record_bytes(len(record[3]))
        try:
            self._writer.reserve(size)
        except TransactionTooLarge as error:
            raise InvalidCommand(str(error)) from error
        if apply_them:
            state = self._state
            try:
                for event in events:
                    apply(state, event)
            except BaseException as error:
                self._closed = f"an event could not be applied ({error}); reopen the ledger"
                raise
        self._writer.append(records, self._step)

    def _watch(self, events: list[Event]) -> None:
        """New transfers get a deadline; without workers they are done at once."""
        if self.config.ranks == 0:
            for id, transfer in list(self._state.transfers.items()):
                self._publish(decide(self._state, commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets))))
            return
        deadline = time.monotonic() + self.config.transfer_timeout_s
        sequence = self._writer.next_sequence - len(events)
        for id in self._state.transfers:
            if id not in self._orders:
                self._orders[id] = _Order(sequence, deadline)

    def _prompt(self, tokens: Tokens, items: Sequence[Item], max_blocks: int | None) -> tuple[memoryview, int]:
        words = memoryview(words_of(tokens, items=items)).cast("B")
        if max_blocks is None:
            max_blocks = max(len(words) // 4 - 1, 0) // self.config.block_size
        elif isinstance(max_blocks, bool) or not isinstance(max_blocks, int) or max_blocks < 0:
            raise InvalidCommand(f"max_blocks must be a whole number from 0, not {max_blocks!r}")
        return words, max_blocks

    def _admission(self, matched: Event, words: memoryview) -> Admission:
        assert isinstance(matched, RequestMatched)
        block_bytes = self._state.block_bytes
        self._tails[matched.key] = bytes(words[len(words) // block_bytes * block_bytes :])
        request = self._state.requests[matched.request]
        return Admission(_table(request), matched.device_blocks, matched.host_blocks, not request.waits)


def _table(request: Request) -> BlockTable:
    return np.array(request.table, np.int32)
