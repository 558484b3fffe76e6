"""The block manager an engine imports: the life of a request.

Every call decides, reserves room in the log, applies, and publishes, in that order: nobody can act on something that
is not in the log, and a call that is refused leaves no trace but the record of the refusal.
:mod:`kvledger.manager.execution` says which thread may call what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Self, SupportsIndex

from ipc import LedgerError, LedgerNotFound, LogCorrupt, Overrun
from kvledger.config import CacheConfig, ConfigError
from kvledger.errors import CallTooLarge, CannotContinue, Paused
from kvledger.manager import lifecycle
from kvledger.manager.answers import Admission, Prospect, Started
from kvledger.manager.arguments import (
    expect_bool,
    expect_count,
    expect_group,
    expect_namespace,
    expect_seconds,
    expect_static,
    reason_of,
)
from kvledger.manager.blocks import BlockCalls
from kvledger.manager.prompts import LiveRequest, full_blocks, prompt_of
from kvledger.manager.ranks import Progress, sides_of, table_of
from kvledger.manager.wait import loop, loop_async
from statemachine import commands
from statemachine.content import Item, Tokens, versioned
from statemachine.decide import decide, request_named, victims_for
from statemachine.errors import InvalidCommand, OutOfBlocks, UnknownRequest
from statemachine.events import Event, ReleaseReason, RequestMatched, Tier
from statemachine.state.groups import resumption
from statemachine.state.nodes import Request
from workers.pools.interface import Pools


class CacheManager(BlockCalls):
    """Decides which KV block holds which tokens, on which tier, for which request.

    ::

        with CacheManager.create("demo", CacheConfig(device_blocks=1000)) as manager:
            admission = manager.admit("request-1", prompt_tokens)
            ...  # compute the KV of the tokens from admission.cached_tokens on, in the slots of admission.block_table
            manager.commit({"request-1": len(prompt_tokens)})
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
            config: must agree with the ledger, except for ``segment_bytes``, ``retain_bytes``, ``retain_seconds``, the
                time-outs and ``weights``; default: what the ledger says. ``weights`` are those that the engine has
                loaded now: where they are not the ones in force in the ledger, nothing cached before matches, as after
                :meth:`resume`.
            publish: as for :meth:`create`; called where the device pools did not outlive their process.

        Raises:
            ipc.LedgerNotFound: there is no ledger of that name.
            ipc.WriterAlive: an engine is running on it; the message names its process.
            ipc.LogCorrupt: the log is damaged, with segment and offset. Nothing was changed.
            ipc.Overrun: the log does not reach back to its beginning, and there is no snapshot to start from.
            ConfigError: ``config`` does not agree with the ledger, in the setting that is named.
            ipc.SharedMemoryFull: there is no room for a new segment. Nothing was changed.
            HandoffError: a prefill instance hangs while it writes into the device pool, or a process that pushed for
                the dead engine cannot be ended. Nothing was changed.
            workers.WorkerFailed: a worker of the dead engine cannot be ended, or a new one cannot be started.
        """
        return cls._from(name, lifecycle.reopened(name, config), publish)

    @classmethod
    def open_or_create(
        cls,
        name: str,
        config: CacheConfig,
        *,
        replace_dead: bool = False,
        publish: Callable[[Sequence[Pools]], None] | None = None,
    ) -> Started[Self]:
        """Make the one call that an engine makes when it starts: warm where it can be, anew where it must be.

        A dead engine's ledger of that name is taken over (:meth:`open`). Without pools it may have other sizes: it is
        resized, and what does not fit is dropped. Where there is none, it is created.

        Args:
            replace_dead: a dead engine's ledger that cannot be taken over with this configuration (another block size,
                pools of another size, damage, another version of kvledger) is removed, and a new one created;
                otherwise what is wrong is raised and everything stays. A ledger whose engine lives is never replaced.

        Raises:
            ipc.WriterAlive: an engine is running on it.
            ConfigError, ipc.LogCorrupt, ipc.Overrun, CannotContinue: without ``replace_dead``, see :meth:`open`.
            Others as for :meth:`open` and :meth:`create`.
        """
        expect_bool("replace_dead", replace_dead)
        try:
            beginning = lifecycle.reopened(name, config, resizable=True)
        except LedgerNotFound:
            reason = "there was none"
        except (ConfigError, LogCorrupt, Overrun, CannotContinue) as error:
            if not replace_dead or not isinstance(config, CacheConfig):
                raise
            reason = str(error)
            lifecycle.remove(name)
        else:
            manager = cls._from(name, beginning, publish)
            dropped = manager._resize_to(config) if beginning.differs else 0
            return Started(manager, True, beginning.differs, dropped)
        return Started(cls.create(name, config, publish=publish), False, reason, 0)

    def _resize_to(self, config: CacheConfig) -> int:
        """Give both tiers the sizes of a configuration. Returns how many cached blocks were dropped for it."""
        counters = self._state.counters
        before = counters.device_evicted_blocks + counters.host_evicted_blocks
        self.resize(Tier.DEVICE, config.device_blocks)
        if config.host_blocks:
            self.resize(Tier.HOST, config.host_blocks)
        return counters.device_evicted_blocks + counters.host_evicted_blocks - before

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
        request_id: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
    ) -> Admission:
        """Begin a request: find, pin and if need be swap in the cached prefix of its prompt.

        Args:
            request_id: the engine's own name of the request.
            tokens: the whole prompt; an int32 array or buffer is used without copying, a list costs 6 ns per
                token.
            items: multimodal items in the prompt.
            namespace: see :func:`statemachine.content.namespace_key`.
            max_blocks: match at most so many blocks; default ``(tokens - 1) // block_size``, so that at least one
                token is left to compute.

        Raises:
            statemachine.content.InvalidTokens, DuplicateRequest, Paused
        """
        words, limit, records = prompt_of(self.config, tokens, items, max_blocks)
        events = self._execute(commands.Match(request_id, words, self._namespace(namespace), limit, records))
        return self._admission(events[0], words)

    def admit(
        self,
        request_id: str,
        tokens: Tokens | Prospect,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
        blocks: SupportsIndex | None = None,
        new_tokens: SupportsIndex | None = None,
        must_fit: bool = False,
        reserve: SupportsIndex | None = None,
        static_tokens: SupportsIndex = 0,
    ) -> Admission:
        """Begin a request: find, pin and if need be swap in the cached prefix of its prompt, and give it room.

        In one transaction, or not at all.

        Args:
            request_id: the engine's own name of the request.
            tokens: the whole prompt; an int32 array or buffer is used without copying, a list costs 6 ns per
                token. Or the answer of :meth:`can_admit`, which has all of this: then nothing is converted again, nor
                looked up again if nothing has happened since.
            items: multimodal items in the prompt.
            namespace: see :func:`statemachine.content.namespace_key`.
            max_blocks: match at most so many blocks; default ``(tokens - 1) // block_size``, so that at least one
                token is left to compute.
            blocks: length of the block table (it is never shorter than what matches), for engines that count blocks.
            new_tokens: room for so many tokens behind what matches, a first chunk; default: for the whole prompt.
            must_fit: refuse unless the whole prompt would fit, though only the first chunk gets room.
            reserve: so many tokens of room have to stay for requests that run; default:
                :attr:`CacheConfig.watermark_blocks`. Where nobody runs, it may take all.
            static_tokens: room for so many tokens in each :func:`kvledger.groups.static` group; there has to be one.

        Raises:
            OutOfBlocks: there is no room; nothing is pinned. Ask :meth:`can_admit` first to have it as an answer.
            statemachine.content.InvalidTokens, DuplicateRequest, Paused
        """
        if isinstance(tokens, Prospect):
            return self._admit_prospect(request_id, tokens)
        command = self._admit_command(
            request_id, tokens, items, namespace, max_blocks, blocks, new_tokens, must_fit, reserve, static_tokens
        )
        return self._admission(self._execute(command)[0], command.words)

    def can_admit(
        self,
        request_id: str,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
        blocks: SupportsIndex | None = None,
        new_tokens: SupportsIndex | None = None,
        must_fit: bool = False,
        reserve: SupportsIndex | None = None,
        static_tokens: SupportsIndex = 0,
    ) -> Prospect:
        """What :meth:`admit` with these arguments would come to now. Changes nothing.

        The answer is true where it fits. Give it to :meth:`admit` in place of the tokens, and do not change an int32
        array that was passed here before that.

        Raises:
            statemachine.content.InvalidTokens, DuplicateRequest, Paused
        """
        self._expect_owner()
        command = self._admit_command(
            request_id, tokens, items, namespace, max_blocks, blocks, new_tokens, must_fit, reserve, static_tokens
        )
        sequence, state = self._transactions.next_sequence, self._state
        try:
            events = decide(state, command)
        except OutOfBlocks as refusal:
            leaf = state.nodes.get(refusal.event.leaf)
            found = 0
            if leaf is not None:
                found = leaf.start + refusal.event.cut if refusal.event.cut else leaf.end
            return Prospect(False, found * self.config.block_size, refusal, command, namespace, [], b"", sequence)
        matched = events[0]
        assert isinstance(matched, RequestMatched)
        cached = (matched.device_blocks + matched.host_blocks) * self.config.block_size
        return Prospect(True, cached, None, command, namespace, events, self._rest(command.words), sequence)

    def _admit_command(
        self,
        request_id: str,
        tokens: Tokens,
        items: Sequence[Item],
        namespace: bytes,
        max_blocks: SupportsIndex | None,
        blocks: SupportsIndex | None,
        new_tokens: SupportsIndex | None,
        must_fit: bool,
        reserve: SupportsIndex | None,
        static_tokens: SupportsIndex,
    ) -> commands.Admit:
        if must_fit is not False:
            expect_bool("must_fit", must_fit)
        words, limit, records = prompt_of(self.config, tokens, items, max_blocks)
        all_blocks = -(-len(words) // self._state.block_bytes)
        count = all_blocks if blocks is None else expect_count("blocks", blocks)
        if new_tokens is not None and blocks is not None:
            raise InvalidCommand("give blocks or new_tokens: both say how much room there has to be")
        chunk = -1 if new_tokens is None else expect_count("new_tokens", new_tokens)
        size, watermark = self.config.block_size, int(self.config.watermark_blocks)  # a share has become a number
        kept = watermark if reserve is None else -(-expect_count("reserve", reserve) // size)
        fit = all_blocks if must_fit else 0
        namespace = self._namespace(namespace)
        static = expect_static(self._state, static_tokens)
        return commands.Admit(request_id, words, namespace, limit, count, records, kept, chunk, fit, static)

    def _admit_prospect(self, request_id: str, prospect: Prospect) -> Admission:
        self._expect_owner()
        command, events = prospect.command, prospect.events
        if events and request_id == command.request_id and prospect.sequence == self._transactions.next_sequence:
            self._namespace(prospect.namespace)  # it may have been paused since
            self._commit(events)
            return self._admission(events[0], None, prospect.rest)
        command = command._replace(request_id=request_id, namespace=self._namespace(prospect.namespace))
        return self._admission(self._execute(command)[0], command.words)

    def preempt(self, blocks: SupportsIndex, candidates: Sequence[str], *, group: SupportsIndex = 0) -> list[str]:
        """Preempt requests, in the order given (lowest priority first), until ``blocks`` of a group can be allocated.

        Only as many as are needed are released; their names are returned. What they cached stays: a preempted request
        that is admitted again later finds it on the device, or on the host where there is one (preemption by swap), and
        computes the rest (by recomputation). Call :meth:`cache` before, to keep what is computed.

        Raises:
            OutOfBlocks: all candidates together would not be enough; nobody was preempted.
            UnknownRequest
        """
        self._expect_owner()
        wanted = expect_count("blocks", blocks)
        if isinstance(candidates, str | bytes) or not isinstance(candidates, Sequence):
            raise InvalidCommand(f"candidates are a sequence of requests, not {type(candidates).__name__}")
        if self._gone:
            candidates = [request_id for request_id in candidates if not self._is_gone(request_id)]
        for request_id in candidates:
            request_named(self._state, request_id)
        chosen = victims_for(self._state, wanted, candidates, expect_group(self._state, group))
        for request_id in chosen:
            self.release(request_id, ReleaseReason.PREEMPTED)
        return chosen

    def release(
        self,
        request_id: str,
        reason: ReleaseReason | str = ReleaseReason.FINISHED,
        *,
        final: bool = False,
        hold: bool = False,
    ) -> str:
        """End a request. What it cached stays until it is evicted.

        From a thread that does not own the manager the release is queued and applied at the owner's next call.

        Args:
            reason: or its name, ``"aborted"``.
            final: nobody is expected to continue it: what only it used is evicted first.
            hold: a step that is still running may write its blocks. The request ends and its name is free, but what is
                not cached is nobody else's before the name that this call returns is released, too.

        Returns:
            With ``hold``, the name to release when the step has ended; otherwise an empty text.

        Raises:
            InvalidCommand: ``hold`` from another thread, or for a request that was cached ahead of its step.
            UnknownRequest
        """
        if type(reason) is not ReleaseReason:
            reason = reason_of(reason)
        if type(final) is not bool or type(hold) is not bool:
            raise InvalidCommand(f"final and hold are bools, not {final!r:.80}, {hold!r:.80}")
        command = commands.Release(request_id, reason, final)
        if get_ident() != self._owner:
            request_named(self._state, request_id)
            if hold:
                raise InvalidCommand("a release with hold answers, so it has to come from the owner of the manager")
            self._releases.append(command)
            return ""
        if self._releases or self._transactions.closed:
            self._expect_owner()
        if self._gone and self._is_gone(request_id):
            return ""  # it was released from another thread before its owner knew
        if hold:
            return self._release_in_two_steps(command)
        self._end(command)
        return ""

    def _release_in_two_steps(self, command: commands.Release) -> str:
        """Move what may still be written to a request of its own, and end the one that had it."""
        request_id = command.request_id
        request = request_named(self._state, request_id)
        if request.computed < request.leaf.end:
            raise InvalidCommand(
                f"request {request_id!r} was cached ahead of its step: release it when the step has ended"
            )
        for handoff in self._handoffs:
            handoff.released(request_id)
        if request.sides:
            raise InvalidCommand(
                f"request {request_id!r} has blocks of layer groups: release it when the step has ended"
            )
        holder = f"(held {request.number})"
        with self._together():
            first = min(request.waits_for.values(), default=len(request.table))
            if request.leaf.end <= first < len(request.table):
                self._execute(commands.Trim(request_id, first))  # nobody could write these yet
            self._execute(commands.Match(holder, memoryview(b""), b"", 0))
            try:
                if not request.waits_for:
                    self._execute(commands.Reassign(request_id, holder, request.table[request.leaf.end :]))
                self._end(command)
            except (LedgerError, CallTooLarge):
                self._end(commands.Release(holder, ReleaseReason.FAILED, False))
                raise
        return holder

    def ready(self, request_id: str) -> bool:
        """Whether every block of a request may be used."""
        return not request_named(self._state, request_id).waits_for

    def wait(self, request_id: str, timeout: float | None = None) -> Progress:
        """Fold answers in until a request is ready; what happened to others stays for :meth:`poll`.

        For tests and simple programs: a scheduler polls once per step.

        Raises:
            TimeoutError: it was not ready in time (default: twice the deadline of a transfer).
            UnknownRequest: it was released meanwhile.
        """
        request, promised = self._awaited(request_id, timeout)
        if not loop(lambda: self._settled(request), self._limit(timeout)):
            raise self._late(request)
        return self._outcome(request, promised)

    async def wait_async(self, request_id: str, timeout: float | None = None) -> Progress:
        """Wait until a request is ready without blocking the event loop, whose thread must own the manager.

        Any number of tasks may wait at once; each is told about its own request.

        Raises:
            TimeoutError: it was not ready in time.
            UnknownRequest: somebody released it.
        """
        request, promised = self._awaited(request_id, timeout)
        if not await loop_async(lambda: self._settled(request), self._limit(timeout)):
            raise self._late(request)
        return self._outcome(request, promised)

    def _awaited(self, request_id: str, timeout: float | None) -> tuple[Request, int]:
        """The request that is waited for, and how many blocks of it are said to be cached."""
        expect_seconds("timeout", timeout)
        self.expect_published("waiting")
        request = request_named(self._state, request_id)
        return request, request.leaf.end

    def _settled(self, request: Request) -> bool:
        """Whether a request is ready, after what the workers have answered."""
        if request.waits_for:
            self.fold()
        if self._state.requests.get(request.number) is not request:
            raise UnknownRequest(f"request {request.request_id!r} was released while somebody waited for it")
        return not request.waits_for

    def _outcome(self, request: Request, promised: int) -> Progress:
        """What a request has got, now that it is ready; :meth:`poll` need not report it any more."""
        shortened = self._ranks is not None and self._ranks.take_news(request)
        return Progress(
            request.request_id, table_of(request), request.leaf.end, shortened or request.leaf.end < promised
        )

    def _limit(self, timeout: float | None) -> float:
        return 2 * self.config.transfer_timeout_s if timeout is None else timeout

    def _late(self, request: Request) -> TimeoutError:
        return TimeoutError(f"request {request.request_id!r} still waits for {[*request.waits_for]}")

    # From arguments to commands

    def _namespace(self, namespace: bytes) -> bytes:
        """The namespace of a new request, if one may begin."""
        expect_namespace(namespace)
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        return versioned(self._state.weights, namespace)

    def _rest(self, words: memoryview) -> bytes:
        """What stands behind the last full block of a prompt."""
        return words[full_blocks(words, self._state.block_bytes) :].tobytes()

    def _admission(self, matched: Event, words: memoryview | None, rest: bytes = b"") -> Admission:
        assert isinstance(matched, RequestMatched)
        request = self._state.requests[matched.request]
        cached = (matched.device_blocks + matched.host_blocks) * self.config.block_size
        self._live[matched.key] = LiveRequest(request, rest if words is None else self._rest(words), cached)
        if self.config.backup_after > 1:
            self._back_up(matched.key)
        if request.sides:
            replay = cached - resumption(self._state.groups, cached)
            return Admission(table_of(request), matched.device_blocks, 0, True, cached, sides_of(request), replay)
        return Admission(table_of(request), matched.device_blocks, matched.host_blocks, not request.waits_for, cached)
