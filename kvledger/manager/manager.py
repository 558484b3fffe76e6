"""The block manager an engine imports: the life of a request.

Every call decides, reserves room in the log, applies, and publishes, in that order: nobody can act on something that
is not in the log, and a call that is refused leaves no trace but the record of the refusal.
:mod:`kvledger.manager.execution` says which thread may call what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import NamedTuple, Self, SupportsIndex

import numpy as np

from ipc import LedgerError
from kvledger.config import CacheConfig
from kvledger.errors import Paused
from kvledger.manager import lifecycle
from kvledger.manager.arguments import block_ids, expect_namespace, expect_seconds, whole
from kvledger.manager.prompts import Told, full_blocks, prompt_of
from kvledger.manager.ranks import BlockTable, Progress, table_of
from kvledger.manager.tokens import TokenCalls
from kvledger.manager.wait import loop, loop_async
from statemachine import commands
from statemachine.content import Item, Tokens, versioned, words_of
from statemachine.decide import peek, request_named, victims_for
from statemachine.errors import CommandRejected, InvalidCommand, UnknownRequest
from statemachine.events import BlocksAllocated, Event, HostPolicy, ReleaseReason, RequestMatched
from statemachine.state.nodes import Request
from workers.pools.interface import Pools


class Admission(NamedTuple):
    """What a request got."""

    block_table: BlockTable
    device_blocks: int
    """Leading blocks that were on the device, or on their way there."""
    host_blocks: int
    """Blocks after those that are being swapped in."""
    ready: bool
    """False: nothing may be written or attended before :meth:`CacheManager.poll` reports the request."""
    cached_tokens: int
    """Leading tokens that need not be computed."""

    @property
    def cached_blocks(self) -> int:
        """Leading blocks that need not be computed."""
        return self.device_blocks + self.host_blocks


class CacheManager(TokenCalls):
    """Decides which KV block holds which tokens, on which tier, for which request.

    ::

        with CacheManager.create("demo", CacheConfig(device_blocks=1000)) as manager:
            admission = manager.admit("request-1", prompt_tokens)
            ...  # compute the KV of admission.block_table[admission.cached_blocks:]
            manager.cache("request-1")
            manager.release("request-1")
    """

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
        return cls._from(name, lifecycle.created(name, config), publish)

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
        return cls._from(name, lifecycle.reopened(name, config), publish)

    @classmethod
    def _from(
        cls, name: str, beginning: lifecycle.Beginning, publish: Callable[[Sequence[Pools]], None] | None
    ) -> Self:
        manager = cls(name, beginning)
        try:
            manager._begin(beginning, publish)
        except BaseException:
            manager.close(keep=beginning.rebuilt is not None)
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
        words, limit, uncut = prompt_of(self.config, tokens, items, max_blocks)
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
        words, limit, uncut = prompt_of(self.config, tokens, items, max_blocks)
        count = -(-len(words) // self._state.block_bytes) if blocks is None else whole("blocks", blocks)
        watermark = self.config.watermark_blocks
        namespace = self._namespace(namespace)
        events = self._execute(commands.Admit(key, words, namespace, limit, count, uncut, watermark))
        return self._admission(events[0], words)

    def peek(self, tokens: Tokens, *, items: Sequence[Item] = (), namespace: bytes = b"") -> tuple[int, int]:
        """How many leading blocks would match now, on the device and after those on the host. Changes nothing."""
        expect_namespace(namespace)
        words, _, uncut = prompt_of(self.config, tokens, items, 0)
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
        told = self._told_of(key)
        request = told.request
        self._expect_still(key)
        known = len(request.words) + len(self._tail(told))
        limit = request.leaf.end + max(known // 4 - 1, 0) // self.config.block_size
        if self._execute(commands.Extend(key, limit)) and self.config.backup_after > 1:
            self._back_up(key)
        return Progress(key, table_of(request), request.leaf.end, False)

    def allocate(self, counts: Mapping[str, SupportsIndex]) -> dict[str, BlockTable]:
        """Give each named request so many more blocks: one call per scheduler step, all or nothing.

        Returns the new ids per request. A request whose new blocks are still being copied out is not
        :meth:`ready` until :meth:`poll` says so. One that another thread has released meanwhile gets nothing and is
        not in the answer; it fails nobody else.

        Raises:
            OutOfBlocks: with how many of the requests, in order, would fit, and which one does not.
            UnknownRequest, InvalidCommand
        """
        if type(counts) is not dict and not isinstance(counts, Mapping):
            raise InvalidCommand(f"counts are a mapping from request to blocks, not {type(counts).__name__}")
        if self._releases:
            self._expect_owner()
        if self._gone:
            counts = {key: count for key, count in counts.items() if not self._is_gone(key)}
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

    def _is_gone(self, key: str) -> bool:
        """Whether another thread has released a request that a batch still names: told once, and never to others."""
        if type(key) is not str or key not in self._gone:
            return False
        del self._gone[key]
        return key not in self._state.keys

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
        if self._gone:
            candidates = [key for key in candidates if not self._is_gone(key)]
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
        told = self._told_of(key)
        request = told.request
        size = self._state.block_bytes
        words, tail = b"", self._tail(told)
        known = tail
        if generated is not None:
            words = tail + words_of(generated)
            full = full_blocks(words, size)
            words, tail = words[:full], words[full:]
        if blocks is None:
            count = request.leaf.end + (len(request.words) + len(words)) // size
        else:
            count = whole("blocks", blocks)
        ready = None if computed is None else whole("computed", computed)
        told.tail = None  # not known while it is not certain: what interrupts this call must not garble the next
        try:
            self._execute(commands.Cache(key, count, words, ready))
        except (CommandRejected, LedgerError):  # nothing has changed
            told.tail = known
            raise
        told.tail = tail
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._back_up(key)

    def trim(self, key: str, blocks: SupportsIndex) -> None:
        """Give back all but the first ``blocks`` blocks of a request (a rejected speculation, an undone chunk)."""
        kept = whole("blocks", blocks)
        self._expect_still(key)
        self._execute(commands.Trim(key, kept))
        self._lost(key, kept)

    def reassign(self, key: str, target: str, blocks: Sequence[int]) -> None:
        """Move private blocks of one request to the end of another's block table."""
        self._expect_still(key)
        self._execute(commands.Reassign(key, target, block_ids(blocks)))
        self._lost(key, 0)

    def give_back(self, key: str, blocks: Sequence[int]) -> None:
        """Free private blocks of a request, wherever they stand behind its cached blocks."""
        request_named(self._state, key)
        self._expect_still(key)
        self._execute(commands.GiveBack(key, block_ids(blocks)))
        self._lost(key, 0)

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
        self._expect_owner()
        if self._gone and self._is_gone(key):
            return  # it was released from another thread before its owner knew
        self._end(command)

    def cached_blocks(self, key: str) -> int:
        """Leading blocks of a request's block table that are cached: their KV is valid once it is ready."""
        return request_named(self._state, key).leaf.end

    def ready(self, key: str) -> bool:
        """Whether every block of a request may be used."""
        return not request_named(self._state, key).waits

    def wait(self, key: str, timeout: float | None = None) -> Progress:
        """Fold answers in until a request is ready; what happened to others stays for :meth:`poll`.

        For tests and simple programs: a scheduler polls once per step.

        Raises:
            TimeoutError: it was not ready in time (default: twice the deadline of a transfer).
            UnknownRequest: it was released meanwhile.
        """
        request, promised = self._awaited(key, timeout)
        if not loop(lambda: self._settled(request), self._limit(timeout)):
            raise self._late(request)
        return self._outcome(request, promised)

    async def wait_async(self, key: str, timeout: float | None = None) -> Progress:
        """Wait until a request is ready without blocking the event loop, whose thread must own the manager.

        Any number of tasks may wait at once; each is told about its own request.

        Raises:
            TimeoutError: it was not ready in time.
            UnknownRequest: somebody released it.
        """
        request, promised = self._awaited(key, timeout)
        if not await loop_async(lambda: self._settled(request), self._limit(timeout)):
            raise self._late(request)
        return self._outcome(request, promised)

    def _awaited(self, key: str, timeout: float | None) -> tuple[Request, int]:
        """The request that is waited for, and how many blocks of it are said to be cached."""
        expect_seconds("timeout", timeout)
        self.expect_published("waiting")
        request = request_named(self._state, key)
        return request, request.leaf.end

    def _settled(self, request: Request) -> bool:
        """Whether a request is ready, after what the workers have answered."""
        if request.waits:
            self.fold()
        if self._state.requests.get(request.id) is not request:
            raise UnknownRequest(f"request {request.key!r} was released while somebody waited for it")
        return not request.waits

    def _outcome(self, request: Request, promised: int) -> Progress:
        """What a request has got, now that it is ready; :meth:`poll` need not report it any more."""
        shortened = self._ranks is not None and self._ranks.told(request)
        return Progress(request.key, table_of(request), request.leaf.end, shortened or request.leaf.end < promised)

    def _limit(self, timeout: float | None) -> float:
        return 2 * self.config.transfer_timeout_s if timeout is None else timeout

    def _late(self, request: Request) -> TimeoutError:
        return TimeoutError(f"request {request.key!r} still waits for {[*request.waits]}")

    # From arguments to commands

    def _namespace(self, namespace: bytes) -> bytes:
        """The namespace of a new request, if one may begin."""
        expect_namespace(namespace)
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        return versioned(self._weights, namespace) if self._weights else namespace

    def _admission(self, matched: Event, words: memoryview) -> Admission:
        assert isinstance(matched, RequestMatched)
        request = self._state.requests[matched.request]
        cached = (matched.device_blocks + matched.host_blocks) * self.config.block_size
        self._told[matched.key] = Told(request, words[full_blocks(words, self._state.block_bytes) :].tobytes(), cached)
        if self.config.backup_after > 1:
            self._back_up(matched.key)
        return Admission(table_of(request), matched.device_blocks, matched.host_blocks, not request.waits, cached)
