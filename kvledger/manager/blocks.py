"""The calls of engines and adapters that count blocks: allocate, cache, trim, reassign, extend.

An engine that counts tokens needs none of them: see :mod:`kvledger.manager.tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsIndex

import numpy as np

from ipc import LedgerError
from kvledger.errors import Paused
from kvledger.manager.arguments import block_ids, expect_count, expect_namespace
from kvledger.manager.prompts import full_blocks, prompt_of
from kvledger.manager.ranks import BlockTable, Progress, table_of
from kvledger.manager.tokens import TokenCalls
from statemachine import commands
from statemachine.content import Item, Tokens, versioned, words_of
from statemachine.decide import peek, request_named
from statemachine.errors import CommandRejected, InvalidCommand
from statemachine.events import BlocksAllocated, HostPolicy


class BlockCalls(TokenCalls):
    """What changes a request block by block."""

    def peek(
        self,
        tokens: Tokens,
        *,
        items: Sequence[Item] = (),
        namespace: bytes = b"",
        max_blocks: SupportsIndex | None = None,
    ) -> tuple[int, int]:
        """Count the leading blocks that an admission of this prompt would hit: on the device, after those on the host.

        Changes nothing. Those on the host need as much room on the device as those that do not match.

        Args:
            tokens: the whole prompt, as for :meth:`admit`.
            items: multimodal items in the prompt.
            namespace: see :func:`statemachine.content.namespace_key`.
            max_blocks: count at most so many blocks; default as for :meth:`admit`, ``(tokens - 1) // block_size``. The
                number of full blocks (or more) counts all that is cached, also the block that is computed once more.

        Raises:
            statemachine.content.InvalidTokens, InvalidCommand
        """
        expect_namespace(namespace)
        words, limit, records = prompt_of(self.config, tokens, items, max_blocks)
        return peek(self._state, words, versioned(self._state.weights, namespace), limit, records)

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
            counts = {request_id: count for request_id, count in counts.items() if not self._is_gone(request_id)}
        numbers = [
            count if type(count) is int and count >= 0 else expect_count(f"blocks for request {request_id!r}", count)
            for request_id, count in counts.items()
        ]
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        events = self._execute(commands.Allocate(list(counts), numbers))
        granted = np.empty(0, np.int32)
        if events:
            allocated = next(event for event in reversed(events) if isinstance(event, BlocksAllocated))
            granted = np.array(allocated.blocks, np.int32)
        new = {}
        start = 0
        for request_id, count in zip(counts, numbers):
            new[request_id] = granted[start : start + count]
            start += count
        return new

    def adopt_blocks(self, request_id: str, blocks: Sequence[int]) -> None:
        """Append exactly these device blocks to a block table: what an engine did whose own manager is recorded.

        They have to be free, or cached and used by nobody; what is cached in them, and below, is evicted.

        Raises:
            InvalidCommand: somebody uses one of them, or there is a host tier.
            UnknownRequest
        """
        self._execute(commands.Adopt(request_id, block_ids(blocks)))

    def note_departure(self, request_id: str, what: str) -> None:
        """Write down that an engine whose own manager is recorded did what this ledger would not have done.

        Args:
            request_id: for whom; "" for nobody.
            what: the difference, in numbers: it is no user's content.
        """
        self._execute(commands.Depart(request_id, what))

    def cache(
        self,
        request_id: str,
        blocks: SupportsIndex | None = None,
        *,
        generated: Tokens | None = None,
        computed: SupportsIndex | None = None,
    ) -> None:
        """Publish blocks: from now on other requests can match them.

        Args:
            blocks: the first so many blocks of the request are computed; default: all full blocks of known content, but
                not the last of the tokens that were told as ``generated``, which was sampled and is not computed yet.
            generated: the tokens that follow those known so far. What does not fill a block is remembered.
            computed: only so many leading blocks of the request are computed, the others will be by the step that is
                being scheduled. They can be matched, but they are not copied out until a later call, or the release,
                covers them (so do not cache ahead for a step that may be called off). Default: all are.

        Raises:
            RequestNotReady: some of the blocks are still being copied.
            InvalidCommand, UnknownRequest
        """
        self._expect_owner()
        live = self._live_request(request_id)
        request = live.request
        size = self._state.block_bytes
        words, tail = b"", self._tail(live)
        known = tail
        if generated is not None:
            words = tail + words_of(generated)
            end = full_blocks(words, size)
            words, tail = words[:end], words[end:]
        sampled = live.sampled or (generated is not None and len(words) + len(tail) > len(known))
        if blocks is None:
            full = len(request.words) + len(words)
            count = request.leaf.end + min(max(full + len(tail) - 4 * sampled, 0), full) // size
        else:
            count = expect_count("blocks", blocks)
        ready = None if computed is None else expect_count("computed", computed)
        items, later = self._items_before(live, len(words))
        live.tail = None  # not known while it is not certain: what interrupts this call must not garble the next
        try:
            self._execute(commands.Cache(request_id, count, words, ready, items))
        except (CommandRejected, LedgerError):  # nothing has changed
            live.tail = known
            raise
        live.tail, live.items, live.sampled = tail, later, sampled
        if request.sides:
            settled = min(request.leaf.end, request.computed) * self.config.block_size
            self._execute(commands.Settle([request_id], [settled]))
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._back_up(request_id)

    def extend(self, request_id: str) -> Progress:
        """Between two chunks of a prefill: match again behind what the request has cached.

        What others cached meanwhile is pinned and need not be computed; the request's own copies of it, and the
        duplicates that :meth:`cache` left, are given back, so *the block table changes*: go on with the one returned,
        from ``cached_blocks`` on. At least one token is left to compute.

        Raises:
            RequestNotReady, UnknownRequest, Paused
        """
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        live = self._live_request(request_id)
        request = live.request
        self._expect_still(request_id)
        known = len(request.words) + len(self._tail(live))
        limit = request.leaf.end + max(known // 4 - 1, 0) // self.config.block_size
        if self._execute(commands.Extend(request_id, limit)) and self.config.backup_after > 1:
            self._back_up(request_id)
        return Progress(request_id, table_of(request), request.leaf.end, False)

    def trim(self, request_id: str, blocks: SupportsIndex) -> None:
        """Give back all but the first ``blocks`` blocks of a request (a rejected speculation, an undone chunk)."""
        kept = expect_count("blocks", blocks)
        self._expect_still(request_id)
        self._execute(commands.Trim(request_id, kept))
        self._lost(request_id, kept)

    def reassign(self, request_id: str, target: str, blocks: Sequence[int]) -> None:
        """Move private blocks of one request to the end of another's block table."""
        self._expect_still(request_id)
        self._execute(commands.Reassign(request_id, target, block_ids(blocks)))
        self._lost(request_id, 0)

    def give_back(self, request_id: str, blocks: Sequence[int]) -> None:
        """Free private blocks of a request, wherever they stand behind its cached blocks."""
        request_named(self._state, request_id)
        self._expect_still(request_id)
        self._execute(commands.GiveBack(request_id, block_ids(blocks)))
        self._lost(request_id, 0)

    def cached_blocks(self, request_id: str) -> int:
        """Leading blocks of a request's block table that are cached: their KV is valid once it is ready."""
        return request_named(self._state, request_id).leaf.end
