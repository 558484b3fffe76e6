"""``git blame`` for KV blocks: the causal history of a block, a request, a transfer or a content, in sentences."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

from kvledger.debugger.explain.owners import Owner, content, describe, owners_of, short, tokens
from kvledger.debugger.explain.story import Explanation, Story, backwards
from kvledger.debugger.explain.wording import (
    DIRECTIONS,
    Wording,
    block_name,
    count,
    listed,
    namespace_name,
    reason_name,
)
from kvledger.debugger.source.filters import request_numbers
from kvledger.debugger.source.hashes import Content, find_hash
from kvledger.debugger.source.source import Entry, Source, SourceError
from kvledger.recordings.origins import hash_number
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    CopiesReplaced,
    Direction,
    Event,
    EvictReason,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
)
from statemachine.mentions import mentions
from statemachine.state.state import State

MOST_FACTS = 30
_GRANTS = 3
_SWEEPING = (CacheCleared, PoolResized, TierLost)
"""Events that move blocks without naming them."""
_STAYING = (RequestMatched, BlocksAllocated)
"""Events that leave what is cached where it is."""
_ENDING = (TransferFinished, QuarantineEnded, *_SWEEPING)


def explain_block(
    source: Source, block: int, tier: Tier, at: int, most: int = MOST_FACTS, *, words: bool = True
) -> Explanation:
    """Who had a block, what it held, who held it, and why it changed hands. The newest ``most`` facts.

    Without ``words`` no token ids are in it: they are users' prompts.

    Raises:
        SourceError
    """
    state = source.at(at)
    now = describe(state, tier, block, words)
    del state
    return backwards(source, block_name(tier, block), now, _BlockStory(source, block, tier, words), at, most)


def explain_transfer(source: Source, transfer: int, at: int, most: int = MOST_FACTS) -> Explanation:
    """Why a transfer began, what it copies, who waits for it, how it ended.

    Raises:
        SourceError
    """
    state = source.at(at)
    if not 0 < transfer < state.next_transfer:
        raise SourceError(f"no transfer {transfer} has begun up to event {at}; there were {state.next_transfer - 1}")
    flying = state.transfers.get(transfer)
    now = [f"transfer {transfer} has ended"]
    if flying is not None:
        kind = DIRECTIONS[flying.direction]
        now = [
            f"{kind} {transfer} is {'quarantined' if flying.quarantined else 'in flight'}: {_blocks(flying.targets)}"
        ]
        names = [f"{state.requests[id].request_id!r}" for id in flying.waiters]
        now.append(f"waiting for it: {listed(names) if names else 'nobody'}")
    del state
    return backwards(source, f"transfer {transfer}", now, _TransferStory(source, transfer), at, most)


def explain_request(source: Source, text: str, at: int, most: int = MOST_FACTS, *, words: bool = True) -> Explanation:
    """The life of the newest request of that name (``#12``: of that number), and what its blocks are.

    Without ``words`` its namespace is left out: it may hold a secret salt.

    Raises:
        SourceError
    """
    number = request_numbers(source, text, at)[-1]
    state = source.at(at)
    request = state.requests.get(number)
    name = f"request {text!r}" if request is None else f"request {request.request_id!r} (number {number})"
    if request is None:
        now = [f"{name} has ended"]
    else:
        own = len(request.private())
        cached = request.leaf.end
        now = [
            f"{name} is live: {count(len(request.table), 'block')}, the first {cached} are cached, {own} are its own",
        ]
        if request.computed < cached:
            now.append(f"the first {request.computed} are computed, the others are cached ahead of their step")
        for id, position in request.waits_for.items():
            now.append(f"it waits for transfer {id}: nothing from position {position} on may be used before that ends")
    del state
    return backwards(source, name, now, _RequestStory(source, number, text, words), at, most)


def explain_hash(
    source: Source,
    text: str,
    at: int,
    most: int = MOST_FACTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Explanation:
    """Where the content with that block hash is and was, who brought it, who used it.

    Raises:
        SourceError
    """
    wanted, brought = find_hash(source, text, at, progress)
    state = source.at(at)
    now = [f"it is position {wanted.position} of its path, tokens {tokens(wanted.own_words)}"]
    blocks = wanted.blocks(state)
    for tier, block in blocks.items():
        now += describe(state, tier, block)
    if not blocks:
        now.append("it is cached nowhere")
    story = _HashStory(source, wanted, at, state, brought)
    del state
    return backwards(source, f"content {wanted.hash.hex()}", now, story, at, most)


class _BlockStory(Story):
    def __init__(self, source: Source, block: int, tier: Tier, words: bool) -> None:
        super().__init__(source)
        self.block = block
        self.words = words
        self.tier = tier
        self.transfers: set[int] = set()
        self.grants = 0
        self.owners: list[Owner] = []
        self.holder = ""
        self.ending = "its request"
        self.named = self.involved = False
        """Whether the present event names the block, and whether it may move it."""

    def spans(self) -> list[tuple[int, int]]:
        return self.source.spans("device" if self.tier == Tier.DEVICE else "host", self.block)

    def begin(self, state: State | None) -> None:
        self.transfers = set()
        if state is not None:
            for transfer in state.transfers.values():
                if self.block in (transfer.sources if self._is_source(transfer.direction) else transfer.targets):
                    self.transfers.add(transfer.id)

    def _is_source(self, direction: int) -> bool:
        """Whether a transfer that has the block copies it elsewhere, and not elsewhere to it."""
        return (self.tier == Tier.HOST) == (direction == Direction.SWAP_IN)

    def before(self, state: State, event: Event) -> None:
        found = mentions(event)
        self.named = self.block in (found.device if self.tier == Tier.DEVICE else found.host)
        self.involved = self.named or (type(event) in _ENDING and self._involved(event))
        if self.involved:
            self.owners = owners_of(state, self.tier, self.block)
        self.holder = ""
        if isinstance(event, RequestReleased | RequestExtended) and event.request in state.requests:
            request = state.requests[event.request]
            self.holder = request.request_id if self._holds(state, event.request) else ""
            self.ending = f"request {request.request_id!r}"

    def _involved(self, event: Event) -> bool:
        """Whether an event that names no block moves it."""
        if isinstance(event, TransferFinished | QuarantineEnded):
            return event.transfer in self.transfers
        return True

    def _holds(self, state: State, request: int) -> bool:
        node = state.requests[request].leaf
        while node.parent is not None:
            copy = node.copies[self.tier]
            if copy is not None and self.block in copy.ids:
                return True
            node = node.parent
        return False

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        if isinstance(event, TransferStarted) and self.named:
            self.transfers.add(event.transfer)
        if isinstance(event, RequestMatched) and self._holds(state, event.request):
            return f"request {event.key!r} (number {event.request}) finds it in its prompt and holds it"
        if isinstance(event, RequestExtended) and not self.holder and self._holds(state, event.request):
            return f"request {state.requests[event.request].request_id!r} finds it between two chunks and holds it"
        if isinstance(event, RequestReleased) and self.holder and not self.named:
            return f"request {self.holder!r} ends ({reason_name(event)}) and lets go of it"
        if not self.involved:
            return ""
        owners = owners_of(state, self.tier, self.block)
        if isinstance(event, _SWEEPING) and [short(o) for o in owners] == [short(o) for o in self.owners]:
            return ""
        return self._moved(state, event, purpose, owners)

    def _moved(self, state: State, event: Event, purpose: Event, owners: list[Owner]) -> str:
        name = {id: request.request_id for id, request in state.requests.items()}
        now = f"it is {listed(short(owner) for owner in owners) or 'lost'} then"
        if isinstance(event, BlocksAllocated):
            self.grants += 1
            self.complete = self.grants >= _GRANTS
            owner = owners[0].request if owners else None
            key = owner.request_id if owner is not None else "?"
            return f"granted to request {key!r}, as position {owners[0].place} of its block table" if owner else now
        if isinstance(event, BlocksCached):
            node, place = owners[0].node, owners[0].place
            if node is None:
                return f"request {name[event.request]!r} publishes around it; {now}"
            held = content(state, node, place, self.words)
            return f"request {name[event.request]!r} publishes it as {short(owners[0])}: {held}"
        if isinstance(event, BlocksReassigned):
            return f"request {name[event.request]!r} hands it to request {name[event.target]!r}"
        if isinstance(event, RequestExtended):
            return (
                f"request {name[event.request]!r} goes on with what others have cached and gives its copy back; {now}"
            )
        if isinstance(event, CopiesReplaced):
            if self.block in event.blocks:
                return f"{short(owners[0])} takes it from request {name[event.request]!r}, in the place of its own copy"
            return f"its run takes the copy of request {name[event.request]!r}, and nobody else used it; {now}"
        if isinstance(event, BlocksTrimmed):
            return f"request {name[event.request]!r} gives it back; {now}"
        if isinstance(event, RequestReleased):
            return f"{self.ending} ends ({reason_name(event)}); {now}"
        if isinstance(event, BlocksEvicted):
            run = short(self.owners[0]) if self.owners else "a run"
            why = EvictReason(event.reason).name.lower().replace("_", " ")
            return f"evicted ({why}) as {run}, which nobody held{_for(state, purpose)}; {now}"
        if isinstance(event, TransferStarted):
            return self._copied(state, event, purpose, now)
        if isinstance(event, TransferFinished):
            outcome = "arrived" if event.valid else "nothing arrived"
            return f"transfer {event.transfer} ends ({outcome}, {count(event.valid, 'block')} valid); {now}"
        if isinstance(event, QuarantineEnded):
            return f"the quarantine of transfer {event.transfer} ends; {now}"
        return f"{Wording()(event)}; {now}"

    def _copied(self, state: State, event: TransferStarted, purpose: Event, now: str) -> str:
        inward = event.direction == Direction.SWAP_IN
        is_source = self._is_source(event.direction)
        ids, others = (event.sources, event.targets) if is_source else (event.targets, event.sources)
        other = block_name(Tier(1 - self.tier), others[ids.index(self.block)])
        kind = f"{DIRECTIONS[Direction(event.direction)]} {event.transfer}"
        why = f" for request {state.requests[event.request].request_id!r}" if inward else _for(state, purpose)
        if is_source:
            return f"{kind} copies it to {other}{why}; {now}"
        self.grants += 1
        self.complete = self.grants >= _GRANTS
        return f"{kind} copies {other} to it{why}; {now}"


def _for(state: State, purpose: Event) -> str:
    """Whom room is made for."""
    if isinstance(purpose, BlocksAllocated):
        # The grant comes later in the transaction, its requests are there already.
        names = [f"{state.requests[id].request_id!r}" for id in purpose.requests if id in state.requests]
        return f", to make room for {count(len(purpose.blocks), 'block')} of request {listed(names)}" if names else ""
    if isinstance(purpose, TransferStarted):
        return f", to make room for transfer {purpose.transfer}"
    return ""


class _RequestStory(Story):
    def __init__(self, source: Source, number: int, key: str, spaces: bool) -> None:
        super().__init__(source)
        self.number = number
        self.key = key
        self.spaces = spaces
        self.words = Wording()
        self.waits: set[int] = set()

    def spans(self) -> list[tuple[int, int]]:
        return self.source.spans("request", self.number)

    def begin(self, state: State | None) -> None:
        self.words = Wording.after(state) if state is not None else Wording()
        request = state.requests.get(self.number) if state is not None else None
        self.waits = set(request.waits_for) if request is not None else set()

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        request = state.requests.get(self.number)
        waits = set(request.waits_for) if request is not None else set()
        new, over, self.waits = waits - self.waits, self.waits - waits, waits
        arrived = isinstance(event, TransferFinished) and event.transfer in over
        named = event.key == self.key if isinstance(event, AllocationRefused) else self._named(event)
        if not arrived and not named:
            self.words.learn(event)
            return ""
        text = self.words(event)
        if isinstance(event, RequestMatched):
            self.key = event.key
            self.complete = True
            if self.spaces and event.namespace:
                text += f"; it matches under {namespace_name(event.namespace)} only"
            if request is not None and event.device_blocks + event.host_blocks:
                runs = [f"{run.id} ({count(run.size, 'block')})" for run in state.path(request.leaf)]
                text += f"; its path is run {listed(runs)}"
        elif arrived:
            text += "; the request waits for it no longer"
        return text + (f"; it waits for transfer {listed(map(str, sorted(new)))}" if new else "")

    def _named(self, event: Event) -> bool:
        return self.number in mentions(event).requests


class _TransferStory(Story):
    def __init__(self, source: Source, number: int) -> None:
        super().__init__(source)
        self.number = number
        self.words = Wording()
        self.waiters: list[str] = []

    def spans(self) -> list[tuple[int, int]]:
        return self.source.spans("transfer", self.number)

    def begin(self, state: State | None) -> None:
        self.words = Wording.after(state) if state is not None else Wording()

    def before(self, state: State, event: Event) -> None:
        transfer = state.transfers.get(self.number)
        if transfer is not None:
            self.waiters = [state.requests[id].request_id for id in transfer.waiters if id in state.requests]

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        if self.number not in mentions(event).transfers:
            self.words.learn(event)
            return ""
        text = self.words(event)
        if isinstance(event, TransferStarted) and event.transfer == self.number:
            self.complete = True
            return text + ("" if event.direction == Direction.SWAP_IN else _for(state, purpose))
        if isinstance(event, TransferFinished) and event.transfer == self.number:
            names = listed(map(repr, self.waiters))
            return text + (f"; request {names} can go on" if names else "; nobody waited for it")
        return text


class _HashStory(Story):
    def __init__(self, source: Source, wanted: Content, at: int, state: State, brought: int | None) -> None:
        super().__init__(source)
        self.wanted = wanted
        self.words = Wording()
        self.at = at
        self.blocks: dict[Tier, int] = {}
        """Where it is, event by event."""
        self.there: dict[Tier, int] = {}
        """Where it is at the beginning of the stretch that was told last."""
        self.run = 0
        """The run that holds it there."""
        self.waiting = False
        """Only a request that is yet to cache it has it there."""
        self.fresh = False
        """Nobody has it there: if it is mentioned in this stretch, somebody brings it here."""
        self.begin(state)
        self.gone = None if brought is None else self._gone(brought)
        """The stretch in which it was lost, if it is nowhere."""

    def spans(self) -> list[tuple[int, int]]:
        """It is brought where its hash is mentioned, and moves where its blocks or its run are."""
        found = set(self.source.spans("hash", hash_number(self.wanted.hash.hex())))
        if self.waiting:
            starts = self.source.starts()
            found.update(zip(starts, [*(start - 1 for start in starts[1:]), self.source.last]))
        if self.run:
            found.update(self.source.spans("node", self.run))
        for tier, block in self.there.items():
            found.update(self.source.spans("device" if tier == Tier.DEVICE else "host", block))
        if self.gone is not None:
            found = {span for span in found if span <= self.gone} | {self.gone}
        return sorted(found)

    def _gone(self, brought: int) -> tuple[int, int]:
        """The stretch in which the content was lost that nobody brought again after event ``brought``.

        As long as nobody brings it again, what is gone stays gone: so this looks ahead in growing steps, then halves.
        """
        starts = self.source.starts()
        low = bisect.bisect_right(starts, brought) - 1
        end = bisect.bisect_right(starts, self.at)
        high, step = low + 1, 1
        while high < end and self._present(starts[high]):
            low, high, step = high, high + 2 * step, 2 * step
        high = min(high, end)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._present(starts[middle]) else (low, middle)
        return starts[low], (starts[high] - 1 if high < len(starts) else self.source.last)

    def _present(self, start: int) -> bool:
        state = self.source.before(start)
        return state is not None and self.wanted.present(state)

    def begin(self, state: State | None) -> None:
        self.words = Wording.after(state) if state is not None else Wording()
        held = self.wanted.found(state) if state is not None else None
        self.run = 0 if held is None else held[0].id
        self.blocks = self.there = {} if state is None else self.wanted.blocks(state)
        self.fresh = state is None or not self.wanted.present(state)
        self.waiting = held is None and not self.fresh

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        if isinstance(event, RequestMatched) and self.wanted.wanted(state, event):
            self.words.learn(event)
            self.complete = self.fresh
            length = event.device_blocks + event.host_blocks
            hit = "finds it cached" if self.wanted.position < length else "has it in its prompt and has to compute it"
            return f"request {event.key!r} (number {event.request}) {hit}"
        before = self.blocks
        if type(event) not in _STAYING:
            self.blocks = self.wanted.blocks(state)
        if self.blocks == before:
            self.words.learn(event)
            return ""
        where = listed(block_name(tier, block) for tier, block in self.blocks.items())
        self.complete = self.fresh
        return f"{self.words(event)}; it is {f'in {where}' if self.blocks else 'nowhere'} then"


def _blocks(values: Iterable[int]) -> str:
    return count(len(list(values)), "block")
