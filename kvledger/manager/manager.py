"""The block manager an engine imports.

Every call decides, reserves room in the log, applies, and publishes, in that order: nobody can act on something that
is not in the log, and a call that is refused leaves no trace but the record of the refusal.

Thread rule: one thread (the scheduler's) makes all calls that change something; it is the thread that created the
manager, or the last one that called :meth:`CacheManager.adopt_thread`. From any other they raise :class:`WrongThread`,
except :meth:`CacheManager.release`, which is applied at the owner's next call. Questions (``stats``, ``ready``,
``can_allocate``, …) may be asked from anywhere; their answer may be old when it arrives.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from types import TracebackType
from typing import NamedTuple, Self, SupportsIndex

import numpy as np

from ipc import Control, LedgerError, LogWriter, SharedMemoryFull, record_bytes
from ipc.writer import next_epoch, segment_bytes_for
from kvledger.config import CacheConfig, ConfigError
from kvledger.errors import CallTooLarge, ManagerClosed, Paused, WrongThread
from kvledger.manager import forks
from kvledger.manager import wait as waiting
from kvledger.manager.arguments import block_ids, expect_bool, expect_namespace, expect_seconds, expect_tier, whole
from kvledger.manager.handoffs import Handoff, end_messagers, end_receiving
from kvledger.manager.notices import notice
from kvledger.manager.ranks import BlockTable, Progress, Ranks, table_of
from kvledger.manager.rebuild import rebuild
from kvledger.manager.retention import Retention
from kvledger.manager.transactions import Transactions
from statemachine import commands
from statemachine.apply import genesis
from statemachine.content import Item, Tokens, namespace_key, versioned, words_of
from statemachine.decide import available_blocks, can_allocate, decide, peek, request_named, victims_for
from statemachine.errors import Busy, CommandRejected, InvalidCommand, OutOfBlocks, RequestNotReady
from statemachine.events import (
    BlocksAllocated,
    BlocksEvicted,
    Event,
    HostPolicy,
    Outcome,
    PoolResized,
    ReleaseReason,
    RequestMatched,
    Tier,
    TransferStarted,
)
from statemachine.records import codec
from statemachine.records.snapshot import state_digest
from statemachine.state.nodes import Request
from statemachine.state.state import State
from workers.pools.backends import Pools, create_pools, ids_of, reopen_pools

_log = logging.getLogger(__name__)
_EVICTED_BYTES = 16
"""What a block of a one-block run takes in the log when it is evicted: its id, its run's id and size."""
_FORKED = "this process is a fork of the one that owns it"


class Admission(NamedTuple):
    """What a request got."""

    block_table: BlockTable
    device_blocks: int
    """Leading blocks that were on the device, or on their way there."""
    host_blocks: int
    """Blocks after those that are being swapped in."""
    ready: bool
    """False: nothing may be written or attended before :meth:`CacheManager.poll` reports the request."""

    @property
    def cached_blocks(self) -> int:
        """Leading blocks that need not be computed."""
        return self.device_blocks + self.host_blocks


class CacheManager:
    """Decides which KV block holds which tokens, on which tier, for which request.

    ::

        with CacheManager.create("demo", CacheConfig(device_blocks=1000)) as manager:
            admission = manager.admit("request-1", prompt_tokens)
            ...  # compute the KV of admission.block_table[admission.cached_blocks:]
            manager.cache("request-1")
            manager.release("request-1")
    """

    def __init__(self, name: str, config: CacheConfig, writer: LogWriter, state: State, pools: Sequence[Pools]) -> None:
        self.name = name
        self.config = config
        self.pools = pools
        """The pools, by rank; none any more once it is closed.

        ``pools[rank].tensor(layer, name)`` is a device tensor for the engine's kernels.
        """
        self._writer = writer
        self._state = state
        self._retention = Retention(writer, config.retain_bytes)
        self._ranks: Ranks | None = None
        self._handoffs: list[Handoff] = []
        """Sender and receiver of a split instance."""
        self._tails: dict[str, bytes] = {}
        """By live request: the words after its last full block."""
        self._evict_step = writer.max_transaction_bytes // _EVICTED_BYTES // 2
        self._transactions = Transactions(writer, state)
        self._owner = get_ident()
        self._releases: deque[commands.Release] = deque()
        """Releases from other threads, to be applied."""
        self._applying = False
        self._paused = False
        self._weights = config.weights
        forks.watch(self)

    @classmethod
    def create(
        cls, name: str, config: CacheConfig, *, publish: Callable[[Sequence[Pools]], None] | None = None
    ) -> Self:
        """Create a ledger with its pools, start its workers, and wait until they are ready.

        Args:
            publish: with ``backend="cuda"``, called with the pools before the workers start, to publish the device
                tensors of the ranks that live in this process (:meth:`workers.pools.cuda_pools.CudaPools.publish`).
                Ranks in processes of their own publish theirs while this call waits for the workers.

        Raises:
            ipc.LedgerExists: there is a ledger of that name.
            ipc.SharedMemoryFull: the log or the pools do not fit.
            workers.WorkerFailed: a worker did not get ready, with its reason.
        """
        if not isinstance(config, CacheConfig):
            raise ConfigError(f"config is a CacheConfig, not {type(config).__name__}")
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
            opened = config.opened(layout.text() if layout is not None else "", ids_of(pools))
            manager = cls(name, config, writer, genesis(opened), pools)
            if publish is not None:
                publish(pools)
            manager._transactions.commit([opened], apply_them=False)
            if layout is not None:
                manager._ranks = Ranks(name, config, writer, manager._state, manager._execute_for_ranks)
                manager._ranks.start()
        except BaseException:
            if manager is not None:
                manager.close()
            else:
                writer.close(unlink=True)
            raise
        return manager

    @classmethod
    def open(
        cls,
        name: str,
        config: CacheConfig | None = None,
        *,
        publish: Callable[[Sequence[Pools]], None] | None = None,
    ) -> Self:
        """Take over the ledger of an engine that died, or that closed it with ``keep``: the cache is warm.

        The state is what the log says, up to its last whole transaction. The dead engine's requests are released, and
        what only they had cached is evicted. Workers that survived go on; the others are started again. Transfers in
        flight stay in flight: they end when all ranks have answered.

        Args:
            config: must agree with the ledger, except for ``segment_bytes``, ``retain_bytes`` and the time-outs;
                default: what the ledger says.
            publish: as for :meth:`create`; called where the device pools did not outlive their process.

        Raises:
            ipc.LedgerNotFound: there is no ledger of that name.
            ipc.WriterAlive: an engine is running on it; the message names its process.
            ipc.LogCorrupt: the log is damaged, with segment and offset. Nothing was changed.
            ipc.Overrun: the log does not reach back to its beginning, and there is no snapshot to start from.
            ConfigError: ``config`` does not agree with the ledger, in the setting that is named.
            ipc.SharedMemoryFull: there is no room for a new segment.
            HandoffError: a prefill instance hangs while it writes into the device pool.
        """
        control = Control.open(name)
        try:
            control.lock()
            rebuilt = rebuild(control)
            state = rebuilt.state
            if config is None:
                config = CacheConfig.of(state.opened, rebuilt.segment_bytes)
            config.expect(state.opened)
            layout = config.layout if config.ranks else None
            pools, lost = reopen_pools(name, layout, state.pools) if layout is not None else ([], {})
            epoch = next_epoch(control)
            events = decide(state, commands.StartEpoch(epoch, rebuilt.last_sequence))
            size = sum(record_bytes(len(codec.encode(event)[3])) for event in events)
            writer = LogWriter.resume(
                control,
                rebuilt.last_sequence,
                epoch=epoch,
                segment_bytes=max(config.segment_bytes, segment_bytes_for(size)),
                retain_bytes=config.retain_bytes,
            )
        except BaseException:
            control.close()
            raise
        manager = cls(name, config, writer, state, pools)
        try:
            end_messagers(name)
            end_receiving(name)  # nothing becomes free while somebody else may still write it
            manager._transactions.commit(events)
            notice(name, events)
            if publish is not None and "device" in lost:
                publish(pools)
            if layout is not None:
                manager._ranks = Ranks(name, config, writer, state, manager._execute_for_ranks)
                manager._ranks.adopt(
                    rebuilt.started, {Tier[tier.upper()]: reason for tier, reason in lost.items()}, ids_of(pools)
                )
            else:
                manager._end_transfers()
        except BaseException:
            manager.close(keep=True)
            raise
        return manager

    # The life of a request

    def match(
        self,
        key: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
    ) -> Admission:
        """Begin a request: find, pin and if need be swap in the cached prefix of its prompt.

        Args:
            key: the engine's own name of the request.
            tokens: the whole prompt; an int32 array or buffer is used without copying, a list costs 6 ns per
                token.
            items: multimodal items in the prompt.
            namespace: see :func:`statemachine.content.namespace_key`.
            max_blocks: match at most so many blocks; default ``(tokens - 1) // block_size``, so that at least one
                token is left to compute.

        Raises:
            statemachine.content.InvalidTokens, DuplicateRequest, Paused
        """
        words, limit, uncut = self._prompt(tokens, items, max_blocks)
        events = self._execute(commands.Match(key, words, self._namespace(namespace), limit, uncut))
        return self._admission(events[0], words)

    def admit(
        self,
        key: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
        blocks: SupportsIndex | None = None,
    ) -> Admission:
        """Match and allocate in one transaction, or not at all.

        ``blocks`` is the length of the block table, by default enough for the prompt: more reserves blocks for the
        first decode steps, fewer are enough for the first chunk of a prefill; it is never shorter than what matches.
        The rest as in :meth:`match`.

        Raises:
            OutOfBlocks: there is no room (beyond the watermark); nothing is pinned.
        """
        words, limit, uncut = self._prompt(tokens, items, max_blocks)
        count = -(-len(words) // self._state.block_bytes) if blocks is None else whole("blocks", blocks)
        watermark = self.config.watermark_blocks
        namespace = self._namespace(namespace)
        events = self._execute(commands.Admit(key, words, namespace, limit, count, uncut, watermark))
        return self._admission(events[0], words)

    def peek(self, tokens: Tokens, *, items: Sequence[Item] = (), namespace: bytes = b"") -> tuple[int, int]:
        """How many leading blocks would match now, on the device and after those on the host. Changes nothing."""
        expect_namespace(namespace)
        words, _, uncut = self._prompt(tokens, items, 0)
        return peek(self._state, words, versioned(self._weights, namespace), len(words), uncut)

    def extend(self, key: str) -> Progress:
        """Between two chunks of a prefill: match again behind what the request has cached.

        What others cached meanwhile is pinned and need not be computed; the request's own copies of it, and the
        duplicates that :meth:`cache` left, are given back, so *the block table changes*: go on with the one returned,
        from ``cached_blocks`` on. At least one token is left to compute.

        Raises:
            RequestNotReady, UnknownRequest, Paused
        """
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        request = request_named(self._state, key)
        self._expect_still(key)
        known = len(request.words) + len(self._tail(key))
        limit = request.leaf.end + max(known // 4 - 1, 0) // self.config.block_size
        if self._execute(commands.Extend(key, limit)) and self.config.backup_after > 1:
            self._back_up(key)
        return Progress(key, table_of(request), request.leaf.end, False)

    def allocate(self, counts: Mapping[str, SupportsIndex]) -> dict[str, BlockTable]:
        """Give each named request so many more blocks: one call per scheduler step, all or nothing.

        Returns the new ids per request. A request whose new blocks are still being copied out is not
        :meth:`ready` until :meth:`poll` says so.

        Raises:
            OutOfBlocks: with how many of the requests, in order, would fit.
            UnknownRequest, InvalidCommand
        """
        if type(counts) is not dict and not isinstance(counts, Mapping):
            raise InvalidCommand(f"counts are a mapping from request to blocks, not {type(counts).__name__}")
        numbers = [
            count if type(count) is int and count >= 0 else whole(f"blocks for request {key!r}", count)
            for key, count in counts.items()
        ]
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        events = self._execute(commands.Allocate(list(counts), numbers))
        granted = np.empty(0, np.int32)
        if events:
            allocated = events[-1]
            assert isinstance(allocated, BlocksAllocated)
            granted = np.array(allocated.blocks, np.int32)
        new = {}
        start = 0
        for key, count in zip(counts, numbers):
            new[key] = granted[start : start + count]
            start += count
        return new

    def preempt(self, blocks: SupportsIndex, candidates: Sequence[str]) -> list[str]:
        """Preempt requests, in the order given (lowest priority first), until ``blocks`` can be allocated.

        Only as many as are needed are released; their names are returned. What they cached stays: a preempted request
        that is admitted again later finds it on the device, or on the host where there is one (preemption by swap), and
        computes the rest (by recomputation). Call :meth:`cache` before, to keep what is computed.

        Raises:
            OutOfBlocks: all candidates together would not be enough; nobody was preempted.
            UnknownRequest
        """
        self._expect_owner()
        wanted = whole("blocks", blocks)
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
            raise InvalidCommand(f"candidates are a sequence of requests, not {type(candidates).__name__}")
        for key in candidates:
            request_named(self._state, key)
        chosen = victims_for(self._state, wanted, candidates)
        for key in chosen:
            self.release(key, ReleaseReason.PREEMPTED)
        return chosen

    def cache(
        self,
        key: str,
        blocks: SupportsIndex | None = None,
        *,
        generated: Tokens | None = None,
        computed: SupportsIndex | None = None,
    ) -> None:
        """Publish blocks: from now on other requests can match them.

        Args:
            blocks: the first so many blocks of the request are computed; default: all full blocks of known content.
            generated: the tokens that follow those known so far. What does not fill a block is remembered.
            computed: only so many leading blocks of the request are computed, the others will be by the step that is
                being scheduled. They can be matched, but they are not copied out until a later call, or the release,
                covers them (so do not cache ahead for a step that may be called off). Default: all are.

        Raises:
            RequestNotReady: some of the blocks are still being copied.
            InvalidCommand, UnknownRequest
        """
        self._expect_owner()
        request = request_named(self._state, key)
        size = self._state.block_bytes
        words, tail = b"", self._tail(key)
        known = tail
        if generated is not None:
            words = tail + words_of(generated)
            full = len(words) // size * size
            words, tail = words[:full], words[full:]
        if blocks is None:
            count = request.leaf.end + (len(request.words) + len(words)) // size
        else:
            count = whole("blocks", blocks)
        ready = None if computed is None else whole("computed", computed)
        del self._tails[key]  # not known while it is not certain: what interrupts this call must not garble the next
        try:
            self._execute(commands.Cache(key, count, words, ready))
        except (CommandRejected, LedgerError):  # nothing has changed
            self._tails[key] = known
            raise
        self._tails[key] = tail
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._back_up(key)

    def _tail(self, key: str) -> bytes:
        tail = self._tails.get(key)
        if tail is None:
            why = "a call was interrupted; release it"
            raise InvalidCommand(f"the last tokens of request {key!r} are not known: {why}")
        return tail

    def _back_up(self, key: str) -> None:
        """The call that leads to a back-up has been logged: without one it is as good as done, never half done."""
        try:
            self._execute(commands.Backup(request_named(self._state, key).leaf.id))
        except SharedMemoryFull:
            pass  # the log's writer has said so; a later call makes up for it
        except CallTooLarge as error:
            _log.warning("ledger %s: what request %r has cached is not copied to the host: %s", self.name, key, error)

    def trim(self, key: str, blocks: SupportsIndex) -> None:
        """Give back all but the first ``blocks`` blocks of a request (a rejected speculation, an undone chunk)."""
        kept = whole("blocks", blocks)
        self._expect_still(key)
        self._execute(commands.Trim(key, kept))

    def reassign(self, key: str, target: str, blocks: Sequence[int]) -> None:
        """Move private blocks of one request to the end of another's block table."""
        self._expect_still(key)
        self._execute(commands.Reassign(key, target, block_ids(blocks)))

    def give_back(self, key: str, blocks: Sequence[int]) -> None:
        """Free private blocks of a request, wherever they stand behind its cached blocks."""
        request_named(self._state, key)
        self._expect_still(key)
        self._execute(commands.GiveBack(key, block_ids(blocks)))

    def release(self, key: str, reason: ReleaseReason = ReleaseReason.FINISHED, *, final: bool = False) -> None:
        """End a request. What it cached stays until it is evicted.

        ``final=True`` says that nobody is expected to continue it: what only it used is evicted first. From a thread
        that does not own the manager the release is queued and applied at the owner's next call.
        """
        if type(reason) is not ReleaseReason or type(final) is not bool:
            raise InvalidCommand(f"reason is a ReleaseReason and final a bool, not {reason!r:.80} and {final!r:.80}")
        command = commands.Release(key, reason, final)
        if get_ident() != self._owner:
            request_named(self._state, key)
            self._releases.append(command)
            return
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._cover(key)
        for handoff in self._handoffs:
            handoff.released(key)
        try:
            self._execute(command)
        except CallTooLarge:  # more private blocks than a transaction holds: give them back in steps
            step = self._writer.max_transaction_bytes // 8
            request = request_named(self._state, key)
            while len(request.table) > request.leaf.end:
                self._execute(commands.Trim(key, max(request.leaf.end, len(request.table) - step)))
            self._execute(command)
        self._tails.pop(key, None)  # none, if a signal handler has interrupted its admission

    def _cover(self, key: str) -> None:
        """What a request cached ahead counts as computed when it ends, and may be backed up."""
        request = request_named(self._state, key)
        if request.computed < request.leaf.end:
            self.cache(key, request.leaf.end)

    def _apply_releases(self) -> None:
        """What other threads have released. A request that is gone already is only reported.

        One that cannot be logged now stays, with those behind it, for the next call.
        """
        if self._applying:  # release() is a call, too
            return
        self._applying = True
        try:
            while self._releases:
                command = self._releases[0]
                if command.key in self._state.keys:
                    self.release(*command[:2], final=command.final)
                else:
                    _log.warning("ledger %s: request %r was released twice", self.name, command.key)
                self._releases.popleft()
        finally:
            self._applying = False

    # What moves in the background

    def poll(self) -> list[Progress]:
        """Fold the workers' answers into the log; returns the requests that became ready, or lost a part, each once.

        Never blocks. Call it once per scheduler step.
        """
        self._expect_owner()
        return self._ranks.poll() if self._ranks is not None else []

    def fold(self) -> None:
        """As :meth:`poll`, but what there is to report stays for the next :meth:`poll`."""
        self._expect_owner()
        if self._ranks is not None:
            self._ranks.fold()

    def _told(self, request: Request) -> None:
        """Whoever waited for this request knows: :meth:`poll` need not report it."""
        if self._ranks is not None:
            self._ranks.told(request)

    def attach(self, handoff: Handoff) -> None:
        """A sender or receiver of this manager says so. Raises :class:`InvalidCommand`: there is one of its kind."""
        self._expect_owner()
        if any(type(other) is type(handoff) for other in self._handoffs):
            raise InvalidCommand(f"ledger {self.name!r} has a {type(handoff).__name__.lower()} already")
        self._handoffs.append(handoff)

    def detach(self, handoff: Handoff) -> None:
        """It was closed."""
        if handoff in self._handoffs:
            self._handoffs.remove(handoff)

    def _expect_still(self, key: str) -> None:
        """Refuse to change the block table of a request that is being handed over."""
        if any(handoff.uses(key) for handoff in self._handoffs):
            raise RequestNotReady(f"request {key!r} is being handed over: poll its sender or receiver first")

    def _at_rest(self) -> bool:
        """Whether nobody but the engine reads or writes the device pool."""
        for handoff in self._handoffs:
            handoff.fold()
        return not self._state.transfers and not any(handoff.busy() for handoff in self._handoffs)

    def cached_blocks(self, key: str) -> int:
        """Leading blocks of a request's block table that are cached: their KV is valid once it is ready."""
        return request_named(self._state, key).leaf.end

    def ready(self, key: str) -> bool:
        """Whether every block of a request may be used."""
        return not request_named(self._state, key).waits

    def wait(self, key: str, timeout: float | None = None) -> list[Progress]:
        """Poll until a request is ready. For tests and simple programs: a scheduler polls once per step.

        Raises:
            TimeoutError: it was not ready in time (default: twice the deadline of a transfer).
        """
        expect_seconds("timeout", timeout)
        return waiting.wait(self, key, timeout)

    async def wait_async(self, key: str, timeout: float | None = None) -> Progress:
        """Wait until a request is ready without blocking the event loop, whose thread must own the manager.

        Any number of tasks may wait at once; each is told about its own request.

        Raises:
            TimeoutError: it was not ready in time.
            UnknownRequest: somebody released it.
        """
        expect_seconds("timeout", timeout)
        return await waiting.wait_async(self, key, timeout)

    # The cache as a whole

    def clear(self, *, force: bool = False, wait: float = 0.0) -> None:
        """Forget everything cached.

        With ``force`` also while requests run: what they hold can never match again, and is freed when they release it.
        With ``wait``, first give transfers (and releases from other threads) so many seconds to end.

        Raises:
            Busy: requests or transfers use the cache, and ``force`` is not given.
        """
        expect_bool("force", force)
        expect_seconds("wait", wait)
        if wait:
            waiting.until(self, lambda: not (self._state.requests or self._state.transfers), wait)
        self._execute(commands.Clear(force))
        with contextlib.suppress(SharedMemoryFull):  # what stays matches nothing, and goes when its blocks are wanted
            for tier in (Tier.HOST, Tier.DEVICE):
                while self._execute(commands.Evict(tier, self._evict_step)):
                    pass

    def pause(self, timeout: float | None = None) -> None:
        """Hand out nothing more, and wait until no copy is in flight: the device pool is the engine's alone.

        :meth:`match`, :meth:`admit`, :meth:`extend` and :meth:`allocate` raise :class:`Paused` until :meth:`resume`.

        Raises:
            TimeoutError: copies are still in flight (default: after twice the deadline of a transfer); it is paused.
        """
        expect_seconds("timeout", timeout)
        self._expect_owner()
        self._paused = True
        limit = 2 * self.config.transfer_timeout_s if timeout is None else timeout
        if not waiting.until(self, self._at_rest, limit):
            raise TimeoutError(f"transfers {[*self._state.transfers]}, pushes or receives are still in flight")

    def resume(self, *, weights: str | None = None, force: bool = False) -> None:
        """Go on after :meth:`pause`, with a new version of the model's weights if there is one.

        Blocks of one version never match under another. What requests that still run have computed is of both: with
        ``force`` they may go on, and the whole cache is forgotten, so that nothing of theirs can ever match.

        Raises:
            Busy: requests of the old version still run, and ``force`` is not given. It stays paused.
        """
        expect_bool("force", force)
        namespace_key(weights="" if weights is None else weights)  # refuses what is no text
        self._expect_owner()
        if weights is not None and weights != self._weights:
            if self._state.requests:
                if not force:
                    raise Busy(f"{len(self._state.requests)} requests run with the old weights: release them, or force")
                self.clear(force=True)
            self._weights = weights
        self._paused = False

    def make_room(self, blocks: SupportsIndex) -> int:
        """Get so many more device blocks free ahead of need, or as many as can be, as an allocation would.

        Returns how many. Those that are swapped out for it are free once :meth:`poll` has seen the end of the copy.
        """
        given_up = 0
        for event in self._execute(commands.MakeRoom(whole("blocks", blocks))):
            if isinstance(event, BlocksEvicted) and event.tier == Tier.DEVICE:
                given_up += len(event.blocks)
            elif isinstance(event, TransferStarted):
                given_up += len(event.sources)
        return given_up

    def evict(self, tier: Tier, blocks: SupportsIndex) -> int:
        """Drop up to so many unused cached blocks of one tier for good, in eviction order. Returns how many."""
        expect_tier(tier)
        events = self._execute(commands.Evict(tier, whole("blocks", blocks)))
        return sum(len(event.blocks) for event in events if isinstance(event, BlocksEvicted))

    def forget(self, node: SupportsIndex) -> bool:
        """Drop one unused run that nothing continues, and those above it that lead nowhere else then.

        ``node``: its number in the log and in :attr:`state`. Returns whether it was dropped.
        """
        return bool(self._execute(commands.Forget(whole("a run's number", node))))

    def resize(self, tier: Tier, blocks: SupportsIndex) -> None:
        """Change the number of blocks of a tier. Shrinking drops what is cached in the highest ids.

        The pools themselves are not moved: with workers a tier can only shrink below its first size and grow back.

        Raises:
            Busy: somebody uses a block that would go.
            ipc.SharedMemoryFull: in the middle of a long way down; what was dropped stays dropped: call it again.
            InvalidCommand
        """
        expect_tier(tier)
        wanted = whole("blocks", blocks)
        if tier == Tier.HOST and self._state.policy == HostPolicy.OFF:
            raise InvalidCommand("there is no host tier: give a new ledger host_blocks and a host_policy")
        if self.pools:
            most = self.config.device_blocks if tier == Tier.DEVICE else self.config.host_blocks
            if wanted > most:
                raise InvalidCommand(f"the {tier.name} pool has room for {most} blocks, not for {wanted}")
        while not isinstance(self._execute(commands.Resize(tier, wanted, self._evict_step))[-1], PoolResized):
            pass

    def available_blocks(self) -> int:
        """Device blocks that are free or can be evicted."""
        return available_blocks(self._state)

    def can_allocate(self, blocks: SupportsIndex) -> bool:
        """Whether an allocation of so many blocks would succeed now; counts what can be evicted, and evicts nothing."""
        return can_allocate(self._state, whole("blocks", blocks))

    def block_table(self, key: str) -> BlockTable:
        """The device block ids of a request, in token order."""
        return table_of(request_named(self._state, key))

    def stats(self) -> dict[str, int]:
        """Totals since the ledger was created, and present levels (blocks, requests, transfers, the log)."""
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
            **self._retention.stats(),
        }

    def digest(self) -> bytes:
        """Digest of the whole state. Encodes everything: not for the scheduler loop."""
        return state_digest(self._state)

    def take_digest(self) -> bytes:
        """Digest of the whole state, also written into the log: any replay can prove that it agrees."""
        self._execute(commands.TakeDigest(self._writer.next_sequence - 1, True))
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
        return self._writer.next_sequence

    def step(self, number: SupportsIndex) -> None:
        """Number of the scheduler step, written beside every event from now on, in 32 bits (for people)."""
        self._transactions.step = whole("a step", number) & 0xFFFFFFFF

    def adopt_thread(self) -> None:
        """The calling thread owns the manager from now on; the one that owned it must not call any more."""
        self._owner = get_ident()

    def _expect_owner(self) -> None:
        """Refuse calls from other threads, and apply what these have released."""
        if self._transactions.closed:
            raise ManagerClosed(f"ledger {self.name!r}: {self._transactions.closed}")
        if get_ident() != self._owner:
            raise WrongThread(
                f"ledger {self.name!r} belongs to thread {self._owner}, this is {get_ident()}: make all calls from "
                "one thread (release() may come from any), or adopt_thread() in the new owner"
            )
        if self._releases:
            self._apply_releases()

    def close(self, *, keep: bool = False) -> None:
        """Stop the workers and give everything back; with ``keep`` the log and the pools stay for inspection.

        From any thread, while no other is in a call. What fails to close keeps nothing else from it.
        """
        if self._transactions.closed in ("closed", _FORKED):
            return
        self._transactions.closed = "closed"
        forks.forget(self)
        self.pools = []  # their memory goes as soon as nobody else holds them
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._writer.close, unlink=not keep)
            if self._ranks is not None:
                last_first.callback(self._ranks.stop)
            last_first.callback(self._retention.stop)
            for handoff in self._handoffs:
                last_first.callback(handoff.close, keep=keep)

    def disown(self) -> None:
        """This process is a fork of the one that owns the ledger. See :mod:`kvledger.manager.forks`."""
        self._transactions.closed = _FORKED
        for handoff in self._handoffs:
            handoff.disown()
        self._writer.disown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
            self._transactions.commit(events)
            if self._state.transfers:
                self._follow(events)
        return events

    def _execute_for_ranks(self, command: commands.Command) -> list[Event]:
        events = self._execute(command)
        notice(self.name, events)
        return events

    def _follow(self, events: list[Event]) -> None:
        """Transfers that these events started get a deadline; without workers they are done at once."""
        if self._ranks is not None:
            self._ranks.started(self._writer.next_sequence - len(events))
        else:
            self._end_transfers()

    def _end_transfers(self) -> None:
        """Without workers there are no bytes to move: every transfer is done."""
        for id, transfer in list(self._state.transfers.items()):
            done = commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets))
            self._transactions.commit(decide(self._state, commands.EndQuarantine(id) if transfer.quarantined else done))

    def _namespace(self, namespace: bytes) -> bytes:
        """The namespace of a new request, if one may begin."""
        expect_namespace(namespace)
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        return versioned(self._weights, namespace) if self._weights else namespace

    def _prompt(
        self, tokens: Tokens, items: Sequence[Item], max_blocks: SupportsIndex | None
    ) -> tuple[memoryview, int, tuple[tuple[int, int], ...]]:
        """``(words, most blocks to match, ranges that are not to be cut)``."""
        words = words_of(tokens, items=items)
        if max_blocks is None:
            most = max(len(words) // 4 - 1, 0) // self.config.block_size
        else:
            most = whole("max_blocks", max_blocks)
        if not items or self.config.chunked_multimodal:
            return words, most, ()
        return words, most, tuple((item.offset, item.offset + item.length) for item in items)

    def _admission(self, matched: Event, words: memoryview) -> Admission:
        assert isinstance(matched, RequestMatched)
        length = len(words)
        self._tails[matched.key] = words[length - length % self._state.block_bytes :].tobytes()
        if self.config.backup_after > 1:
            self._back_up(matched.key)
        request = self._state.requests[matched.request]
        return Admission(table_of(request), matched.device_blocks, matched.host_blocks, not request.waits)
