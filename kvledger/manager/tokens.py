"""The calls of an engine that counts tokens: tell content, get room, say what is computed.

Three numbers of each request are the manager's own. *Known*: its content, as told by ``admit`` and ``append``.
*Computed*: its leading tokens whose KV is written, as told by ``commit``; only their full blocks are published, and
nothing else can ever match. *Room*: the slots of its block table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from ipc import LedgerError
from kvledger.errors import Paused
from kvledger.manager.arguments import expect_count
from kvledger.manager.prompts import LiveRequest
from kvledger.manager.ranks import BlockTable, table_text
from kvledger.manager.upkeep import WholeCache
from statemachine import commands
from statemachine.content import InvalidTokens, Item, Tokens, words_of
from statemachine.decide import request_named
from statemachine.errors import CommandRejected, InvalidCommand, OutOfBlocks, RequestNotReady
from statemachine.events import BlocksAllocated, HostPolicy
from statemachine.items import divided, each, item_records
from statemachine.state.nodes import Request


class Growth(NamedTuple):
    """What a batch of requests got. A request that is nowhere in it has room, and can be computed."""

    new_blocks: dict[str, BlockTable]
    """For the requests that got blocks: the ids to append to their block tables."""
    not_ready: list[str]
    """They have room, but some of it is still being copied: leave them out until ``poll`` reports them."""
    refused: list[str]
    """They got nothing, from the first that did not fit on: preempt others, or leave them out of this step."""
    refusal: OutOfBlocks | None
    """Why the first of them did not fit: whether waiting helps (``in_transfer``), or nothing ever will."""
    gone: list[str]
    """They were released, for example by another thread."""
    new_side_blocks: dict[str, tuple[BlockTable, ...]]
    """For the requests that got blocks: the ids to append to their tables of the layer groups beside group 0; without
    such groups it is empty."""

    def __repr__(self) -> str:
        told = [f"{request_id!r} gets {table_text(table)}" for request_id, table in self.new_blocks.items()]
        for what, names in (("not ready", self.not_ready), ("refused", self.refused), ("gone", self.gone)):
            if names:
                told.append(f"{what}: {', '.join(repr(name) for name in names)}")
        return f"<{'; '.join(told) or 'all have room'}>"


class TokenCalls(WholeCache):
    """Growing requests by tokens. The requests themselves begin and end in :class:`CacheManager`."""

    def known(self, request_id: str) -> int:
        """How many tokens of a request were told."""
        live = self._live_request(request_id)
        return self._known(live, self._tail(live))

    def computed(self, request_id: str) -> int:
        """How many leading tokens of a request have their KV, by being cached or committed.

        Fewer than before where a swap-in has failed.
        """
        return self._computed(self._live_request(request_id))

    def room(self, request_id: str) -> int:
        """How many tokens the block table of a request has slots for."""
        return len(request_named(self._state, request_id).table) * self.config.block_size

    def append(self, request_id: str, tokens: Tokens, *, items: Sequence[Item] = ()) -> None:
        """Tell what follows the content known so far: sampled tokens, drafts, or a user's next turn.

        Costs no event: what is not computed is nobody else's business.

        Args:
            tokens: one token, or several as in ``admit``.
            items: multimodal items in them; their offsets count from the first of these tokens.

        Raises:
            statemachine.content.InvalidTokens, UnknownRequest
        """
        self._expect_thread()
        live = self._live_request(request_id)
        tail = self._tail(live)
        if type(tokens) is int:
            if not 0 <= tokens < 1 << 31:
                raise InvalidTokens(f"token {tokens} is not from 0 to 2^31 - 1")
            live.tail = tail + tokens.to_bytes(4, "little")
        else:
            words = words_of(tokens, items=items)
            if items:
                live.items += item_records(items, self._known(live, tail))
            live.tail = tail + words

    def retract(self, request_id: str, tokens: SupportsIndex) -> None:
        """Take back the last so many known tokens, which are not computed: rejected drafts, a session's last token.

        The room stays.

        Raises:
            InvalidCommand: some of them are computed, or came with the admission, or an item would be cut.
            UnknownRequest
        """
        count = expect_count("tokens", tokens)
        self._expect_thread()
        live = self._live_request(request_id)
        tail = self._tail(live)
        free = self._known(live, tail) - self._computed(live)
        if count > free:
            raise InvalidCommand(f"only the last {free} tokens of request {request_id!r} are not computed, not {count}")
        if 4 * count > len(tail):
            raise InvalidCommand(
                f"only the last {len(tail) // 4} tokens of request {request_id!r} were appended: to take back what it "
                "was admitted with, release it and admit it again"
            )
        left = self._known(live, tail) - count
        kept, _ = divided(live.items, left)
        if any(offset + length > left for offset, length, _ in each(kept)):
            raise InvalidCommand(f"an image or sound of request {request_id!r} would be cut: take all of it back")
        live.tail, live.items = tail[: len(tail) - 4 * count], kept

    def distrust(self, request_id: str, from_token: SupportsIndex) -> None:
        """Say that the KV of a request turned out bad from a token on: nobody ever matches it again, nor what is below.

        Its block goes as a whole, and all blocks behind it that were computed from it, whoever cached them. Requests
        that hold some of these go on reading them, this one as well: preempt or end them as you see fit. Admitted
        again, they match what is before that token, and compute the rest anew. What nobody holds is dropped at once.
        What of this request is not published yet counts as not computed any more: compute and commit it again. With
        layer groups it cannot be: what their windows have left is gone. Release the request then, and admit it again.

        Raises:
            InvalidCommand: that token is not computed; or it is not published, and there are layer groups.
            ipc.SharedMemoryFull: there is no room for more log; nothing changed.
            UnknownRequest
        """
        first = expect_count("from_token", from_token)
        self._expect_owner()
        live = self._live_request(request_id)
        published = live.request.leaf.end * self.config.block_size
        computed = max(self._computed(live), published)  # what is cached ahead matches, too
        if first >= computed:
            raise InvalidCommand(f"only {computed} tokens of request {request_id!r} are computed, none from {first} on")
        if live.request.sides and first >= published:
            raise InvalidCommand(
                f"tokens from {first} on of request {request_id!r} are not published, and what windows of its layer "
                "groups have left cannot be read again: release the request, and admit it again"
            )
        if self._execute(commands.Distrust(request_id, first // self.config.block_size)):
            self._drop_unused(distrusted=True)
        live.computed = max(min(live.computed, first), published)

    def grow(self, tokens: Mapping[str, SupportsIndex], *, lookahead: SupportsIndex = 0) -> Growth:
        """Give each request room for its first so many tokens, and ``lookahead`` more. Most important first.

        Nothing here is an exception that is an answer: see :class:`Growth`. Requests get their blocks in the order
        given, each all or nothing; nobody gets any after the first that does not fit. Asking again changes nothing,
        and where no request crosses a block border nothing is logged.

        Raises:
            InvalidCommand, Paused
        """
        more = expect_count("lookahead", lookahead)
        if type(tokens) is not dict and not isinstance(tokens, Mapping):
            raise InvalidCommand(f"tokens are a mapping from request to tokens, not {type(tokens).__name__}")
        self._expect_owner()
        size = self.config.block_size
        all_live = self._live
        wanted: list[str] = []
        counts: list[int] = []
        not_ready: list[str] = []
        gone: list[str] = []
        for request_id, value in tokens.items():
            count = (
                value if type(value) is int and value >= 0 else expect_count(f"tokens of request {request_id!r}", value)
            )
            live = all_live.get(request_id)
            if live is None:
                if request_id in self._state.numbers:
                    live = self._live_request(request_id)
                else:
                    gone.append(request_id)
                    continue
            request = live.request
            missing = -(-(count + more) // size) - len(request.table)
            if missing > 0:
                wanted.append(request_id)
                counts.append(missing)
            elif request.waits_for:
                not_ready.append(request_id)
        if not wanted:
            return Growth({}, not_ready, [], None, gone, {})
        return self._granted(wanted, counts, not_ready, gone)

    def _granted(self, wanted: list[str], counts: list[int], not_ready: list[str], gone: list[str]) -> Growth:
        if self._paused:
            raise Paused(f"ledger {self.name!r} is paused: resume() first")
        refused: list[str] = []
        refusal: OutOfBlocks | None = None
        try:
            events = self._execute(commands.Allocate(wanted, counts))
        except OutOfBlocks as error:
            refusal, fitting = error, error.fitting
            refused = wanted[fitting:]
            wanted, counts = wanted[:fitting], counts[:fitting]
            events = self._execute(commands.Allocate(wanted, counts)) if wanted else []
        new_blocks: dict[str, BlockTable] = {}
        sides: dict[str, tuple[BlockTable, ...]] = {}
        if events:
            if self._state.groups:
                sides = {request_id: tuple(self._new_sides(request_id, n)) for request_id, n in zip(wanted, counts)}
            allocated = next(event for event in reversed(events) if isinstance(event, BlocksAllocated))
            granted = np.array(allocated.blocks, np.int32)
            start = 0
            for request_id, count in zip(wanted, counts):
                new_blocks[request_id] = granted[start : start + count]
                start += count
                if self._live[request_id].request.waits_for:
                    not_ready.append(request_id)
        return Growth(new_blocks, not_ready, refused, refusal, gone, sides)

    def _new_sides(self, request_id: str, count: int) -> Iterator[BlockTable]:
        """The last blocks of a request in each side group: as many as group 0 got, or none that go by positions."""
        for group, side in zip(self._state.groups, self._live[request_id].request.sides):
            yield np.array(side.table[len(side.table) - count :] if group.windowed else side.table[:0], np.int32)

    def commit(self, computed: Mapping[str, SupportsIndex]) -> list[str]:
        """Say how many leading tokens of each request are computed now: their full blocks are published.

        The KV of these tokens must be written. Returns the requests that are gone. Where nobody has filled a block
        nothing is logged. Call it again after an error of the log: what was said before changes nothing.

        Raises:
            InvalidCommand: more than is known, or than there is room for, or less than before; nothing changed.
            RequestNotReady: some of them are still being copied; nothing changed.
            ipc.SharedMemoryFull: there is no room for more log; the requests up to there, in order, are committed.
        """
        if type(computed) is not dict and not isinstance(computed, Mapping):
            raise InvalidCommand(f"computed is a mapping from request to tokens, not {type(computed).__name__}")
        self._expect_owner()
        size = self.config.block_size
        all_live = self._live
        gone: list[str] = []
        same: list[tuple[LiveRequest, int]] = []
        full: list[tuple[LiveRequest, int]] = []
        for request_id, value in computed.items():
            count = (
                value if type(value) is int and value >= 0 else expect_count(f"tokens of request {request_id!r}", value)
            )
            live = all_live.get(request_id)
            if live is None:
                if request_id in self._state.numbers:
                    live = self._live_request(request_id)
                else:
                    gone.append(request_id)
                    continue
            request = live.request
            tail = self._tail(live)
            if (
                count > (request.leaf.end * self._state.block_bytes + len(request.words) + len(tail)) >> 2
                or count > len(request.table) * size
                or request.waits_for
                or count < max(live.computed, request.leaf.end * size)
            ):
                self._expect_computable(live, count)
            (full if count >= (request.leaf.end + 1) * size else same).append((live, count))
        for live, count in same:
            live.computed = count
        if full or self._state.groups:
            with self._together():
                for live, count in full:
                    self._publish(live, count // size)
                    live.computed = count
                if self._state.groups:
                    self._settle([*same, *full])
        return gone

    def _settle(self, computed: list[tuple[LiveRequest, int]]) -> None:
        """Free what the windows of requests have left: what was committed is settled."""
        groups, size = self._state.groups, self.config.block_size
        passing = [
            (live.request.request_id, count)
            for live, count in computed
            if any(side.passed(group, count, size) for group, side in zip(groups, live.request.sides))
        ]
        if passing:
            self._execute(commands.Settle([request_id for request_id, _ in passing], [count for _, count in passing]))

    def _publish(self, live: LiveRequest, blocks: int) -> None:
        """Publish the first ``blocks`` blocks of a request, whose content is known."""
        request = live.request
        size = self._state.block_bytes
        tail = self._tail(live)
        missing = max((blocks - request.leaf.end) * size - len(request.words), 0)
        items, later = self._items_before(live, missing)
        live.tail = None  # not known while it is not certain: what interrupts this call must not garble the next
        try:
            self._execute(commands.Cache(request.request_id, blocks, tail[:missing], None, items))
        except (CommandRejected, LedgerError):  # nothing has changed
            live.tail = tail
            raise
        live.tail, live.items = tail[missing:], later
        if self._state.policy == HostPolicy.WRITE_THROUGH:
            self._back_up(request.request_id)

    def _items_before(self, live: LiveRequest, length: int) -> tuple[bytes, bytes]:
        """Of the items that the state does not know yet, those in the next so many bytes of words, and the others."""
        if not live.items:
            return b"", b""
        return divided(live.items, self._known(live, b"") + length // 4)

    def _expect_computable(self, live: LiveRequest, count: int) -> None:
        """Refuse to commit so many tokens if they cannot be computed."""
        request = live.request
        known = self._known(live, self._tail(live))
        if count > known:
            raise InvalidCommand(
                f"{count} tokens of request {request.request_id!r} are not known, {known} are: append first"
            )
        room = len(request.table) * self.config.block_size
        if count > room:
            raise InvalidCommand(
                f"request {request.request_id!r} has room for {room} tokens, not for {count}: grow first"
            )
        computed = self._computed(live)
        if count < computed:
            raise InvalidCommand(
                f"{computed} tokens of request {request.request_id!r} are computed already, not only {count}: "
                "distrust() what turned out bad"
            )
        first = min(request.waits_for.values(), default=None)
        if first is not None and count > max(first * self.config.block_size, computed):
            raise RequestNotReady(
                f"request {request.request_id!r} still waits for transfers {[*request.waits_for]}: poll() first"
            )

    # The numbers

    def _lost(self, request_id: str, kept: int) -> None:
        """Count no more tokens as computed than are in the first ``kept`` blocks: the others were given back."""
        live = self._live.get(request_id)
        if live is not None:
            live.computed = min(live.computed, kept * self.config.block_size)

    def _live_request(self, request_id: str) -> LiveRequest:
        request = request_named(self._state, request_id)
        live = self._live.get(request_id)
        if live is None:
            live = self._live[request_id] = LiveRequest(request, None)
        return live

    def _tail(self, live: LiveRequest) -> bytes:
        """The words after those that the state has."""
        tail = live.tail
        if tail is None:
            why = "a call was interrupted; release it"
            raise InvalidCommand(f"the last tokens of request {live.request.request_id!r} are not known: {why}")
        return tail

    def _known(self, live: LiveRequest, tail: bytes) -> int:
        request = live.request
        return (request.leaf.end * self._state.block_bytes + len(request.words) + len(tail)) // 4

    def _computed(self, live: LiveRequest) -> int:
        return computed_tokens(live.request, live.computed, self.config.block_size)


def computed_tokens(request: Request, committed: int, size: int) -> int:
    """What was committed, as long as the path of a request says nothing else.

    It is longer where the request was extended or cached block by block, and shorter where a swap-in has failed.
    """
    end = min(request.leaf.end, request.computed, len(request.table)) * size
    return committed if end <= committed < end + size else end
