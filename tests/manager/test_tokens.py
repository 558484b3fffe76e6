"""Engines count tokens: what is known, computed and has room, and that nothing that is not computed ever matches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ipc import LogReader, SharedMemoryFull
from ipc.ownership import remove_objects
from kvledger import (
    Busy,
    CacheConfig,
    CacheManager,
    HostPolicy,
    InvalidCommand,
    InvalidTokens,
    Item,
    OutOfBlocks,
    Paused,
    ReleaseReason,
    RequestNotReady,
    UnknownRequest,
    namespace_key,
)
from statemachine.check import check
from statemachine.events import BlocksReassigned, RequestMatched
from statemachine.records.replay import Replay
from statemachine.records.snapshot import state_digest
from tests.manager.test_engine_api import from_another_thread
from tests.manager.test_manager import replays

BLOCK = 4


@contextmanager
def ledger(**settings: Any) -> Iterator[CacheManager]:
    config = CacheConfig(**{"block_size": BLOCK, "device_blocks": 16, **settings})
    with CacheManager.create(f"tokens-{os.getpid()}", config) as manager:
        yield manager
        assert not check(manager.state) and replays(manager)


def test_a_token_that_was_sampled_and_not_computed_never_matches() -> None:
    """The next turn of a conversation finds what was computed, and not the token that was sampled last."""
    with ledger() as manager:
        manager.admit("a", range(12))
        manager.commit({"a": 12})
        for token in (100, 101, 102, 103):
            manager.append("a", token)
            grown = manager.grow({"a": manager.known("a")})
            assert not (grown.refused or grown.not_ready or grown.gone)
            manager.commit({"a": manager.known("a") - 1})  # the last one is computed by the next step
        assert (manager.known("a"), manager.computed("a"), manager.room("a")) == (16, 15, 16)
        manager.release("a")
        assert manager.peek([*range(12), 100, 101, 102, 103], max_blocks=99) == (3, 0)


def test_what_is_taken_back_never_matches() -> None:
    with ledger() as manager:
        manager.admit("s", range(8))
        manager.commit({"s": 8})
        manager.append("s", [1, 2])
        manager.retract("s", 1)  # the client goes on with something else
        manager.append("s", np.array([7, 8, 9], np.int32))
        manager.grow({"s": 12})
        manager.commit({"s": 12})
        manager.release("s")
        assert manager.peek([*range(8), 1, 7, 8, 9, 0], max_blocks=99) == (3, 0)
        assert manager.peek([*range(8), 1, 2, 7, 8, 9, 0], max_blocks=99) == (2, 0)


def test_only_what_is_not_computed_can_be_taken_back() -> None:
    with ledger() as manager:
        manager.admit("a", range(10))
        manager.commit({"a": 9})
        with pytest.raises(InvalidCommand, match="only the last 1 tokens"):
            manager.retract("a", 2)
        manager.retract("a", 1)
        assert manager.known("a") == 9
        manager.append("a", [5])
        with pytest.raises(InvalidCommand, match="only the last 1 tokens"):
            manager.retract("a", 2)
        manager.admit("b", [*range(500, 510)])
        with pytest.raises(InvalidCommand, match="admit it again"):
            manager.retract("b", 3)
        with pytest.raises(UnknownRequest):
            manager.retract("c", 1)


def test_steps_that_cross_no_border_are_not_in_the_log() -> None:
    with ledger() as manager:
        for number in range(4):
            manager.admit(f"r{number}", range(9))
            manager.commit({f"r{number}": 9})
        before = manager.next_sequence
        for step in range(3):
            with manager.step(step):
                manager.commit({f"r{number}": 9 + step for number in range(4)})
                for number in range(4):
                    manager.append(f"r{number}", 7)
                grown = manager.grow({f"r{number}": 10 + step for number in range(4)})
                assert grown == ({}, [], [], None, [], {})
        assert manager.next_sequence == before


def test_growth_answers_for_each_request() -> None:
    with ledger(device_blocks=8) as manager:
        for number in range(3):
            manager.admit(f"r{number}", range(8 * number, 8 * number + 8))
        from_another_thread(lambda: manager.release("r0"))
        manager.admit("r3", [9])
        before = {key: manager.block_table(key).tolist() for key in ("r1", "r2", "r3")}
        grown = manager.grow({"r1": 12, "r0": 100, "r2": 20, "r3": 6, "nobody": 1}, lookahead=1)
        assert grown.gone == ["r0", "nobody"] and not grown.not_ready
        assert grown.refused == ["r2", "r3"] and grown.refusal is not None  # nobody overtakes
        assert grown.refusal.request_id == "r2" and not grown.refusal.never_fits
        assert list(grown.new_blocks) == ["r1"] and manager.room("r1") >= 13
        assert manager.block_table("r1").tolist() == before["r1"] + grown.new_blocks["r1"].tolist()
        assert manager.block_table("r2").tolist() == before["r2"]
        again = manager.grow({"r1": 12}, lookahead=1)
        assert not again.new_blocks
        manager.release("r1")
        assert not manager.grow({"r2": 20, "r3": 6}, lookahead=1).refused
        assert manager.grow({"r2": 100}).refusal.never_fits  # type: ignore[union-attr]


def test_growth_says_who_is_not_ready() -> None:
    settings = {"host_blocks": 16, "host_policy": HostPolicy.EXCLUSIVE, "ranks": 1, "block_bytes": 64}
    with ledger(**settings) as manager:
        manager.admit("old", range(56))
        manager.commit({"old": 56})
        manager.release("old")
        manager.admit("r", [1, 2])
        grown = manager.grow({"r": 40})
        assert grown.not_ready == ["r"] and len(grown.new_blocks["r"]) == 9
        assert manager.grow({"r": 3}).not_ready == ["r"]
        manager.append("r", range(38))
        with pytest.raises(RequestNotReady):
            manager.commit({"r": 40})
        manager.wait("r")
        assert not manager.grow({"r": 40}).not_ready
        manager.commit({"r": 40})
        manager.release("r")


def test_a_wrong_commit_changes_nothing_for_anybody() -> None:
    with ledger() as manager:
        manager.admit("a", range(8), new_tokens=4)
        manager.admit("b", range(100, 108))
        manager.commit({"b": 5})
        before = manager.digest()
        for wrong, words in (
            ({"b": 8, "a": 8}, "grow first"),
            ({"b": 8, "a": 9}, "append first"),
            ({"a": 4, "b": 4}, "computed already"),
            ({"a": 4, "b": -1}, "whole number"),
            ({"a": 4, "b": "x"}, "whole number"),
            (["a"], "mapping"),
        ):
            with pytest.raises(InvalidCommand, match=words):
                manager.commit(wrong)  # type: ignore[arg-type]
        assert manager.digest() == before
        assert (manager.computed("a"), manager.computed("b")) == (0, 5)
        assert manager.commit({"a": 4, "gone": 7, "b": 8}) == ["gone"]
        assert (manager.computed("a"), manager.computed("b")) == (4, 8)
        for wrong_tokens in ([-1], 1 << 31, -1, ["x"], 1.5):
            with pytest.raises(InvalidTokens):
                manager.append("a", wrong_tokens)
        for wrong_growth in (["a"], {"a": -1}, {"a": 1.5}):
            with pytest.raises(InvalidCommand):
                manager.grow(wrong_growth)  # type: ignore[arg-type]


def test_a_commit_that_finds_no_room_in_the_log_is_made_again() -> None:
    with ledger() as manager:
        manager.admit("a", range(8))
        manager.admit("b", range(100, 108))
        with pytest.MonkeyPatch.context() as patch:
            real, calls = manager._writer.reserve, []

            def reserve(size: int, *, giving_back: bool = False) -> None:
                calls.append(size)
                if len(calls) > 1:
                    raise SharedMemoryFull("no room, as planned")
                real(size, giving_back=giving_back)

            patch.setattr(manager._writer, "reserve", reserve)
            with pytest.raises(SharedMemoryFull):
                manager.commit({"a": 8, "b": 8})
        assert (manager.computed("a"), manager.computed("b")) == (8, 0) and replays(manager)
        assert manager.commit({"a": 8, "b": 8}) == []
        assert manager.peek(range(100, 109), max_blocks=99) == (2, 0)


def test_an_admission_is_asked_first() -> None:
    with ledger(device_blocks=8, watermark_blocks=1) as manager:
        manager.admit("a", range(16))
        manager.commit({"a": 16})
        before, sequence = manager.digest(), manager.next_sequence
        no = manager.can_admit("b", range(100, 200))
        assert not no and no.refusal is not None and no.refusal.never_fits and no.cached_tokens == 0
        prompt = [*range(12), *range(200, 208)]
        yes = manager.can_admit("b", prompt, new_tokens=4, must_fit=True)
        assert yes and yes.cached_tokens == 12 and yes.refusal is None
        assert not manager.can_admit("b", prompt, reserve=12)
        longer = manager.can_admit("b", [*prompt, *range(300, 320)], new_tokens=4, must_fit=True)
        assert not longer and longer.cached_tokens == 12
        assert manager.digest() == before and manager.next_sequence == sequence
        admission = manager.admit("b", yes)
        assert (admission.cached_tokens, len(admission.block_table)) == (12, 4)
        assert (manager.known("b"), manager.computed("b"), manager.room("b")) == (20, 12, 16)
        with pytest.raises(OutOfBlocks):
            manager.admit("c", no)
        assert manager.admit("d", manager.can_admit("elsewhere", [3])).cached_tokens == 0


def test_what_was_asked_is_asked_again_if_anything_has_happened() -> None:
    with ledger(device_blocks=8) as manager:
        manager.admit("a", range(16))
        manager.commit({"a": 16})
        manager.release("a")
        asked = manager.can_admit("b", range(20))
        manager.clear()
        assert manager.admit("b", asked).cached_tokens == 0 and manager.known("b") == 20
        manager.release("b")
        asked = manager.can_admit("b", range(20))
        manager.pause()
        with pytest.raises(Paused):
            manager.admit("b", asked)
        manager.resume()
        asked = manager.can_admit("b", range(20))
        manager.admit("c", range(20))
        with pytest.raises(OutOfBlocks):
            manager.admit("b", asked)


def test_the_next_turn_of_a_session_brings_images() -> None:
    picture = Item(b"sha-256 of the pixels", 1, 4)
    with ledger(device_blocks=32) as manager:
        manager.admit("s", range(8))
        manager.commit({"s": 8})
        manager.append("s", [50, 0, 0, 0, 0, 51, 52, 53], items=[picture])
        manager.grow({"s": 16})
        manager.commit({"s": 16})
        manager.release("s")
        prompt = [*range(8), 50, 0, 0, 0, 0, 51, 52, 53, 54]
        there = Item(b"sha-256 of the pixels", 9, 4)
        assert manager.peek(prompt, items=[there], max_blocks=99) == (4, 0)
        assert manager.peek(prompt, items=[there._replace(hash=b"of another picture")], max_blocks=99) == (2, 0)
        assert manager.peek(prompt, max_blocks=99) == (2, 0)


def test_a_release_in_two_steps_frees_the_name_at_once_and_the_blocks_later() -> None:
    with ledger(device_blocks=8) as manager:
        manager.admit("a", range(14), new_tokens=20)
        manager.commit({"a": 9})
        held = manager.release("a", ReleaseReason.ABORTED, hold=True)
        assert held and "a" not in manager.state.numbers and manager.available_blocks() == 8 - 3
        assert manager.admit("a", range(8), max_blocks=2).cached_tokens == 8  # the same name again
        assert manager.grow({"a": 28}).refused == ["a"]
        manager.release(held)
        assert not manager.grow({"a": 28}).refused
        empty = manager.release("a", hold=True)
        manager.release(empty)
        assert manager.available_blocks() == 8 and not manager.state.requests
        manager.admit("b", range(100, 108))
        manager.cache("b", 2, computed=1)
        with pytest.raises(InvalidCommand, match="ahead of its step"):
            manager.release("b", hold=True)
        assert isinstance(from_another_thread(lambda: manager.release("b", hold=True)), InvalidCommand)
        manager.release("b")


def test_a_request_that_waits_is_released_in_two_steps() -> None:
    settings = {"host_blocks": 16, "host_policy": HostPolicy.EXCLUSIVE, "ranks": 1, "block_bytes": 64}
    with ledger(**settings) as manager:
        manager.admit("old", range(48))
        manager.commit({"old": 48})
        manager.release("old")
        manager.admit("r", [1, 2, 3])
        assert manager.grow({"r": 32}).not_ready == ["r"]
        held = manager.release("r", hold=True)
        assert len(manager.block_table(held)) == 4  # what it had, or got free: the step may write these
        manager.release(held)
        asked = manager.admit("again", range(48))
        if not asked.ready:
            held = manager.release("again", hold=True)  # nobody could write anything of it
            assert len(manager.block_table(held)) <= 1
            manager.release(held)
        manager.clear(force=True, wait=0.0)


def test_two_steps_without_room_in_the_log_leave_nothing_behind() -> None:
    with ledger() as manager:
        manager.admit("a", range(6))
        for kind in (RequestMatched, BlocksReassigned):
            with pytest.MonkeyPatch.context() as patch:
                real = manager._transactions._collect

                def collect(records: Any, events: Any, kind: type = kind, real: Any = real) -> None:
                    if any(type(event) is kind for event in events):
                        raise SharedMemoryFull("no room, as planned")
                    real(records, events)

                patch.setattr(manager._transactions, "_collect", collect)
                with pytest.raises(SharedMemoryFull):
                    manager.release("a", hold=True)
            assert list(manager.state.numbers) == ["a"] and replays(manager)
        manager.release(manager.release("a", hold=True))


def test_computed_follows_what_a_failed_swap_in_leaves() -> None:
    settings = {
        "host_blocks": 16,
        "host_policy": HostPolicy.EXCLUSIVE,
        "ranks": 1,
        "block_bytes": 64,
        "checksums": True,
    }
    with ledger(**settings) as manager:
        manager.admit("old", range(32))
        manager.commit({"old": 32})
        manager.release("old")
        manager.make_room(16)
        while manager.state.transfers:
            manager.poll()
        manager.pools[0].host[:] ^= 1
        admission = manager.admit("again", range(33))
        assert admission.cached_tokens == 32 and not admission.ready
        progress = manager.wait("again")
        assert progress.shortened and manager.computed("again") == 4 * progress.cached_blocks == 0
        assert manager.known("again") == 33
        assert not manager.grow({"again": 33}).refused
        manager.commit({"again": 33})
        assert manager.computed("again") == 33


def test_blocks_and_tokens_can_be_mixed() -> None:
    with ledger(device_blocks=32) as manager:
        manager.admit("a", range(20), new_tokens=10)
        manager.commit({"a": 10})
        manager.trim("a", 2)  # the block of the last two tokens goes
        assert manager.computed("a") == 8
        manager.allocate({"a": 3})
        manager.cache("a", 4)
        assert manager.computed("a") == 16
        manager.commit({"a": 18})
        manager.admit("b", range(20))
        assert manager.computed("b") == 16
        assert serve_tokens(manager, "c", range(20)) == 16


def serve_tokens(manager: CacheManager, key: str, tokens: Any) -> int:
    admission = manager.admit(key, tokens)
    manager.commit({key: manager.known(key)})
    manager.release(key)
    return admission.cached_tokens


def test_an_adapter_is_cleared_and_nothing_else() -> None:
    settings = {"host_blocks": 16, "host_policy": HostPolicy.EXCLUSIVE, "weights": "v1"}
    with ledger(**settings) as manager:
        adapter = namespace_key(lora="a")
        for name, namespace in (("plain", b""), ("adapter", adapter), ("again", b""), ("third", adapter)):
            manager.admit(name, [*range(24), *name.encode()], namespace=namespace)
            manager.commit({name: manager.known(name)})
            if name != "third":
                manager.release(name)
        before = manager.digest()
        with pytest.raises(Busy, match="1 requests and transfers use namespace"):
            manager.clear(namespace=adapter)
        with pytest.raises(InvalidCommand, match="whole cache"):
            manager.clear(namespace=adapter, force=True)
        with pytest.raises(InvalidCommand, match="namespace is bytes"):
            manager.clear(namespace="a")  # type: ignore[arg-type]
        assert manager.digest() == before
        manager.release("third")
        plain = manager.peek(range(25), max_blocks=99)
        assert sum(manager.peek(range(25), namespace=adapter, max_blocks=99)) == 6
        manager.clear(namespace=adapter)
        assert (
            manager.peek(range(25), namespace=adapter, max_blocks=99) == (0, 0)
            and manager.peek(range(25), max_blocks=99) == plain
        )
        assert sum(plain) == 6
        manager.clear(namespace=adapter)
        manager.clear(namespace=b"nobody's")


TOKENS = st.lists(st.integers(1, 2), min_size=1, max_size=14)
PICK = st.integers(0, 1 << 16)
SLOTS = dict[int, dict[int, tuple[Any, ...]]]


class Request:
    """What an engine would know of a request, and this manager has to agree with."""

    def __init__(self, namespace: bytes, tokens: list[int], computed: int) -> None:
        self.namespace = namespace
        self.tokens = tokens
        self.computed = computed


class TokenMachine(RuleBasedStateMachine):
    """An engine that computes what it may, slot by slot: what a hit claims must be in the slots that it names."""

    numbers = 0

    @initialize(blocks=st.integers(4, 10), watermark=st.integers(0, 2))
    def create(self, blocks: int, watermark: int) -> None:
        type(self).numbers += 1
        self.name = f"tokens-{os.getpid()}-{self.numbers}"
        config = CacheConfig(
            block_size=2, device_blocks=blocks, watermark_blocks=watermark, segment_bytes=64 << 10, retain_bytes=None
        )
        self.manager = CacheManager.create(self.name, config)
        self.requests: dict[str, Request] = {}
        self.held: dict[str, list[int]] = {}
        self.slots: SLOTS = {}
        self.count = 0
        self.begun: bytes | None = None
        """The state before the step that is open."""

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            if self.begun is not None:
                self.end_step()
            assert replays(self.manager)
            self.manager.close()
            remove_objects(self.name)

    def key(self, number: int) -> str:
        return sorted(self.requests)[number % len(self.requests)]

    def live(self) -> bool:
        return bool(self.requests)

    def admitted(self, key: str, namespace: bytes, tokens: list[int], cached: int) -> None:
        request = self.requests[key] = Request(namespace, list(tokens), cached)
        table = self.manager.block_table(key)
        for position in range(cached):
            held = self.slots[int(table[position // 2])][position % 2]
            assert held == (namespace, *request.tokens[: position + 1]), f"slot of token {position} holds {held}"

    @rule(
        tokens=TOKENS,
        namespace=st.sampled_from([b"", b"salt"]),
        chunk=st.none() | st.integers(0, 6),
        must_fit=st.booleans(),
        reserve=st.none() | st.integers(0, 8),
        ask=st.sampled_from(["", "now", "before"]),
    )
    def admit(
        self, tokens: list[int], namespace: bytes, chunk: int | None, must_fit: bool, reserve: int | None, ask: str
    ) -> None:
        self.count += 1
        key, manager = f"r{self.count:04}", self.manager
        before = manager.digest()
        options: dict[str, Any] = {
            "namespace": namespace,
            "new_tokens": chunk,
            "must_fit": must_fit,
            "reserve": reserve,
        }
        asked = None
        if ask:
            asked = manager.can_admit(key, tokens, **options)
            assert manager.digest() == before
            if ask == "before" and self.requests:
                self.release(0, False, False)
                before = manager.digest()
        free = manager.available_blocks()
        try:
            admission = manager.admit(key, tokens if asked is None else asked, **({} if asked else options))
        except OutOfBlocks as refused:
            named = refused.request_id
            assert manager.digest() == before and key not in manager.state.numbers
            assert named == key and (ask != "now" or not asked)
            return
        if asked is not None and ask == "now":
            assert asked and asked.cached_tokens == admission.cached_tokens
        assert admission.cached_tokens < len(tokens)
        wanted = len(tokens) if chunk is None else admission.cached_tokens + chunk
        assert manager.room(key) == max(-(-wanted // 2), admission.cached_tokens // 2) * 2
        if must_fit:
            assert free >= -(-len(tokens) // 2) - admission.cached_tokens // 2
        self.admitted(key, namespace, tokens, admission.cached_tokens)

    @precondition(live)
    @rule(number=PICK, tokens=st.integers(1, 2) | TOKENS)
    def append(self, number: int, tokens: int | list[int]) -> None:
        key = self.key(number)
        self.manager.append(key, tokens)
        self.requests[key].tokens += [tokens] if isinstance(tokens, int) else tokens

    @precondition(live)
    @rule(number=PICK, count=st.integers(0, 5))
    def retract(self, number: int, count: int) -> None:
        key = self.key(number)
        request = self.requests[key]
        try:
            self.manager.retract(key, count)
        except InvalidCommand:
            assert count > 0
            return
        assert len(request.tokens) - count >= request.computed
        del request.tokens[len(request.tokens) - count :]

    @precondition(live)
    @rule(numbers=st.lists(PICK, min_size=1, max_size=4), more=st.integers(0, 5), lookahead=st.integers(0, 2))
    def grow(self, numbers: list[int], more: int, lookahead: int) -> None:
        manager = self.manager
        keys = [*dict.fromkeys(self.key(number) for number in numbers)]
        wanted = {key: self.requests[key].computed + more for key in keys}
        tables = {key: manager.block_table(key).tolist() for key in keys}
        grown = manager.grow(wanted, lookahead=lookahead)
        assert not grown.gone and not grown.not_ready and bool(grown.refused) == (grown.refusal is not None)
        assert grown.refused == [key for key in keys if manager.room(key) < wanted[key] + lookahead]
        for key in keys:
            assert manager.block_table(key).tolist() == tables[key] + list(grown.new_blocks.get(key, []))
            assert key not in grown.refused or key not in grown.new_blocks
        if grown.refusal is not None:
            assert grown.refusal.request_id in grown.refused
            first = grown.refused[0]
            assert -(-(wanted[first] + lookahead) // 2) - len(tables[first]) > manager.available_blocks()

    @precondition(live)
    @rule(counts=st.dictionaries(PICK, st.integers(0, 6), min_size=1, max_size=4))
    def compute(self, counts: dict[int, int]) -> None:
        """A step of the model, as far as is known and there is room."""
        manager = self.manager
        done = {}
        for number, count in counts.items():
            key = self.key(number)
            request = self.requests[key]
            stop = min(request.computed + count, len(request.tokens), manager.room(key))
            table = manager.block_table(key)
            for position in range(request.computed, stop):
                slots = self.slots.setdefault(int(table[position // 2]), {})
                slots[position % 2] = (request.namespace, *request.tokens[: position + 1])
            done[key] = request.computed = max(stop, request.computed)
        assert manager.commit(done) == []

    @precondition(live)
    @rule(number=PICK, over=st.integers(1, 4))
    def commit_too_much(self, number: int, over: int) -> None:
        key = self.key(number)
        manager, request = self.manager, self.requests[key]
        before = manager.digest()
        with pytest.raises(InvalidCommand):
            manager.commit({key: min(len(request.tokens), manager.room(key)) + over})
        assert manager.digest() == before

    @precondition(live)
    @rule(number=PICK, final=st.booleans(), hold=st.booleans())
    def release(self, number: int, final: bool, hold: bool) -> None:
        key = self.key(number)
        request = self.requests.pop(key)
        own = self.manager.block_table(key)[request.computed // 2 :].tolist()
        name = self.manager.release(key, final=final, hold=hold)
        assert bool(name) == hold
        if hold:
            self.held[name] = own
            assert self.manager.block_table(name).tolist() == own

    @precondition(lambda self: self.held)
    @rule()
    def step_has_ended(self) -> None:
        for name, own in self.held.items():
            assert self.manager.block_table(name).tolist() == own
            self.manager.release(name)
        self.held.clear()

    @rule(force=st.booleans())
    def clear(self, force: bool) -> None:
        if force or not (self.requests or self.held):
            self.manager.clear(force=force)

    @precondition(lambda self: self.begun is None)
    @rule()
    def begin_step(self) -> None:
        self.begun = self.manager.digest()
        self.step = self.manager.step(self.count)
        self.step.__enter__()

    @precondition(lambda self: self.begun is not None)
    @rule()
    def end_step(self) -> None:
        """What the log says inside a step, and so what a crash leaves, is the state before it."""
        reader, replay = LogReader(self.name), Replay()
        while records := reader.poll():
            replay.feed(records)
        assert state_digest(replay.state) == self.begun
        self.step.__exit__(None, None, None)
        self.begun = None
        while records := reader.poll():
            replay.feed(records)
        reader.close()
        assert state_digest(replay.state) == self.manager.digest()

    @invariant()
    def the_numbers_agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        assert not check(manager.state)
        for key, request in self.requests.items():
            assert manager.known(key) == len(request.tokens)
            assert manager.computed(key) == request.computed
        blocks = [
            int(block) for key in self.requests for block in manager.block_table(key)[manager.cached_blocks(key) :]
        ]
        blocks += [block for own in self.held.values() for block in own]
        assert len({*blocks}) == len(blocks), "two requests write the same block"


def test_token_machine() -> None:
    run_state_machine_as_test(TokenMachine)  # type: ignore[no-untyped-call]
