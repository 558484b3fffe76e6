"""Hypothesis drives the real state machine and compares it with naive models after every single event."""

from __future__ import annotations

import struct
from array import array
from typing import Any

import pytest
from hypothesis import settings, target
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvledger.testing.oracle import Memory, OneTier
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.check.incremental import IncrementalCheck
from statemachine.commands import (
    Admit,
    Allocate,
    Backup,
    Cache,
    Clear,
    Distrust,
    EndQuarantine,
    Evict,
    Extend,
    FinishTransfer,
    Forget,
    GiveBack,
    LoadWeights,
    LoseTier,
    MakeRoom,
    Match,
    Reassign,
    Release,
    Resize,
    StartEpoch,
    Trim,
)
from statemachine.content import Item
from statemachine.decide import can_allocate, decide, peek, victims_for
from statemachine.decide.derive import commands_of, redecide
from statemachine.decide.ledger import untrusted
from statemachine.errors import CommandRejected, OutOfBlocks
from statemachine.events import (
    BlocksEvicted,
    Direction,
    Event,
    EvictReason,
    HostPolicy,
    LedgerOpened,
    Outcome,
    ReleaseReason,
    RequestMatched,
    Tier,
    TransferFinished,
    TransferStarted,
)
from statemachine.items import item_records
from statemachine.records import codec
from statemachine.records.snapshot import restore, snapshot, state_digest
from statemachine.state.nodes import ALL, Node, from_end
from statemachine.state.state import State
from statemachine.state.tree import root_of

ITEM = st.builds(
    lambda name, length: [(name, length, i) for i in range(length)], st.sampled_from("ab"), st.integers(1, 3)
)
"""An image, by its positions: (name, length, position). All images have the same words: only their records tell."""
SEGMENTS = st.one_of(*[st.integers(1, 2).map(lambda token: [token])] * 5, ITEM)


def joined(segments: list[list[Any]], most: int) -> list[Any]:
    """One content, of as many whole segments as fit."""
    content: list[Any] = []
    for segment in segments:
        content += segment if len(content) + len(segment) <= most else []
    return content or [1]


PROMPTS = st.lists(SEGMENTS, min_size=1, max_size=7).map(lambda segments: joined(segments, 7))
NAMESPACES = st.sampled_from([b"", b"", b"", b"salt"])
KEYS = st.integers(0, 1 << 16)
REQUESTS = st.lists(
    st.tuples(
        PROMPTS,
        NAMESPACES,
        st.integers(0, 2),
        st.sampled_from(["finished", "finished", "final", "cached", "admitted"]),
    ),
    min_size=1,
    max_size=5,
)


def words(content: list[Any]) -> memoryview:
    """Blocks of one token each."""
    return memoryview(struct.pack(f"<{len(content)}i", *[token if isinstance(token, int) else -1 for token in content]))


def records(content: list[Any], start: int = 0) -> bytes:
    """The images in a content."""
    images = [(i, token) for i, token in enumerate(content, start) if not isinstance(token, int)]
    return item_records([Item(name.encode(), i, length) for i, (name, length, place) in images if not place])


def uncut(content: list[Any], blocks: int) -> int:
    """So many leading blocks that none ends inside an image."""
    inside = blocks < len(content) and not isinstance(content[blocks], int) and content[blocks][2]
    return blocks - inside if inside else blocks


class Machine(RuleBasedStateMachine):
    """Runs commands; every event goes through the codec into a second state, and everything is checked after each."""

    state: State
    snapshot: bytes
    oracle: OneTier | None = None

    def open(
        self, device: int, host: int, staging: int, policy: HostPolicy, chunked: bool, backup_after: int = 1
    ) -> None:
        if policy == HostPolicy.OFF:
            host = staging = 0
        opened = LedgerOpened(1, device, host, staging, policy, 1, "", "", backup_after, chunked)
        self.state, self.mirror = genesis(opened), genesis(opened)
        self.snapshot = snapshot(self.state)
        self.incremental = IncrementalCheck(self.state)
        self.tail: list[Event] = []
        self.memory = Memory()
        self.content: dict[str, tuple[Any, list[Any]]] = {}
        self.names = self.upheaval = 0
        self.most_pins = 0

    def do(self, command: Any) -> list[Event] | CommandRejected:
        self.run_what_it_tells(command)
        before = state_digest(self.state)
        resident = self.state.host.resident
        self.mirror = restore(snapshot(self.mirror))  # from now on it knows only what is in the canonical bytes
        try:
            events = decide(self.state, command)
        except CommandRejected as error:
            assert state_digest(self.state) == before
            if isinstance(error, OutOfBlocks):
                self.derive(command, [error.event])
            return error
        assert decide(self.mirror, command) == events, "equal states decide differently"
        if events:
            self.derive(command, events)
        assert state_digest(self.state) == before, "decide changed the state"
        for event in events:
            copied = codec.decode(*codec.encode(event))
            assert copied == event
            apply(self.state, event)
            apply(self.mirror, copied)
            assert not check(self.state), (command, event, check(self.state))
            assert not self.incremental.after(event), (command, event)
            assert state_digest(self.state) == state_digest(self.mirror)
            self.tail.append(copied)
            if isinstance(event, TransferStarted):
                self.memory.started(event)
        if any(isinstance(event, TransferStarted) and event.direction != Direction.SWAP_IN for event in events):
            assert self.state.host.resident <= max(self.state.host.limit, resident), "no room for these copies"
        self.most_pins = max([self.most_pins, *(node.pins for node in self.state.nodes.values())])
        return events

    def run_what_it_tells(self, command: Any) -> None:
        """The engine runs its steps before it tells of them: what a command calls computed is in the blocks by then.

        Only that is: what stays cached ahead holds anything, and nobody may be handed it as content.
        """
        if not isinstance(command, Cache | Release) or command.request_id not in self.content:
            return
        request = self.state.requests[self.state.numbers[command.request_id]]
        if isinstance(command, Release):
            computed = request.leaf.end
        elif command.computed is not None:
            computed = command.computed
        else:
            computed = command.blocks
        self.memory.compute(self.state, command.request_id, *self.content[command.request_id], computed)

    def derive(self, command: Any, events: list[Event]) -> None:
        """From the events alone follows a command that comes to the same events."""
        assert redecide(events, self.state)[1] == events, (command, commands_of(events, self.state))

    def teardown(self) -> None:
        if hasattr(self, "state"):
            target(float(self.state.counters.device_evicted_blocks), label="eviction pressure")
            target(float(self.most_pins), label="pins")

    def pick(self, number: int) -> str:
        keys = sorted(self.content)
        return keys[number % len(keys)]

    def live(self) -> bool:
        return bool(self.content)

    def quiet(self) -> bool:
        """Whether enough was served since the last upheaval: what is lost all the time is never shared, or swapped."""
        return self.names >= self.upheaval + 12

    def upset(self) -> None:
        self.upheaval = self.names

    @rule(prompt=PROMPTS, namespace=NAMESPACES, extra=st.integers(0, 2), limit=st.integers(0, 8))
    def admit(self, prompt: list[Any], namespace: bytes, extra: int, limit: int) -> None:
        """A request comes."""
        self.names += 1
        key = f"r{self.names:05}"
        generation = self.state.generation
        done = self.do(Admit(key, words(prompt), namespace, limit, len(prompt) + extra, records(prompt)))
        if self.oracle is not None:
            expected = self.oracle.admit(key, namespace, prompt, limit, len(prompt) + extra)
            if expected is None:
                assert isinstance(done, OutOfBlocks)
            else:
                assert isinstance(done, list), done
                assert isinstance(done[0], RequestMatched) and done[0].device_blocks == expected[0]
                victims = [block for event in done if isinstance(event, BlocksEvicted) for block in event.blocks]
                assert victims == expected[2]
        if isinstance(done, list):
            self.content[key] = (namespace, generation), prompt
            self.compare_tables(key)

    @precondition(lambda self: self.oracle is None)
    @rule(prompt=PROMPTS, namespace=NAMESPACES, kept=st.integers(0, 9))
    def admit_carefully(self, prompt: list[Any], namespace: bytes, kept: int) -> None:
        """Some blocks have to stay for those that run."""
        self.names += 1
        key = f"r{self.names:05}"
        generation = self.state.generation
        available = len(self.state.device.pool.free) + self.state.device.evictable
        done = self.do(Admit(key, words(prompt), namespace, 99, len(prompt), records(prompt), kept))
        if isinstance(done, list):
            self.content[key] = (namespace, generation), prompt
            assert isinstance(done[0], RequestMatched)
            found = done[0].device_blocks + done[0].host_blocks
            assert self.state.opened.chunked_multimodal or uncut(prompt, found) == found
            left = len(self.state.device.pool.free) + self.state.device.evictable
            left += sum(len(transfer.held_in(0)) for transfer in self.state.transfers.values())
            assert len(self.state.requests) == 1 or left >= kept
        else:
            assert available < len(prompt) + kept or self.state.transfers

    @rule(prompt=PROMPTS, namespace=NAMESPACES)
    def match(self, prompt: list[Any], namespace: bytes) -> None:
        if self.oracle is not None:
            return  # an admission for no more blocks than match
        self.names += 1
        key = f"r{self.names:05}"
        generation = self.state.generation
        if isinstance(self.do(Match(key, words(prompt), namespace, 99, records(prompt))), list):
            self.content[key] = (namespace, generation), prompt

    @rule(requests=REQUESTS)
    def serve(self, requests: list[tuple[list[Any], bytes, int, str]]) -> None:
        """What an engine does most: whole requests, some of which go on running. Other rules come in between."""
        for prompt, namespace, extra, end in requests:
            self.admit(prompt, namespace, extra, len(prompt))
            key = f"r{self.names:05}"
            if key not in self.content:
                if self.content:  # no room: the oldest one gives way
                    self.release_named(min(self.content), False, ReleaseReason.PREEMPTED)
                continue
            if end == "admitted" or not self.settled(key):
                continue
            self.cache(sorted(self.content).index(key), len(prompt), [])
            if self.state.policy == HostPolicy.WRITE_THROUGH:
                self.do(Backup(self.state.requests[self.state.numbers[key]].leaf.id))
            if end in ("finished", "final"):
                self.release_named(key, end == "final", ReleaseReason.FINISHED)

    @rule(prompt=PROMPTS, limits=st.lists(st.integers(0, 7), min_size=2, max_size=3), ahead=st.integers(0, 2))
    def compute_the_same(self, prompt: list[Any], limits: list[int], ahead: int) -> None:
        """Requests with one prompt run at the same time, and each computes what it did not find when it came."""
        first = self.names + 1
        for limit in limits:
            self.admit(prompt, b"", 0, limit)
        for name in range(first, self.names + 1):
            key = f"r{name:05}"
            if key in self.content and self.settled(key):
                number = sorted(self.content).index(key)
                if ahead:
                    self.mark_computed(number, self.state.requests[self.state.numbers[key]].leaf.end)
                self.cache(number, len(prompt), [], max(ahead, 1))

    @rule(requests=REQUESTS, number=KEYS)
    def serve_while_a_worker_copies(self, requests: list[tuple[list[Any], bytes, int, str]], number: int) -> None:
        self.serve(requests)
        ids = sorted(self.memory.todo)
        if ids:
            self.memory.copy(ids[number % len(ids)])

    def settled(self, key: str) -> bool:
        """Let the copies end that a request waits for; whether it waits for nothing now."""
        waits = self.state.requests[self.state.numbers[key]].waits_for
        for id in sorted(waits):
            while id in self.memory.todo:
                self.memory.copy(id)
            self.do(FinishTransfer(id, Outcome.DONE, len(self.state.transfers[id].targets)))
        return not waits

    @precondition(live)
    @rule(numbers=st.lists(KEYS, min_size=1, max_size=3, unique=True), count=st.integers(1, 2))
    def allocate(self, numbers: list[int], count: int) -> None:
        keys = list(dict.fromkeys(self.pick(number) for number in numbers))
        done = self.do(Allocate(keys, [count] * len(keys)))
        if self.oracle is not None and isinstance(done, list):
            granted, evicted = self.oracle.grant(count * len(keys))
            for index, key in enumerate(keys):
                self.oracle.live[key].table += granted[index * count : (index + 1) * count]
            assert [b for event in done if isinstance(event, BlocksEvicted) for b in event.blocks] == evicted
        elif self.oracle is not None:
            assert count * len(keys) > len(self.oracle.free) + len(self.oracle.final) + len(self.oracle.lru)

    @precondition(live)
    @rule(
        number=KEYS,
        blocks=st.integers(1, 9),
        generated=st.one_of(st.lists(st.integers(1, 2), max_size=2), ITEM),
        ahead=st.sampled_from([1, 1, 2, 3]),
    )
    def cache(self, number: int, blocks: int, generated: list[Any], ahead: int = 1) -> None:
        """Publish blocks; a request that caches ahead has not computed the last ones (``ahead``) yet."""
        key = self.pick(number)
        request = self.state.requests[self.state.numbers[key]]
        root, content = self.content[key]
        images = records(generated, len(content))
        content = content + generated
        blocks = min(blocks, len(content), len(request.table))
        start = request.leaf.end
        if blocks < start or request.waits_for:
            return  # an engine does not write what it may not write yet
        computed = None if request.computed == ALL else max(request.computed, blocks - ahead)
        for position in range(start, blocks if computed is None else min(blocks, computed)):
            self.memory.write(request.table[position], (root, *content[: position + 1]))
        if isinstance(self.do(Cache(key, blocks, words(generated).tobytes(), computed, images)), list):
            path = self.state.path(request.leaf)
            ahead = {block for node in path if node.uncomputed and node.device for block in node.device.ids}
            for position in range(start, blocks):
                if request.table[position] not in ahead:  # its own copy of what another one has computed
                    self.memory.write(request.table[position], (root, *content[: position + 1]))
            if blocks > 0 or generated:
                self.content[key] = root, content
            if self.oracle is not None:
                self.oracle.cache(key, blocks, generated)

    @precondition(live)
    @rule(number=KEYS, blocks=st.integers(0, 9))
    def mark_computed(self, number: int, blocks: int) -> None:
        """From here on this request caches ahead of its steps; what is covered has been computed."""
        key = self.pick(number)
        request = self.state.requests[self.state.numbers[key]]
        backwards = request.computed != ALL and blocks < request.computed
        assert isinstance(self.do(Cache(key, request.leaf.end, b"", blocks)), list) != backwards

    @precondition(live)
    @rule(number=KEYS, limit=st.integers(0, 9))
    def extend(self, number: int, limit: int) -> None:
        """Between two chunks."""
        key = self.pick(number)
        request = self.state.requests[self.state.numbers[key]]
        end, waits = request.leaf.end, bool(request.waits_for)
        done = self.do(Extend(key, limit))
        if request.leaf.end > end and not self.state.opened.chunked_multimodal:
            assert uncut(self.content[key][1], request.leaf.end) == request.leaf.end
        assert isinstance(done, list) != waits
        bad = request.leaf.distrusted
        assert waits or (request.leaf.end == end if bad else not request.duplicate_ranges and request.leaf.end >= end)
        if self.oracle is not None:
            self.oracle.extend(key, limit)
            self.compare_tables(key)

    @precondition(lambda self: self.content and self.quiet())
    @rule(number=KEYS, blocks=st.integers(0, 6), drop=st.booleans())
    def distrust(self, number: int, blocks: int, drop: bool) -> None:
        """A request's KV turned out bad: whoever reads it goes on, and nobody finds it again."""
        key = self.pick(number)
        request = self.state.requests[self.state.numbers[key]]
        end = request.leaf.end
        tables = {id: list(each.table) for id, each in self.state.requests.items()}
        prompt = [*self.content[key][1], 9]
        done = self.do(Distrust(key, blocks))
        assert isinstance(done, list) and tables == {id: list(each.table) for id, each in self.state.requests.items()}
        namespace, generation = self.content[key][0]
        assert blocks >= end or request.leaf.distrusted
        if done and generation == self.state.generation:
            assert sum(peek(self.state, words(prompt), namespace, 99, records(prompt))) <= blocks
        if self.oracle is not None:
            self.oracle.distrust(key, blocks)
        for tier in (Tier.HOST, Tier.DEVICE) if drop else ():
            victims = self.do(Evict(tier, 99, distrusted=True))
            assert isinstance(victims, list)
            if self.oracle is not None and tier == Tier.DEVICE:
                expected = self.oracle.evict_distrusted()
                assert [b for e in victims if isinstance(e, BlocksEvicted) for b in e.blocks] == expected

    @precondition(live)
    @rule(number=KEYS, first=st.integers(0, 3))
    def give_back(self, number: int, first: int) -> None:
        key = self.pick(number)
        request = self.state.requests[self.state.numbers[key]]
        blocks = request.table[request.leaf.end :][first::2]
        done = self.do(GiveBack(key, blocks))
        assert isinstance(done, list) or request.waits_for
        if isinstance(done, list) and self.oracle is not None:
            self.oracle.give_back(key, list(blocks))

    @precondition(live)
    @rule(number=KEYS)
    def back_up(self, number: int) -> None:
        before = {id: node.hits for id, node in self.state.nodes.items() if node.host is None}
        request = self.state.requests[self.state.numbers[self.pick(number)]]
        done = self.do(Backup(request.leaf.id))
        assert isinstance(done, list)
        for event in done:
            if isinstance(event, TransferStarted) and self.state.opened.backup_after > 1:
                assert all(before[id] >= self.state.opened.backup_after for id in event.nodes)

    @rule(blocks=st.integers(0, 6))
    def make_room(self, blocks: int) -> None:
        free, evictable = len(self.state.device.pool.free), self.state.device.evictable
        done = self.do(MakeRoom(blocks))
        assert isinstance(done, list)
        held = sum(len(transfer.held_in(0)) for transfer in self.state.transfers.values())
        assert not done or len(self.state.device.pool.free) + held >= free + min(blocks, evictable)
        if self.oracle is not None:
            self.oracle.evict(min(blocks, evictable))

    @precondition(lambda self: self.state.nodes and self.oracle is None)
    @rule(number=KEYS)
    def forget(self, number: int) -> None:
        ids = sorted(self.state.nodes)
        id = ids[number % len(ids)]
        node = self.state.nodes[id]
        gone = not node.pins and not node.children and node.transfer is None
        assert isinstance(self.do(Forget(id)), list)
        assert (id not in self.state.nodes) == gone

    @rule(blocks=st.integers(1, 14))
    def can_allocate_tells_the_truth(self, blocks: int) -> None:
        self.names += 1
        try:
            decide(self.state, Admit("probe", words([9] * blocks), b"probe", 0, blocks))
            fits = True
        except OutOfBlocks:
            fits = False
        assert can_allocate(self.state, blocks) == fits

    @precondition(live)
    @rule(blocks=st.integers(1, 14))
    def preempt(self, blocks: int) -> None:
        """The last requests give way, as few of them as possible."""
        candidates = sorted(self.content, reverse=True)
        available = len(self.state.device.pool.free) + self.state.device.evictable
        try:
            chosen = victims_for(self.state, blocks, candidates)
        except OutOfBlocks:
            return
        assert not chosen or not can_allocate(self.state, blocks)
        for key in chosen:
            self.release_named(key, False, ReleaseReason.PREEMPTED)
        left = len(self.state.device.pool.free) + self.state.device.evictable
        held = sum(len(transfer.held_in(0)) for transfer in self.state.transfers.values())
        assert left + held >= min(blocks, available + blocks)

    @precondition(live)
    @rule(number=KEYS, blocks=st.integers(0, 8))
    def trim(self, number: int, blocks: int) -> None:
        key = self.pick(number)
        if isinstance(self.do(Trim(key, blocks)), list) and self.oracle is not None:
            self.oracle.trim(key, blocks)

    @precondition(lambda self: len(self.content) > 1)
    @rule(first=KEYS, second=KEYS, count=st.integers(1, 2))
    def reassign(self, first: int, second: int, count: int) -> None:
        key, other = self.pick(first), self.pick(second)
        request = self.state.requests[self.state.numbers[key]]
        blocks = request.table[request.leaf.end :][:count]
        done = self.do(Reassign(key, other, array("i", blocks)))
        if isinstance(done, list) and self.oracle is not None:
            self.oracle.reassign(key, other, list(blocks))

    @precondition(live)
    @rule(number=KEYS, final=st.booleans(), reason=st.sampled_from(ReleaseReason))
    def release(self, number: int, final: bool, reason: ReleaseReason) -> None:
        self.release_named(self.pick(number), final, reason)

    def release_named(self, key: str, final: bool, reason: ReleaseReason) -> None:
        assert isinstance(self.do(Release(key, reason, final)), list)
        del self.content[key]
        if self.oracle is not None:
            self.oracle.release(key, final)

    @rule(tier=st.sampled_from(Tier), blocks=st.integers(1, 4))
    def evict(self, tier: Tier, blocks: int) -> None:
        done = self.do(Evict(tier, blocks))
        assert isinstance(done, list)
        count = sum(len(event.blocks) for event in done if isinstance(event, BlocksEvicted))
        assert count <= blocks and (count == blocks or not self.do(Evict(tier, blocks))), "more could go"
        if self.oracle is not None and tier == Tier.DEVICE:
            assert [b for e in done if isinstance(e, BlocksEvicted) for b in e.blocks] == self.oracle.evict(blocks)

    @rule(tier=st.sampled_from(Tier), blocks=st.integers(1, 9), namespace=st.sampled_from([b"", b"salt", b"unknown"]))
    def evict_of_a_namespace(self, tier: Tier, blocks: int, namespace: bytes) -> None:
        root = self.state.roots.get(namespace)
        others = {id for id, node in self.state.nodes.items() if root_of(node) is not root}
        done = self.do(Evict(tier, blocks, namespace))
        assert isinstance(done, list) and others <= self.state.nodes.keys()
        if self.oracle is not None and tier == Tier.DEVICE:
            expected = self.oracle.evict_tree(self.oracle.root(namespace), blocks)
            assert [b for e in done if isinstance(e, BlocksEvicted) for b in e.blocks] == expected

    @rule(weights=st.sampled_from(["", "v2"]))
    def load_weights(self, weights: str) -> None:
        """Whether old blocks match is up to the namespaces."""
        assert isinstance(self.do(LoadWeights(weights)), list) and self.state.weights == weights

    @precondition(quiet)
    @rule(force=st.booleans())
    def clear(self, force: bool) -> None:
        self.upset()
        if isinstance(self.do(Clear(force)), list):
            while self.do(Evict(Tier.HOST, 1 << 16)):
                pass
            while self.do(Evict(Tier.DEVICE, 1 << 16)):
                pass
            if self.oracle is not None:
                self.oracle.clear()

    @precondition(lambda self: self.memory.todo)
    @rule(number=KEYS)
    def copy(self, number: int) -> None:
        """A worker gets around to one of its transfers."""
        ids = sorted(self.memory.todo)
        self.memory.copy(ids[number % len(ids)])

    @precondition(lambda self: self.state.transfers)
    @rule(number=KEYS, outcome=st.sampled_from([*[Outcome.DONE] * 4, *Outcome]), valid=st.integers(0, 8))
    def finish(self, number: int, outcome: Outcome, valid: int) -> None:
        ids = sorted(self.state.transfers)
        transfer = self.state.transfers[ids[number % len(ids)]]
        if transfer.quarantined or outcome != Outcome.TIMED_OUT:
            while transfer.id in self.memory.todo:  # it has ended: the worker did, or will never do, its copies
                self.memory.copy(transfer.id)
        if transfer.quarantined:
            self.do(EndQuarantine(transfer.id))
            return
        total = len(transfer.targets)
        if outcome == Outcome.CORRUPT and transfer.direction != Direction.SWAP_IN:
            outcome = Outcome.FAILED
        valid = total if outcome == Outcome.DONE else min(valid, total - 1) if outcome != Outcome.TIMED_OUT else 0
        waiters = [self.state.requests[id].request_id for id in transfer.waiters]
        done = self.do(FinishTransfer(transfer.id, outcome, valid))
        if isinstance(done, list):
            assert any(isinstance(event, TransferFinished) for event in done)
            for key in waiters:
                assert transfer.id not in self.state.requests[self.state.numbers[key]].waits_for

    @precondition(lambda self: self.oracle is None and self.quiet())
    @rule(tier=st.sampled_from(Tier), blocks=st.integers(4, 14))
    def resize(self, tier: Tier, blocks: int) -> None:
        self.upset()
        if tier == Tier.DEVICE or self.state.policy != HostPolicy.OFF:
            self.do(Resize(tier, blocks))

    def poison(self) -> None:
        """The engine died before the blocks were written that only live requests have cached."""
        suspects = untrusted(self.state)

        def trusted_below(node: Node) -> bool:
            return any(child not in suspects or trusted_below(child) for child in node.children.values())

        replaced = {
            node
            for request in self.state.requests.values()
            for node in self.state.path(request.leaf)
            if any(start <= node.start < stop for start, stop in request.replaced_ranges)
        }
        for node in suspects:
            if node in replaced or not trusted_below(node):
                assert node.device is not None and node.device.ready
                for block in node.device.ids:
                    self.memory.write(block, ("never written",))

    @precondition(quiet)
    @rule()
    def restart(self) -> None:
        self.upset()
        self.poison()
        done = self.do(StartEpoch(self.state.epoch + 1, len(self.tail)))
        assert isinstance(done, list) and not self.state.requests
        self.content.clear()
        if self.oracle is not None:
            evictions = [event for event in done if isinstance(event, BlocksEvicted)]
            assert all(event.reason == EvictReason.UNTRUSTED for event in evictions)
            assert [block for event in evictions for block in event.blocks] == self.oracle.restart()

    def end_everything(self, requests: bool) -> None:
        if requests:
            self.restart()
        for id in list(self.state.transfers):
            self.memory.todo.pop(id, None)  # the workers were stopped first
            if self.state.transfers[id].quarantined:
                self.do(EndQuarantine(id))
            else:
                self.do(FinishTransfer(id, Outcome.FAILED, 0))
        assert not self.state.transfers

    @precondition(lambda self: self.oracle is None and self.quiet())
    @rule(again=st.booleans())
    def lose_the_host_tier(self, again: bool) -> None:
        self.upset()
        self.end_everything(requests=False)
        assert isinstance(self.do(LoseTier(Tier.HOST, "gone", "new" if again else "")), list)
        assert not self.state.host.resident and len(self.state.host.pool.free) == self.state.host.pool.capacity
        self.memory.host.clear()
        if not again:
            assert self.state.policy == HostPolicy.OFF

    @precondition(lambda self: self.oracle is None and self.quiet())
    @rule()
    def lose_the_device_tier(self) -> None:
        self.upset()
        self.end_everything(requests=True)
        assert isinstance(self.do(LoseTier(Tier.DEVICE, "gone", "new")), list)
        assert len(self.state.device.pool.free) == self.state.device.pool.capacity and not self.state.device.evictable
        self.memory.device.clear()

    @rule()
    def take_snapshot(self) -> None:
        self.snapshot = snapshot(self.state)
        self.tail = []

    @rule()
    def snapshot_and_tail_equal_replay(self) -> None:
        other = restore(self.snapshot)
        for event in self.tail:
            apply(other, event)
        assert state_digest(other) == state_digest(self.state)
        assert snapshot(other) == snapshot(self.state)

    @invariant()
    def blocks_hold_their_tokens(self) -> None:
        """A request that waits for nothing finds the KV of its own tokens, in token order."""
        for key, (root, content) in self.content.items():
            request = self.state.requests[self.state.numbers[key]]
            if not request.waits_for and not any(node.uncomputed for node in self.state.path(request.leaf)):
                wrong = self.memory.wrong(self.state, key, root, content)
                assert not wrong, wrong

    @invariant()
    def a_duplicate_costs_its_own_blocks_only(self) -> None:
        """DESIGN.md §9: of what requests hold, every block stands in one of their tables."""
        used = {block for request in self.state.requests.values() for block in request.table}
        held = {node for request in self.state.requests.values() for node in self.state.path(request.leaf)}
        for node in held:
            if node.device is not None and node.device.ready:
                assert used.issuperset(node.device.ids), f"{node} is held, and nobody uses its copy"

    @invariant()
    def eviction_takes_leaves(self) -> None:
        """DESIGN.md §4, fact 1: in the order of eviction every descendant stands before its ancestors."""
        place = {node: i for i, node in enumerate([*self.state.device.final, *self.state.device.lru])}
        for node, index in place.items():
            assert all(place.get(child, -1) < index for child in node.children.values() if child.device is not None)

    def compare_tables(self, key: str) -> None:
        if self.oracle is not None:
            table = self.state.requests[self.state.numbers[key]].table
            assert list(table) == self.oracle.live[key].table

    @invariant()
    def agrees_with_the_oracle(self) -> None:
        if self.oracle is not None:
            for key in self.content:
                self.compare_tables(key)
            assert list(self.state.device.pool.free) == self.oracle.free
            cached = [block for node in self.state.nodes.values() if node.device for block in node.device.ids]
            assert sorted(cached) == sorted(self.oracle.block.values())


class OneTierMachine(Machine):
    @initialize(device=st.integers(4, 14), chunked=st.booleans())
    def start(self, device: int, chunked: bool = True) -> None:
        self.open(device, 0, 0, HostPolicy.OFF, chunked)
        self.oracle = OneTier(device) if chunked else OneTier(device, uncut)


class ExclusiveMachine(Machine):
    @initialize(device=st.integers(4, 12), host=st.integers(2, 12), staging=st.integers(0, 6), chunked=st.booleans())
    def start(self, device: int, host: int, staging: int, chunked: bool = True) -> None:
        self.open(device, host, staging, HostPolicy.EXCLUSIVE, chunked)


class WriteThroughMachine(Machine):
    @initialize(
        device=st.integers(4, 12),
        host=st.integers(2, 12),
        staging=st.integers(0, 6),
        backup_after=st.integers(1, 3),
        chunked=st.booleans(),
    )
    def start(self, device: int, host: int, staging: int, backup_after: int, chunked: bool = True) -> None:
        self.open(device, host, staging, HostPolicy.WRITE_THROUGH, chunked, backup_after)


@pytest.mark.hypothesis
@pytest.mark.parametrize("machine", [OneTierMachine, ExclusiveMachine, WriteThroughMachine])
def test_machine(machine: type[Machine]) -> None:
    case = machine.TestCase
    case.settings = settings.default
    case("runTest").runTest()


def test_what_was_cached_ahead_is_written_before_a_later_call_says_so() -> None:
    """Found by a stranger's run: the second ``cache`` covered what the first one had cached ahead, unwritten."""
    machine = OneTierMachine()
    machine.start(device=8)
    machine.admit(prompt=[1, 1, 2, 2], namespace=b"", extra=0, limit=0)
    machine.mark_computed(number=0, blocks=0)
    machine.cache(number=0, blocks=3, generated=[])
    machine.cache(number=0, blocks=4, generated=[])
    machine.admit(prompt=[1, 1], namespace=b"", extra=0, limit=8)
    assert machine.state.requests[2].leaf.end == 2, "the other request hits what was cached ahead"
    machine.blocks_hold_their_tokens()


def test_a_run_that_is_computed_in_part_is_not_computed() -> None:
    machine = OneTierMachine()
    machine.start(device=8)
    machine.admit(prompt=[1, 1, 2, 2], namespace=b"", extra=0, limit=0)
    machine.mark_computed(number=0, blocks=0)
    machine.cache(number=0, blocks=3, generated=[], ahead=3)
    for blocks in (1, 2, 3):  # what the engine has not written may nobody take for written
        machine.mark_computed(number=0, blocks=blocks)
        machine.blocks_hold_their_tokens()
        assert machine.state.requests[1].leaf.uncomputed == (blocks < 3)


def test_a_restored_state_clears_like_the_original() -> None:
    """Found by a campaign: cleared trees were kept in the order in which their namespaces had appeared."""
    state = genesis(LedgerOpened(1, 4, 0, 0, HostPolicy.OFF, 1, "", ""))
    for key, namespace in (("a", b"salt"), ("b", b"")):
        for event in decide(state, Match(key, words([1]), namespace, 1)):
            apply(state, event)
    other = restore(snapshot(state))
    for each in (state, other):
        for event in decide(each, Clear(True)):
            apply(each, event)
    assert state_digest(state) == state_digest(other)


def test_a_restored_state_deletes_like_the_original() -> None:
    """Found by a campaign: what was below a run went on the free list in the order in which it had got there."""
    state = genesis(LedgerOpened(1, 16, 16, 0, HostPolicy.EXCLUSIVE, 1, "", ""))

    def do(command: Any, *states: State) -> None:
        events = decide(state, command)
        for each in states or (state,):
            for event in events:
                apply(each, event)

    for number, prompt in enumerate(([1, 2, 3, 5], [1, 2, 4], [1, 2, 3, 6])):  # the first one is cut twice
        key = str(number)
        do(Admit(key, words(prompt), b"", len(prompt), len(prompt)))
        do(Cache(key, len(prompt), b""))
        do(Release(key, ReleaseReason.FINISHED, False))
    top = next(node for node in state.nodes.values() if not node.start)
    assert [child.id for child in top.children.values()] != sorted(child.id for child in top.children.values())
    children = {child.id for child in top.children.values()}
    for blocks, outcome in (
        (sum(node.size for node in state.nodes.values()) - top.size, Outcome.DONE),
        (1, Outcome.FAILED),
    ):
        do(MakeRoom(blocks))
        other = restore(snapshot(state))
        transfer = state.transfers[state.next_transfer - 1]
        valid = len(transfer.targets) if outcome == Outcome.DONE else 0
        do(FinishTransfer(transfer.id, outcome, valid), state, other)
        assert state_digest(state) == state_digest(other)
    assert not state.nodes.keys() & children, "they went with it"


def test_forgetting_is_derived_from_the_deepest_run() -> None:
    """Its copy is on the device alone, so the first event of the transaction does not name it."""
    state = genesis(LedgerOpened(1, 8, 8, 0, HostPolicy.WRITE_THROUGH, 1, "", ""))

    def do(command: Any) -> list[Event]:
        events = decide(state, command)
        assert redecide(events, state)[1] == events
        for event in events:
            apply(state, event)
        return events

    for key, prompt in (("a", [1, 2]), ("b", [1, 2, 3])):
        do(Admit(key, words(prompt), b"", 99, len(prompt)))
        do(Cache(key, len(prompt), b""))
        if key == "a":
            do(Backup(state.requests[1].leaf.id))
            do(FinishTransfer(1, Outcome.DONE, 2))
        do(Release(key, ReleaseReason.FINISHED, False))
    deepest = max(state.nodes.values(), key=lambda node: node.start)
    assert len(do(Forget(deepest.id))) == 2 and not state.nodes


@pytest.mark.parametrize("count", [0, 1, 399, 400, 999, 1000])
def test_many_ids_are_turned_round_as_few_are(count: int) -> None:
    ids = array("i", [id * 7919 % 10007 for id in range(1000)])
    assert from_end(ids, count) == array("i", list(reversed(ids))[:count])


@pytest.mark.parametrize("direction", [Direction.SWAP_OUT, Direction.SWAP_IN])
def test_what_a_late_copy_may_still_write_stays_quarantined(direction: Direction) -> None:
    state = genesis(LedgerOpened(1, 5, 4, 4, HostPolicy.EXCLUSIVE, 1, "", ""))

    def do(command: Any) -> set[int]:
        """Targets of the copies that it orders."""
        events = decide(state, command)
        for event in events:
            apply(state, event)
        return {block for event in events if isinstance(event, TransferStarted) for block in event.targets}

    do(Admit("a", words([1, 2, 3, 4]), b"", 0, 4))
    do(Cache("a", 4, b""))
    do(Release("a", ReleaseReason.FINISHED, False))
    written = do(Admit("b", words([7, 8, 9]), b"", 0, 3))
    pool = state.host.pool
    if direction == Direction.SWAP_IN:
        do(FinishTransfer(1, Outcome.DONE, 2))
        do(Release("b", ReleaseReason.FINISHED, False))
        written = do(Admit("c", words([1, 2, 3, 4]), b"", 4, 4))
        pool = state.device.pool
    (transfer,) = state.transfers
    do(FinishTransfer(transfer, Outcome.TIMED_OUT, 0))
    assert len(written) == 2 and not written & set(pool.free)
    do(EndQuarantine(transfer))
    assert written <= set(pool.free) and not check(state)


def test_a_new_epoch_gives_up_copies_of_untrusted_blocks() -> None:
    """The dead engine's request had cached them; they may never have been written, and the copy has read them."""
    state = genesis(LedgerOpened(1, 4, 4, 2, HostPolicy.WRITE_THROUGH, 1, "", ""))
    commands = [Admit("a", words([1, 2]), b"", 0, 2), Cache("a", 2, b""), Backup(1), StartEpoch(2, 9)]
    for command in commands:
        events = decide(state, command)
        for event in events:
            apply(state, event)
    ended = [event for event in events if isinstance(event, TransferFinished)]
    assert [(event.transfer, event.outcome, event.valid) for event in ended] == [(1, Outcome.TIMED_OUT, 0)]
    assert state.transfers[1].quarantined and not state.nodes and not check(state)
    for event in decide(state, EndQuarantine(1)):
        apply(state, event)
    assert len(state.device.pool.free) == 4 and len(state.host.pool.free) == 6
