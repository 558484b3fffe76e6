"""Layer groups: Hypothesis drives requests through windows, chunks, states, scratch and static blocks.

Every token is computed on a naive memory: it reads what its layers see, and finds there what its request has written.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.check.incremental import IncrementalCheck
from statemachine.commands import Admit, Allocate, Cache, Extend, Match, Reassign, Release, Settle, StartEpoch, Trim
from statemachine.decide import can_allocate, decide, victims_for
from statemachine.decide.derive import commands_of, redecide
from statemachine.errors import CommandRejected, InvalidCommand, InvariantViolation, OutOfBlocks
from statemachine.events import (
    AllocationRefused,
    Event,
    HostPolicy,
    LedgerOpened,
    ReleaseReason,
    RequestMatched,
    SideAllocated,
    SideFreed,
    Tier,
    WindowPassed,
    blocks,
)
from statemachine.records import codec
from statemachine.records.snapshot import restore, snapshot, state_digest
from statemachine.state.groups import Group, Kind, impossible_groups
from statemachine.state.state import State

SIZE = 2
TOKENS = st.one_of(
    st.integers(1, 20).map(lambda length: [1] * length),
    st.lists(st.sampled_from([1, 1, 1, 2]), min_size=1, max_size=20),
)
KEYS = st.integers(0, 1 << 16)
WINDOWS = st.builds(
    lambda size, sinks, replay: Group(Kind.WINDOW, "window", 0, size, 0 if replay else sinks, replay),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 2, 5, 7]),
)
CHUNKS = st.builds(lambda size: Group(Kind.CHUNK, "chunk", 0, size), st.integers(1, 8))
OTHERS = st.sampled_from(
    [Group(Kind.STATE, "state", 0, 2), Group(Kind.SCRATCH, "ring", 0, 1), Group(Kind.STATIC, "enc")]
)
GROUPS = st.lists(
    st.one_of(WINDOWS, CHUNKS, CHUNKS, OTHERS), min_size=1, max_size=3, unique_by=lambda group: group.name
)


def words(tokens: list[int]) -> memoryview:
    return memoryview(struct.pack(f"<{len(tokens)}i", *tokens))


def opened(*groups: Group, device: int = 40) -> LedgerOpened:
    text = "\n".join(group.text() for group in groups)
    return LedgerOpened(SIZE, device, 0, 0, HostPolicy.OFF, 0, "", "", groups=text)


def sees(group: Group, token: int, other: int) -> bool:
    """Whether a token attends to an earlier one, or to itself."""
    if group.kind == Kind.WINDOW:
        return other < group.sinks or token - group.size < other <= token
    return other >= token - token % group.size


class Live:
    """A request as its engine knows it."""

    def __init__(self, tokens: list[int], computed: int) -> None:
        self.tokens = tokens
        self.computed = computed


class GroupsMachine(RuleBasedStateMachine):
    """Requests are admitted by chunks, computed token by token, committed, trimmed, released; engines die."""

    state: State

    @initialize(groups=GROUPS, pools=st.lists(st.integers(4, 40), min_size=3, max_size=3), device=st.integers(8, 60))
    def begin(self, groups: list[Group], pools: list[int], device: int) -> None:
        groups = [group._replace(blocks=count) for group, count in zip(groups, pools)]
        first = opened(*groups, device=device)
        self.state, self.mirror = genesis(first), genesis(first)
        self.incremental = IncrementalCheck(self.state)
        self.groups = groups
        self.memory: list[dict[int, dict[int, Any]]] = [{} for _ in groups]
        self.live: dict[str, Live] = {}
        self.names = self.died = 0

    def do(self, command: Any) -> list[Event] | CommandRejected:
        before = state_digest(self.state)
        self.mirror = restore(snapshot(self.mirror))
        try:
            events = decide(self.state, command)
        except CommandRejected as error:
            assert state_digest(self.state) == before
            if isinstance(error, OutOfBlocks) and not (isinstance(command, Admit) and command.must_fit):
                self.derive(command, [error.event])
            return error
        assert decide(self.mirror, command) == events
        if events and not isinstance(command, StartEpoch):
            self.derive(command, events)
        assert state_digest(self.state) == before
        for event in events:
            copied = codec.decode(*codec.encode(event))
            assert copied == event
            apply(self.state, event)
            apply(self.mirror, copied)
            assert not check(self.state), (command, event, check(self.state))
            assert not self.incremental.after(event), (command, event)
            assert state_digest(self.state) == state_digest(self.mirror)
        return events

    def derive(self, command: Any, events: list[Event]) -> None:
        assert redecide(events, self.state)[1] == events, (command, commands_of(events, self.state))

    def request(self, key: str) -> Any:
        return self.state.requests[self.state.numbers[key]]

    def pick(self, number: int) -> str:
        return sorted(self.live)[number % len(self.live)]

    @rule(tokens=TOKENS, chunk=st.integers(1, 20), must_fit=st.booleans(), static=st.integers(0, 3))
    def admit(self, tokens: list[int], chunk: int, must_fit: bool, static: int) -> None:
        self.names += 1
        key = f"r{self.names:05}"
        limit, count = (len(tokens) - 1) // SIZE, -(-len(tokens) // SIZE)
        full = decide(genesis(opened()), Match(key, words(tokens), b"", limit))[0]
        assert isinstance(full, RequestMatched)
        known = self.known(tokens, limit)
        command = Admit(
            key, words(tokens), b"", limit, 0, new_tokens=chunk, must_fit=count * must_fit, static_tokens=static
        )
        free = [len(place.pool.free) for place in self.state.sides]
        done = self.do(command)
        start = self.start(known * SIZE)
        if not start:
            known = 0
        if isinstance(done, OutOfBlocks):
            if done.group:
                assert done.wanted > free[done.group - 1] == done.available
            return
        assert isinstance(done, list) and isinstance(done[0], RequestMatched)
        assert done[0].device_blocks == known
        for group, side, before, place in zip(self.groups, self.request(key).sides, free, self.state.sides):
            given = before - len(place.pool.free)
            if group.windowed:
                assert len(side.table) == len(self.request(key).table)
                assert list(side.table).count(-1) == start // SIZE
            else:
                assert given == len(side.table) == (-(-static // SIZE) if group.kind == Kind.STATIC else group.size)
        self.live[key] = Live(tokens, start)
        for token in range(start, known * SIZE):  # replayed
            self.write(key, token)
        self.live[key].computed = known * SIZE

    def known(self, tokens: list[int], limit: int) -> int:
        """How many leading blocks group 0 has."""
        node, found = self.state.roots.get(b""), 0
        while node is not None and found < limit:
            child = node.children.get(words(tokens[found * SIZE : found * SIZE + SIZE]).tobytes())
            if child is None:
                break
            for at in range(child.size):
                block = bytes(child.words[at * 4 * SIZE : (at + 1) * 4 * SIZE])
                if found == limit or block != words(tokens[found * SIZE : found * SIZE + SIZE]).tobytes():
                    return found
                found += 1
            node = child
        return found

    def start(self, hit: int) -> int:
        """The last token from which on computing again gives every group what it needs."""
        for start in range(hit, 0, -1):
            for group in self.groups:
                if group.kind == Kind.WINDOW and (not group.replay or start > hit - group.replay):
                    break
                if group.kind == Kind.STATE or (group.kind == Kind.CHUNK and start % group.size):
                    break
            else:
                return start
        return 0

    def write(self, key: str, token: int) -> None:
        """Compute a token: what it sees has to be there, unless it is replayed and was never there."""
        for group, side, memory in zip(self.groups, self.request(key).sides, self.memory):
            if not group.windowed:
                continue
            block = side.table[token // SIZE]
            assert block >= 0, (key, token, group)
            memory.setdefault(block, {})[token % SIZE] = (key, token)
            for other in range(side.begin * SIZE + SIZE - 1, token + 1):
                if sees(group, token, other):
                    there = side.table[other // SIZE]
                    assert there >= 0 and memory[there].get(other % SIZE) == (key, other), (key, token, other, group)

    @precondition(lambda self: self.live)
    @rule(number=KEYS, count=st.integers(1, 8), tell=st.booleans())
    def compute(self, number: int, count: int, tell: bool) -> None:
        """Compute tokens as far as there is room, and commit them."""
        key = self.pick(number)
        live, request = self.live[key], self.request(key)
        stop = min(live.computed + count, len(live.tokens), len(request.table) * SIZE)
        for token in range(live.computed, stop):
            self.write(key, token)
        live.computed = max(stop, live.computed)
        if not tell:
            return
        whole = live.computed // SIZE
        missing = (whole - request.leaf.end) * SIZE - len(request.words) // 4
        at = request.leaf.end * SIZE + len(request.words) // 4
        told = words(live.tokens[at : at + missing]).tobytes() if missing > 0 else b""
        assert isinstance(self.do(Cache(key, whole, told)), list)
        assert isinstance(self.do(Settle([key], [live.computed])), list)
        for group, side in zip(self.groups, request.sides):
            if group.windowed:
                ahead = len(request.table) * SIZE - live.computed
                assert len(side.blocks()) <= group.most(ahead, SIZE), "more than the cap"

    @precondition(lambda self: self.live)
    @rule(numbers=st.lists(KEYS, min_size=1, max_size=3), count=st.integers(1, 3))
    def grow(self, numbers: list[int], count: int) -> None:
        keys = list(dict.fromkeys(self.pick(number) for number in numbers))
        free = [len(place.pool.free) for place in self.state.sides]
        done = self.do(Allocate(keys, [count] * len(keys)))
        if isinstance(done, OutOfBlocks):
            windowed = [n for n, group in zip(free, self.groups) if group.windowed]
            assert done.fitting * count <= min([*windowed, 1 << 30])
            assert not done.group or done.available == free[done.group - 1] < count * len(keys)
            if done.fitting:
                assert isinstance(self.do(Allocate(keys[: done.fitting], [count] * done.fitting)), list)

    @precondition(lambda self: self.live)
    @rule(number=KEYS, more=st.lists(st.integers(1, 2), min_size=1, max_size=6))
    def generate(self, number: int, more: list[int]) -> None:
        self.live[self.pick(number)].tokens += more

    @precondition(lambda self: self.live)
    @rule(number=KEYS, count=st.integers(1, 3))
    def trim(self, number: int, count: int) -> None:
        key = self.pick(number)
        request = self.request(key)
        kept = len(request.table) - count
        settled = max([-(-side.settled // SIZE) for side in request.sides])
        done = self.do(Trim(key, max(kept, 0)))
        assert isinstance(done, InvalidCommand) == (max(kept, 0) < max(request.leaf.end, settled))
        if isinstance(done, list):
            self.live[key].computed = min(self.live[key].computed, len(request.table) * SIZE)

    @precondition(lambda self: self.live)
    @rule(number=KEYS)
    def extend(self, number: int) -> None:
        key = self.pick(number)
        end = self.request(key).leaf.end
        assert isinstance(self.do(Extend(key, 99)), list)
        assert self.request(key).leaf.end == end and not self.request(key).duplicate_ranges

    @precondition(lambda self: self.live)
    @rule(number=KEYS, final=st.booleans())
    def release(self, number: int, final: bool) -> None:
        key = self.pick(number)
        assert isinstance(self.do(Release(key, ReleaseReason.FINISHED, final)), list)
        del self.live[key]

    @precondition(lambda self: self.live)
    @rule(number=st.integers(1, 9), group=st.integers(0, 3))
    def preempt(self, number: int, group: int) -> None:
        """Who gives way for blocks of a group."""
        if group > len(self.groups):
            return
        try:
            chosen = victims_for(self.state, number, sorted(self.live), group)
        except OutOfBlocks:
            return
        for key in chosen:
            assert isinstance(self.do(Release(key, ReleaseReason.PREEMPTED, False)), list)
            del self.live[key]
        assert can_allocate(self.state, number, group)

    @precondition(lambda self: self.live and not self.names % 8)
    @rule(number=KEYS)
    def what_knows_no_groups(self, number: int) -> None:
        key = self.pick(number)
        assert isinstance(self.do(Match("other", words([1]), b"", 0)), InvalidCommand)
        assert isinstance(self.do(Reassign(key, "other", blocks())), CommandRejected)

    @rule(
        requests=st.lists(
            st.tuples(TOKENS, st.integers(2, 9), st.lists(st.integers(1, 2), max_size=6), st.booleans()),
            min_size=1,
            max_size=4,
        )
    )
    def serve(self, requests: list[tuple[list[int], int, list[int], bool]]) -> None:
        """What an engine does most: a prompt by chunks, then some tokens more. Other rules come in between."""
        for tokens, chunk, more, ends in requests:
            self.admit(tokens, chunk, False, 1)
            key = f"r{self.names:05}"
            if key not in self.live:
                if self.live:  # no room: the oldest one gives way
                    self.release(0, False)
                continue
            self.live[key].tokens += more
            number = sorted(self.live).index(key)
            while True:
                before = self.live[key].computed
                self.compute(number, chunk, True)
                if self.live[key].computed == before:
                    break
                room = len(self.request(key).table) * SIZE
                if room < len(self.live[key].tokens):
                    self.grow([number], 1)
            if ends:
                self.release(number, False)

    @precondition(lambda self: self.names >= self.died + 8)
    @rule()
    def the_engine_dies(self) -> None:
        self.died = self.names
        assert isinstance(self.do(StartEpoch(self.state.epoch + 1, 0)), list)
        self.live.clear()
        for place in self.state.sides:
            assert len(place.pool.free) == place.pool.capacity


class TestGroups(GroupsMachine.TestCase):  # type: ignore[misc]
    settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def admitted(*groups: Group, tokens: int = 10) -> State:
    """A state with one request that has settled all its tokens."""
    state = genesis(opened(*groups))
    for command in (Admit("a", words([*range(tokens)]), b"", 0, -(-tokens // SIZE)), Settle(["a"], [tokens])):
        for event in decide(state, command):
            apply(state, event)
    return state


NEAR = Group(Kind.WINDOW, "near", 20, 3)
SINKS = Group(Kind.WINDOW, "sinks", 20, 3, 2)
PART = Group(Kind.CHUNK, "part", 20, 4)
RING = Group(Kind.SCRATCH, "ring", 20, 2)


def test_what_each_kind_has_of_ten_tokens() -> None:
    state = admitted(NEAR, SINKS, PART, RING, Group(Kind.STATIC, "enc", 4))
    tables = [list(side.table) for side in state.requests[1].sides]
    assert tables == [[-1, -1, -1, -1, 4], [0, -1, -1, -1, 4], [-1, -1, -1, -1, 4], [0, 1], []]
    assert [len(place.pool.free) for place in state.sides] == [19, 18, 19, 18, 4]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda state, side: side.table.__setitem__(0, 7), "windows: position 0 of layer group 'near'"),
        (lambda state, side: side.table.__setitem__(4, -1), "windows: position 4 of layer group 'near'"),
        (lambda state, side: setattr(side, "settled", 4), "windows: position 1 of layer group 'near'"),
        (lambda state, side: side.table.append(19), "windows: 6 positions of layer group 'near'"),
        (lambda state, side: state.requests[1].sides.pop(), "windows: 'a' knows 1 layer groups"),
        (lambda state, side: state.requests[1].sides[1].table.pop(), "windows: 1 blocks of layer group 'ring'"),
        (lambda state, side: state.requests[1].sides[1].table.__setitem__(0, -1), "windows: a block table of layer"),
        (lambda state, side: state.sides[0].pool.free.pop(), "conservation: DEVICE group 1 block"),
        (lambda state, side: state.sides[1].pool.free.append(0), "conservation: DEVICE group 2 block 0 has 2 owners"),
    ],
)
def test_what_is_broken_is_told(damage: Any, told: str) -> None:
    state = admitted(NEAR, RING)
    incremental = IncrementalCheck(state)
    damage(state, state.requests[1].sides[0])
    assert any(message.startswith(told) for message in check(state)), check(state)
    assert incremental.after(SideFreed(1, 1, 5, blocks()))


@pytest.mark.parametrize(
    "event",
    [
        SideAllocated(0, blocks([1]), blocks([1]), blocks([5])),
        SideAllocated(3, blocks([1]), blocks([1]), blocks([5])),
        SideAllocated(1, blocks([1]), blocks([1]), blocks([4])),
        SideAllocated(2, blocks([1]), blocks([2]), blocks([2])),
        SideAllocated(2, blocks([1]), blocks([1]), blocks([3])),
        SideAllocated(2, blocks([9]), blocks([1]), blocks([2])),
        WindowPassed(1, blocks([1]), blocks([10]), blocks()),
        WindowPassed(1, blocks([1]), blocks([11]), blocks()),
        WindowPassed(2, blocks([1]), blocks([9]), blocks()),
        SideFreed(1, 1, 6, blocks()),
        SideFreed(1, 1, 4, blocks([4])),
        SideFreed(1, 1, 0, blocks([3])),
        SideFreed(9, 1, 0, blocks([4])),
    ],
)
def test_an_event_that_does_not_fit_is_refused(event: Event) -> None:
    state = admitted(NEAR, RING)
    before = state_digest(state)
    with pytest.raises(InvariantViolation):
        apply(state, event)
    assert state_digest(state) == before


def test_a_request_that_ends_has_given_back_what_it_had() -> None:
    state = admitted(NEAR)
    freed, released = decide(state, Release("a", ReleaseReason.FINISHED, False))
    with pytest.raises(InvariantViolation, match="still has DEVICE group 1 blocks"):
        apply(state, released)
    apply(state, freed)
    apply(state, released)
    assert not check(state)


def test_a_hit_that_is_of_no_use_to_a_group_is_none() -> None:
    state = admitted(PART)
    (cached,) = decide(state, Cache("a", 5, b""))
    apply(state, cached)
    event = next(iter(decide(state, Admit("b", words([*range(10)]), b"", 1, 5))))
    assert isinstance(event, RequestMatched) and event.device_blocks == 0
    broken = event._replace(leaf=1, cut=1, upper=2, device_blocks=1)
    with pytest.raises(InvariantViolation, match="a hit of 2 tokens is of no use"):
        apply(state, broken)


def test_a_long_prompt_needs_no_more_of_a_window_than_its_cap() -> None:
    state = genesis(opened(NEAR._replace(blocks=4), device=100))
    long = words([*range(100)])
    with pytest.raises(OutOfBlocks) as refused:
        decide(state, Admit("a", long, b"", 0, 50))
    assert refused.value.group == 1 and refused.value.never_fits and "new_tokens" in str(refused.value)
    assert isinstance(refused.value.event, AllocationRefused)
    tight = genesis(opened(NEAR._replace(blocks=3), device=100))
    with pytest.raises(OutOfBlocks, match="4 blocks of layer group 1 wanted, 3 free"):
        decide(tight, Admit("a", long, b"", 0, 0, new_tokens=4, must_fit=50))
    for event in decide(state, Admit("a", long, b"", 0, 0, new_tokens=4, must_fit=50)):
        apply(state, event)
    for tokens in range(4, 100, 4):
        for command in (Settle(["a"], [tokens]), Allocate(["a"], [2])):
            for event in decide(state, command):
                apply(state, event)
    assert len(state.requests[1].table) == 50 and not check(state)


def test_a_batch_is_told_what_fits_in_every_group() -> None:
    """Too few blocks of group 0 for all, and of a window for even fewer."""
    state = genesis(opened(NEAR._replace(blocks=4), device=8))
    for key in ("a", "b", "c"):
        for event in decide(state, Admit(key, words([1]), b"", 0, 1)):
            apply(state, event)
    with pytest.raises(OutOfBlocks) as refused:
        decide(state, Allocate(["a", "b", "c"], [1, 2, 3]))
    assert refused.value.group == 0 and refused.value.fitting == 1
    assert decide(state, Allocate(["a"], [1]))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("window near 5 3 0", "cannot be read"),
        ("pyramid near 5 3 0 0", "cannot be read"),
        ("full near 5 3 0 0", "not written as they should be"),
        ("window near 5 3 0 0\n", "not written as they should be"),
        ("window near 0 3 0 0", "blocks of layer group 'near'"),
        ("window near 5 0 0 0", "size of layer group 'near'"),
        ("state near 5 6 0 0", "size of layer group 'near'"),
        ("window Near 5 3 0 0", "the name of a layer group"),
        ("window near 5 3 1 1", "does not bring its 1 sinks back"),
        ("window near 5 3 0 0\nchunk near 5 3 0 0", "the same name"),
        ("\n".join(f"scratch n{n} 5 1 0 0" for n in range(16)), "15 layer groups"),
    ],
)
def test_groups_that_cannot_be(text: str, told: str) -> None:
    assert told in impossible_groups(text, 100)
    with pytest.raises(InvariantViolation):
        genesis(opened()._replace(groups=text))
    with pytest.raises(InvariantViolation):
        genesis(opened(NEAR)._replace(host_policy=HostPolicy.EXCLUSIVE, host_blocks=4))


def test_a_snapshot_cannot_claim_pools_that_it_does_not_hold() -> None:
    state = genesis(opened(NEAR._replace(blocks=40)))
    state.opened = opened(NEAR._replace(blocks=1 << 25))
    with pytest.raises(ValueError, match="fewer block ids"):
        restore(snapshot(state))
    assert state.place(Tier.DEVICE, 1) is state.sides[0]
