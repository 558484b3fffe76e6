"""``git blame`` for KV blocks: the causal history of a block, a request, a transfer or a content, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from kvledger.debugger.filters import request_numbers
from kvledger.debugger.hashes import Content, find_hash
from kvledger.debugger.owners import Owner, content, describe, owners_of, short, tokens
from kvledger.debugger.source import Entry, Source, SourceError
from kvledger.debugger.wording import DIRECTIONS, Wording, block_name, count, listed
from kvledger.mentioned import Kind
from statemachine.apply import apply, genesis
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
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
from statemachine.replay import MISFITS, said
from statemachine.state import State

MOST_FACTS = 30
_GRANTS = 3
_SWEEPING = (CacheCleared, PoolResized, TierLost)
"""They move blocks without naming them."""


class Fact(NamedTuple):
    """One step of a history."""

    sequence: int
    time_ns: int
    step: int
    text: str


class Explanation(NamedTuple):
    """What is now, and how it came about."""

    subject: str
    at: int
    now: list[str]
    history: list[Fact]
    """Oldest first."""
    omitted: str
    """What the history leaves out; empty if it is complete."""


def explain_block(
    source: Source, block: int, tier: Tier, at: int, most: int = MOST_FACTS, *, words: bool = True
) -> Explanation:
    """Who had a block, what it held, who held it, and why it changed hands. The newest ``most`` facts.

    Without ``words`` no token ids are in it: they are users' prompts.

    Raises:
        SourceError
    """
    state = source.at(at)
    capacity = max(state.pool(tier).capacity, 0)
    if not 0 <= block < capacity:
        there = f"0 to {capacity - 1}" if capacity else "none"
        raise SourceError(f"there is no {block_name(tier, block)}: the blocks of that tier are {there}")
    now = describe(state, tier, block, words)
    del state
    return _backwards(source, block_name(tier, block), now, _BlockStory(source, block, tier, words), at, most)


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
        names = [f"{state.requests[id].key!r}" for id in flying.waiters]
        now.append(f"waiting for it: {listed(names) if names else 'nobody'}")
    del state
    return _backwards(source, f"transfer {transfer}", now, _TransferStory(source, transfer), at, most)


def explain_request(source: Source, text: str, at: int, most: int = MOST_FACTS) -> Explanation:
    """The life of the newest request of that name (``#12``: of that number), and what its blocks are.

    Raises:
        SourceError
    """
    number = request_numbers(source, text, at)[-1]
    state = source.at(at)
    request = state.requests.get(number)
    name = f"request {text!r}" if request is None else f"request {request.key!r} (number {number})"
    if request is None:
        if number >= state.next_request:
            raise SourceError(f"no request {text} has begun up to event {at}; there were {state.next_request - 1}")
        now = [f"{name} has ended"]
    else:
        own = len(request.private())
        cached = request.leaf.end
        now = [
            f"{name} is live: {count(len(request.table), 'block')}, the first {cached} are cached, {own} are its own",
        ]
        if request.computed < cached:
            now.append(f"the first {request.computed} are computed, the others are cached ahead of their step")
        for id, position in request.waits.items():
            now.append(f"it waits for transfer {id}: nothing from position {position} on may be used before that ends")
    del state
    return _backwards(source, name, now, _RequestStory(source, number, text), at, most)


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
    wanted = find_hash(source, text, at, progress)
    state = source.at(at)
    now = [f"it is position {wanted.position} of its path, tokens {tokens(wanted.own_words)}"]
    blocks = wanted.blocks(state)
    for tier, block in blocks.items():
        now += describe(state, tier, block)
    if not blocks:
        now.append("it is cached nowhere")
    del state
    return _backwards(source, f"content {wanted.hash.hex()}", now, _HashStory(source, wanted, blocks, at), at, most)


class _Story:
    """Tells facts about one subject, event by event."""

    complete = False
    """Whether nothing before what has been told is of interest."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def spans(self) -> list[tuple[int, int]]:
        raise NotImplementedError

    def begin(self, state: State | None) -> None:
        """A stretch begins with this state."""

    def before(self, state: State, event: Event) -> None:
        """The event is about to be applied."""

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        """The event has been applied; ``purpose`` is what its transaction is for. Empty: it is of no interest."""
        raise NotImplementedError


def _backwards(source: Source, subject: str, now: list[str], story: _Story, at: int, most: int) -> Explanation:
    """Tell stretch after stretch from the newest on, until the story is complete or long enough."""
    facts: list[Fact] = []
    omitted = ""
    spans = [span for span in story.spans() if span[0] <= at]
    for number in range(len(spans) - 1, -1, -1):
        first, last = spans[number]
        facts = [*_tell(source, story, first, min(last, at)), *facts]
        if len(facts) > most or (story.complete and number):
            omitted = f"older facts are left out: explain it --at {facts[max(len(facts) - most, 0)].sequence - 1}"
            break
    return Explanation(subject, at, now, facts[-most:], omitted)


def _tell(source: Source, story: _Story, first: int, last: int) -> Iterator[Fact]:
    state = source.before(first)
    story.begin(state)
    for transaction in source.transactions(first):
        purpose = transaction[-1].event
        for entry in transaction:
            if entry.sequence > last:
                return
            event = entry.event
            try:
                if state is None:
                    state = genesis(event)
                else:
                    story.before(state, event)
                    apply(state, event)
            except MISFITS as error:
                yield Fact(entry.sequence, entry.time_ns, entry.step, f"contradicts the state: {said(error)}")
                return
            text = story.after(state, entry, purpose)
            if text:
                yield Fact(entry.sequence, entry.time_ns, entry.step, text)
        if transaction[-1].sequence >= last:
            return


class _BlockStory(_Story):
    def __init__(self, source: Source, block: int, tier: Tier, words: bool) -> None:
        super().__init__(source)
        self.block = block
        self.words = words
        self.tier = tier
        self.transfers: set[int] = set()
        self.grants = 0
        self.owners: list[Owner] = []
        self.holder = ""

    def spans(self) -> list[tuple[int, int]]:
        return self.source.spans("device" if self.tier == Tier.DEVICE else "host", self.block)

    def begin(self, state: State | None) -> None:
        self.transfers = set()
        if state is not None:
            for transfer in state.transfers.values():
                if self.block in transfer.sources or self.block in transfer.targets:
                    self.transfers.add(transfer.id)

    def _named(self, event: Event) -> bool:
        found = mentions(event)
        return self.block in (found.device if self.tier == Tier.DEVICE else found.host)

    def _involved(self, event: Event) -> bool:
        if isinstance(event, TransferFinished | QuarantineEnded):
            return event.transfer in self.transfers
        return self._named(event) or isinstance(event, _SWEEPING)

    def before(self, state: State, event: Event) -> None:
        self.owners = owners_of(state, self.tier, self.block) if self._involved(event) else []
        self.holder = ""
        if isinstance(event, RequestReleased | RequestExtended) and event.request in state.requests:
            request = state.requests[event.request]
            self.holder = request.key if self._holds(state, event.request) else ""

    def _holds(self, state: State, request: int) -> bool:
        node = state.requests[request].leaf
        while node.parent is not None:
            ids = node.device if self.tier == Tier.DEVICE else node.host
            if ids is not None and self.block in ids:
                return True
            node = node.parent
        return False

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        if isinstance(event, TransferStarted) and self._named(event):
            self.transfers.add(event.transfer)
        if isinstance(event, RequestMatched) and self._holds(state, event.request):
            return f"request {event.key!r} (number {event.request}) finds it in its prompt and holds it"
        if isinstance(event, RequestExtended) and not self.holder and self._holds(state, event.request):
            return f"request {state.requests[event.request].key!r} finds it between two chunks and holds it"
        if isinstance(event, RequestReleased) and self.holder and not self._named(event):
            return f"request {self.holder!r} ends and lets go of it"
        if not self._involved(event):
            return ""
        owners = owners_of(state, self.tier, self.block)
        if isinstance(event, _SWEEPING) and [short(o) for o in owners] == [short(o) for o in self.owners]:
            return ""
        return self._moved(state, event, purpose, owners)

    def _moved(self, state: State, event: Event, purpose: Event, owners: list[Owner]) -> str:
        name = {id: request.key for id, request in state.requests.items()}
        now = f"it is {listed(short(owner) for owner in owners) or 'lost'} then"
        if isinstance(event, BlocksAllocated):
            self.grants += 1
            self.complete = self.grants >= _GRANTS
            owner = owners[0].request if owners else None
            key = owner.key if owner is not None else "?"
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
        if isinstance(event, BlocksTrimmed):
            return f"request {name[event.request]!r} gives it back; {now}"
        if isinstance(event, RequestReleased):
            return f"its request ends; {now}"
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
        is_source = (self.tier == Tier.HOST) == inward
        ids, others = (event.sources, event.targets) if is_source else (event.targets, event.sources)
        other = block_name(Tier(1 - self.tier), others[ids.index(self.block)])
        kind = f"{DIRECTIONS[Direction(event.direction)]} {event.transfer}"
        why = f" for request {state.requests[event.request].key!r}" if inward else _for(state, purpose)
        if is_source:
            return f"{kind} copies it to {other}{why}; {now}"
        self.grants += 1
        self.complete = self.grants >= _GRANTS
        return f"{kind} copies {other} to it{why}; {now}"


def _for(state: State, purpose: Event) -> str:
    """Whom room is made for."""
    if isinstance(purpose, BlocksAllocated):
        # The grant comes later in the transaction, its requests are there already.
        names = [f"{state.requests[id].key!r}" for id in purpose.requests if id in state.requests]
        return f", to make room for {count(len(purpose.blocks), 'block')} of request {listed(names)}" if names else ""
    if isinstance(purpose, TransferStarted):
        return f", to make room for transfer {purpose.transfer}"
    return ""


class _RequestStory(_Story):
    def __init__(self, source: Source, number: int, key: str) -> None:
        super().__init__(source)
        self.number = number
        self.key = key
        self.words = Wording()
        self.waits: set[int] = set()

    def spans(self) -> list[tuple[int, int]]:
        return self.source.spans("request", self.number)

    def begin(self, state: State | None) -> None:
        self.words = Wording.after(state) if state is not None else Wording()
        request = state.requests.get(self.number) if state is not None else None
        self.waits = set(request.waits) if request is not None else set()

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        text = self.words(event)
        request = state.requests.get(self.number)
        waits = set(request.waits) if request is not None else set()
        new, over, self.waits = waits - self.waits, self.waits - waits, waits
        if isinstance(event, RequestMatched) and event.request == self.number:
            self.key = event.key
            self.complete = True
            if request is not None and event.device_blocks + event.host_blocks:
                runs = [f"{run.id} ({count(run.size, 'block')})" for run in state.path(request.leaf)]
                text += f"; its path is run {listed(runs)}"
        elif isinstance(event, TransferFinished) and event.transfer in over:
            text += "; the request waits for it no longer"
        elif isinstance(event, AllocationRefused):
            if self.key != event.key:
                return ""
        elif self.number not in mentions(event).requests:
            return ""
        return text + (f"; it waits for transfer {listed(map(str, sorted(new)))}" if new else "")


class _TransferStory(_Story):
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
            self.waiters = [state.requests[id].key for id in transfer.waiters if id in state.requests]

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        text = self.words(event)
        if isinstance(event, TransferStarted) and event.transfer == self.number:
            self.complete = True
            return text + ("" if event.direction == Direction.SWAP_IN else _for(state, purpose))
        if isinstance(event, TransferFinished) and event.transfer == self.number:
            names = listed(map(repr, self.waiters))
            return text + (f"; request {names} can go on" if names else "; nobody waited for it")
        return text if self.number in mentions(event).transfers else ""


class _HashStory(_Story):
    def __init__(self, source: Source, wanted: Content, blocks: dict[Tier, int], at: int) -> None:
        super().__init__(source)
        self.wanted = wanted
        self.words = Wording()
        self.blocks = self.now = blocks
        self.at = at

    def spans(self) -> list[tuple[int, int]]:
        starts = self.source.starts()
        every = list(zip(starts, [*(start - 1 for start in starts[1:]), self.source.last]))
        if not self.now:
            return every
        # Where it is came about where its blocks are mentioned; who used it lately is in the present stretch.
        kinds: dict[Tier, Kind] = {Tier.DEVICE: "device", Tier.HOST: "host"}
        named = {span for tier, block in self.now.items() for span in self.source.spans(kinds[tier], block)}
        return sorted(named | {span for span in every if span[0] <= self.at <= span[1]})

    def begin(self, state: State | None) -> None:
        self.words = Wording.after(state) if state is not None else Wording()
        self.blocks = self.wanted.blocks(state) if state is not None else {}

    def before(self, state: State, event: Event) -> None:
        self.blocks = self.wanted.blocks(state)

    def after(self, state: State, entry: Entry, purpose: Event) -> str:
        event = entry.event
        text = self.words(event)
        now = self.wanted.blocks(state)
        if isinstance(event, RequestMatched) and self.wanted.wanted(state, event):
            length = event.device_blocks + event.host_blocks
            hit = "finds it cached" if self.wanted.position < length else "has it in its prompt and has to compute it"
            return f"request {event.key!r} (number {event.request}) {hit}"
        if now == self.blocks:
            return ""
        where = listed(block_name(tier, block) for tier, block in now.items())
        self.complete = self.complete or not self.blocks
        return f"{text}; it is {f'in {where}' if now else 'nowhere'} then"


def _blocks(values: Iterable[int]) -> str:
    return count(len(list(values)), "block")


__all__ = [
    "Explanation",
    "Fact",
    "explain_block",
    "explain_hash",
    "explain_request",
    "explain_transfer",
]
