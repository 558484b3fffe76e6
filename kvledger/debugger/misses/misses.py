"""Every block that requests asked for, by what became of the asking: a hit, or why it was a miss."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import NamedTuple

from kvledger.debugger.misses.memory import Fate, Memory, Step
from kvledger.debugger.source.source import Entry, Source
from kvledger.debugger.source.steps import advance
from statemachine.events import (
    BlocksAllocated,
    BlocksCached,
    BlocksEvicted,
    EvictReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TransferStarted,
)
from statemachine.hashing import block_hashes
from statemachine.state import tree
from statemachine.state.nodes import Node, Request
from statemachine.state.state import State

TIMES = 8
"""Into so many equal times a log is divided."""
_FORGET_EVERY = 1 << 16


class Cause(StrEnum):
    """What became of a block that a request asked for."""

    DEVICE = "hit on the device"
    HOST = "hit on the host"
    FIRST = "first seen"
    """No request had these tokens before."""
    DEPARTS = "known behind another beginning"
    """The same tokens were there before, but behind another beginning."""
    PARTIAL = "shared but shorter than a block"
    """The prompt departs inside this block: it shares its first tokens with one that was there."""
    EVICTED = "evicted"
    NAMESPACE = "another namespace"
    """It was published there only: another adapter, salt or version of the weights."""
    NOT_READY = "not ready"
    """Another request is computing it, or a copy of it is arriving."""
    UNPUBLISHED = "unpublished"
    """The request that had it ended before it published it."""
    KEPT = "kept back"
    """It was cached, but the engine allowed no hit so far into the prompt: it has to compute the last token."""
    LOST = "lost"
    """It was cleared or dropped on demand, a tier was lost or resized, or a copy failed."""


HITS = (Cause.DEVICE, Cause.HOST)


class Family(NamedTuple):
    """A family of requests: those of one namespace that begin with the same block."""

    namespace: bytes
    first: str
    """Hash of that block."""


class Departure(NamedTuple):
    """Requests whose prompt leaves, at one token, all prompts that came before."""

    token: int
    requests: int
    departing: int
    """Blocks from there on that were there before, behind another beginning, and those of which a part was."""
    new: int
    """Blocks from there on that nobody had before."""
    since: int
    """The event at which the first of them began."""
    request: str
    """The last of them."""
    other: str
    """The request that its prompt follows up to there."""
    run: int
    """The run behind which it departs; 0: none, or what it shares was not cached then."""
    tokens: tuple[int, int]
    """The token with which the last of them departs, and the other request's: what users wrote."""


class Pushed(NamedTuple):
    """Blocks of one family that were asked for in vain, since they were evicted to make room for another family."""

    family: Family
    by: Family | None
    """``None``: room was made ahead of need, or before this log begins."""
    blocks: int
    ages_s: list[float]
    """How long before they were asked for they had been evicted: the shortest, the middle one and the longest time."""
    event: int
    """The newest of these evictions."""


class Misses(NamedTuple):
    """What was asked for, and what became of it."""

    requests: int
    blocks: int
    counts: Counter[tuple[int, Family, Cause]]
    """Blocks by time (0 to :data:`TIMES` - 1), family and cause."""
    times_ns: list[int]
    """When each of the times begins."""
    departures: list[Departure]
    """Those that cost most first."""
    pushed: list[Pushed]
    names: dict[Family, str]
    """The request that began each family."""

    def by_cause(self) -> dict[Cause, int]:
        """Blocks by cause, all of them in their order."""
        totals: Counter[Cause] = Counter()
        for (_, _, cause), blocks in self.counts.items():
            totals[cause] += blocks
        return {cause: totals[cause] for cause in Cause}


class _Asked:
    """What a living request asked for, and what it came to."""

    def __init__(self, family: Family, time: int | None, start: int, keys: list[int], causes: list[Cause]) -> None:
        self.family = family
        self.time = time
        """``None``: it began outside of what is counted."""
        self.start = start
        """Position of the first block that it has to compute."""
        self.published = start
        """Up to which position its content is published."""
        self.keys = keys
        self.causes = causes


class _Departures:
    """The requests that depart at one token."""

    def __init__(self, since: int) -> None:
        self.since = since
        self.requests = self.departing = self.new = self.run = 0
        self.request = self.other = ""
        self.tokens = 0, 0


def misses(source: Source, start: int, stop: int, reached: Callable[[int], None] = lambda sequence: None) -> Misses:
    """Why the blocks missed that requests asked for which began from event ``start`` to ``stop``.

    What was before ``start`` is read as well: it is why they miss.

    Raises:
        SourceError: a record is no event, or the log begins where no state is known.
        Contradiction: an event contradicts the state that it meets.
    """
    begun, ended = (next(source.entries(place, place)).time_ns for place in (start, stop))
    count = _Count(start, begun, ended)
    state = source.before(source.first)
    for transaction in source.transactions(source.first, stop):
        purpose = _purpose(transaction)
        for entry in transaction:
            if state is not None and isinstance(entry.event, BlocksEvicted):
                count.evicted(state, entry, entry.event, purpose)
            state = advance(state, entry)
            count.event(state, entry)
        reached(transaction[-1].sequence)
    return count.result()


def _purpose(transaction: list[Entry]) -> int:
    """The request for which a transaction makes room; 0: for none."""
    for entry in transaction:
        event = entry.event
        if isinstance(event, RequestMatched):
            return event.request
        if isinstance(event, BlocksAllocated) and len(event.requests):
            return event.requests[0]
        if isinstance(event, TransferStarted) and event.request:
            return event.request
    return 0


class _Count:
    def __init__(self, start: int, begun_ns: int, ended_ns: int) -> None:
        self._memory = Memory()
        self._start = start
        self._begun = begun_ns
        self._length = max(ended_ns - begun_ns + 1, 1)
        self._asked: dict[int, _Asked] = {}
        self._families: dict[int, Family] = {}
        self._names: dict[Family, str] = {}
        self._counts: Counter[tuple[int, Family, Cause]] = Counter()
        self._departures: dict[int, _Departures] = {}
        self._pushed: dict[tuple[Family, Family | None], tuple[array[int], int]] = {}
        self._requests = self._blocks = 0

    def event(self, state: State, entry: Entry) -> None:
        """An event, and the state after it."""
        event = entry.event
        match event:
            case RequestMatched():
                self._began(state, entry, event)
            case RequestExtended():
                self._found_later(event.request, state.requests[event.request], event.device_blocks)
            case BlocksCached():
                self._published(state, entry, event.request)
            case RequestReleased():
                self._ended(entry, event.request)
        if not entry.sequence % _FORGET_EVERY:
            self._memory.forget_runs(state.nodes)

    def evicted(self, state: State, entry: Entry, event: BlocksEvicted, purpose: int) -> None:
        """Copies are about to be given up: what has no other is gone."""
        capacity = event.reason == EvictReason.CAPACITY
        fate = Fate(Step.EVICTED if capacity else Step.LOST, entry.sequence, entry.time_ns, purpose)
        for id, blocks in zip(event.nodes, event.counts):
            node = state.nodes.get(id)
            if node is None or node.elsewhere(Tier(event.tier)):
                continue
            namespace = tree.root_of(node).words
            for key in self._memory.run_keys(state, node)[node.size - blocks :]:
                self._memory.note(key, namespace, fate)

    def _began(self, state: State, entry: Entry, event: RequestMatched) -> None:
        request = state.requests[event.request]
        memory = self._memory
        memory.names[request.number] = request.request_id
        found = event.device_blocks + event.host_blocks
        keys = memory.keys(state, event.words, request.leaf, request.items)
        if not found + len(keys):
            return
        family = self._family(state, request)
        self._families[request.number] = family
        self._names.setdefault(family, request.request_id)
        counted = entry.sequence >= self._start
        time = (entry.time_ns - self._begun) * TIMES // self._length if counted else None
        causes = self._causes(state, entry, request, keys, counted)
        self._asked[request.number] = _Asked(family, time, found, keys, causes)
        asked = Fate(Step.ASKED, entry.sequence, entry.time_ns, request.number)
        for key, cause in zip(keys, causes):
            if cause not in (Cause.KEPT, Cause.NOT_READY):
                memory.note(key, request.namespace, asked)
        if time is not None:
            self._requests += 1
            self._blocks += found + len(keys)
            self._counts[time, family, Cause.DEVICE] += event.device_blocks
            self._counts[time, family, Cause.HOST] += event.host_blocks
            for cause in causes:
                self._counts[time, family, cause] += 1

    def _family(self, state: State, request: Request) -> Family:
        path = state.path(request.leaf)
        words = (path[0].words if path else request.words)[: state.block_bytes]
        hashes = block_hashes(words, state.opened.block_size, request.namespace, items=request.items)
        return Family(request.namespace, hashes[0].hex())

    def _causes(self, state: State, entry: Entry, request: Request, keys: list[int], counted: bool) -> list[Cause]:
        memory, size, words = self._memory, state.block_bytes, request.words
        cached = list(_cached(request, words, size))
        causes = cached[:]
        parent = keys[len(cached) - 1] if cached else memory.end_key(state, request.leaf)
        departure: _Departures | None = None
        departed = False
        for index in range(len(cached), len(keys)):
            key, position = keys[index], request.leaf.end + index
            content = words[index * size : (index + 1) * size] + request.items.get(position, b"")
            fate = memory.fates.get((key, request.namespace))
            if fate is not None:
                causes.append(self._former(entry, request, fate, counted))
            elif memory.elsewhere(key, request.namespace) is not None:
                causes.append(Cause.NAMESPACE)
            else:
                shared = 0
                if not departed:
                    departed = True
                    shared, other, instead = memory.departure(parent, content)
                    shared = min(shared, state.opened.block_size - 1)
                    if counted and other:
                        token = position * state.opened.block_size + shared
                        departure = self._departures.setdefault(token, _Departures(entry.sequence))
                        departure.requests += 1
                        departure.request, departure.other = request.request_id, memory.names[other]
                        departure.run = request.leaf.id if not index else 0
                        departure.tokens = _token(content, shared), _token(instead, shared)
                seen = memory.seen(content)
                causes.append(Cause.PARTIAL if shared else Cause.DEPARTS if seen else Cause.FIRST)
                if departure is not None:
                    departure.new += not (shared or seen)
                    departure.departing += bool(shared or seen)
            parent = key
        parent = memory.end_key(state, request.leaf)
        for index, key in enumerate(keys):
            content = words[index * size : (index + 1) * size] + request.items.get(request.leaf.end + index, b"")
            memory.bring(parent, content, request.number)
            parent = key
        return causes

    def _former(self, entry: Entry, request: Request, fate: Fate, counted: bool) -> Cause:
        """Why a content misses that was known."""
        if fate.step == Step.ASKED:
            return Cause.NOT_READY if fate.by in self._asked else Cause.UNPUBLISHED
        if fate.step == Step.DROPPED:
            return Cause.UNPUBLISHED
        if fate.step != Step.EVICTED:
            return Cause.LOST
        if counted:
            pair = self._families[request.number], self._families.get(fate.by)
            ages, newest = self._pushed.get(pair, (array("q"), 0))
            ages.append(entry.time_ns - fate.time_ns)
            self._pushed[pair] = ages, max(newest, fate.sequence)
        return Cause.EVICTED

    def _found_later(self, number: int, request: Request, blocks: int) -> None:
        """A request goes on along what others have cached meanwhile: hits after all."""
        asked = self._asked.get(number)
        if asked is None or asked.time is None:
            return
        for position in range(request.leaf.end - blocks, request.leaf.end):
            index = position - asked.start
            if 0 <= index < len(asked.causes) and asked.causes[index] not in HITS:
                self._counts[asked.time, asked.family, asked.causes[index]] -= 1
                asked.causes[index] = Cause.DEVICE
                self._counts[asked.time, asked.family, Cause.DEVICE] += 1

    def _published(self, state: State, entry: Entry, number: int) -> None:
        request = state.requests[number]
        asked = self._asked.get(number)
        start = request.leaf.start if asked is None else asked.published
        fate = Fate(Step.PUBLISHED, entry.sequence, entry.time_ns, number)
        for run in _from_the_end(request.leaf, start):
            for key in self._memory.run_keys(state, run)[max(start - run.start, 0) :]:
                self._memory.note(key, request.namespace, fate)
        if asked is not None:
            asked.published = request.leaf.end

    def _ended(self, entry: Entry, number: int) -> None:
        asked = self._asked.pop(number, None)
        if asked is None:
            return
        for key in asked.keys:
            fate = self._memory.fates.get((key, asked.family.namespace))
            if fate is not None and fate.step == Step.ASKED and fate.by == number:
                dropped = fate._replace(step=Step.DROPPED, sequence=entry.sequence, time_ns=entry.time_ns)
                self._memory.note(key, asked.family.namespace, dropped)

    def result(self) -> Misses:
        """All that was counted."""
        departures = [
            Departure(token, d.requests, d.departing, d.new, d.since, d.request, d.other, d.run, d.tokens)
            for token, d in self._departures.items()
        ]
        departures.sort(key=lambda d: (-d.departing - d.new, d.token))
        pushed = []
        for (family, by), (ages, newest) in self._pushed.items():
            ordered = sorted(ages)
            shown = [age / 1e9 for age in (ordered[0], ordered[len(ordered) // 2], ordered[-1])]
            pushed.append(Pushed(family, by, len(ordered), shown, newest))
        pushed.sort(key=lambda p: (-p.blocks, p.family, p.by or Family(b"", "")))
        times = [self._begun + self._length * time // TIMES for time in range(TIMES)]
        counts = Counter({key: blocks for key, blocks in self._counts.items() if blocks})
        return Misses(self._requests, self._blocks, counts, times, departures, pushed, self._names)


def _token(content: bytes, index: int) -> int:
    return int.from_bytes(content[4 * index : 4 * index + 4], "little", signed=True)


def _cached(request: Request, words: bytes, block_bytes: int) -> Iterator[Cause]:
    """What of a request's words is cached below what it found: no match may go there, or it may not go so far."""
    node, offset = request.leaf, 0
    while offset < len(words):
        found = tree.step(node, memoryview(words), offset, request.items, block_bytes)
        if found is None:
            return
        node, common = found
        for _ in range(common):
            yield Cause.KEPT if node.matchable() else Cause.NOT_READY
        if common < node.size:
            return
        offset += common * block_bytes


def _from_the_end(leaf: Node, start: int) -> Iterator[Node]:
    """The runs of a path that have blocks from position ``start`` on, the deepest first."""
    node = leaf
    while node.parent is not None and node.end > start:
        yield node
        node = node.parent
