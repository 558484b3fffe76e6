"""The incremental check finds what the full check finds, and nothing else."""

from __future__ import annotations

import contextlib
import random
import struct
from array import array
from collections import Counter
from collections.abc import Iterator

import pytest

from statemachine import commands
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.check.incremental import IncrementalCheck
from statemachine.decide import decide
from statemachine.errors import CommandRejected, InvariantViolation
from statemachine.events import Direction, Event, HostPolicy, LedgerOpened, Outcome, ReleaseReason, Tier
from statemachine.mentions import mentions
from statemachine.records.snapshot import restore, snapshot
from statemachine.state.nodes import ALL, Node, Request
from statemachine.state.state import State

STEPS = 300


def traffic(state: State, rng: random.Random) -> Iterator[commands.Command]:
    for number in range(STEPS):
        keys, kind = list(state.numbers), rng.randrange(26)
        key = rng.choice(keys) if keys else ""
        if kind < 7 or not keys:
            prompt = [rng.choice((1, 1, 1, 2)) for _ in range(rng.randrange(1, 9))]
            words = memoryview(struct.pack(f"<{len(prompt)}i", *prompt))
            yield commands.Admit(f"r{number}", words, rng.choice((b"", b"", b"salt")), rng.choice((99, 3)), len(prompt))
        elif kind < 11:
            request = state.requests[state.numbers[key]]
            if not request.waits_for:
                blocks = min(len(request.table), request.leaf.end + len(request.words) // 4)
                yield commands.Cache(key, blocks, b"", max(blocks - 1, 0) if rng.random() < 0.3 else None)
        elif kind < 14:
            yield commands.Release(key, ReleaseReason.FINISHED, rng.random() < 0.3)
        elif kind < 18 and state.transfers:
            transfer = rng.choice(list(state.transfers.values()))
            outcome = rng.choice([*[Outcome.DONE] * 8, *Outcome])
            if outcome == Outcome.CORRUPT and transfer.direction != Direction.SWAP_IN:
                outcome = Outcome.FAILED
            total = len(transfer.targets)
            valid = total if outcome == Outcome.DONE else rng.randrange(total)
            if transfer.quarantined:
                yield commands.EndQuarantine(transfer.id)
            else:
                yield commands.FinishTransfer(transfer.id, outcome, valid)
        elif kind == 18:
            yield commands.Allocate([key], [rng.randrange(1, 3)])
        elif kind == 19:
            request = state.requests[state.numbers[key]]
            yield commands.Trim(key, max(request.leaf.end, len(request.table) - 1))
        elif kind == 20:
            yield rng.choice(
                (commands.Evict(rng.choice(list(Tier)), 2), commands.Resize(Tier.DEVICE, rng.randrange(9, 14)))
            )
        elif kind < 23:
            yield commands.Extend(key, 99)
        elif kind == 23:
            yield commands.Backup(state.requests[state.numbers[key]].leaf.id)
        elif kind == 24:
            request = state.requests[state.numbers[key]]
            own = request.table[request.leaf.end :]
            forget = commands.Forget(rng.choice(list(state.nodes) or [0]))
            distrust = commands.Distrust(key, rng.randrange(5))
            yield rng.choice(
                (commands.MakeRoom(rng.randrange(1, 4)), forget, distrust, commands.GiveBack(key, own[:1]))
            )
        else:
            blocks = array("i", state.requests[state.numbers[key]].table[-1:])
            yield rng.choice((commands.Clear(True), commands.Reassign(key, rng.choice(keys), blocks)))


def events(state: State, rng: random.Random) -> Iterator[Event]:
    for command in traffic(state, rng):
        try:
            decided = decide(state, command)
        except CommandRejected:
            continue
        for event in decided:
            apply(state, event)
            yield event


def opened(policy: HostPolicy) -> State:
    host = (0, 0) if policy == HostPolicy.OFF else (8, 4)
    return genesis(LedgerOpened(1, 12, *host, policy, 1, "", ""))


@pytest.mark.parametrize("policy", HostPolicy)
@pytest.mark.parametrize("seed", range(12))
def test_sound_states_are_sound_for_both(policy: HostPolicy, seed: int) -> None:
    state = opened(policy)
    incremental = IncrementalCheck(state)
    count = 0
    for event in events(state, random.Random(seed)):
        count += 1
        assert not check(state)
        assert not incremental.after(event), (count, event)
    assert incremental.full_checks < count / 4


def _pins(state: State, rng: random.Random, node: Node) -> None:
    node.pins += rng.choice((-1, 1))


def _ready(state: State, rng: random.Random, node: Node) -> None:
    if node.device is not None:
        node.device.ready = not node.device.ready


def _lose_copy(state: State, rng: random.Random, node: Node) -> None:
    node.copies[0] = None


def _other_block(state: State, rng: random.Random, node: Node) -> None:
    if node.device is not None:
        node.device.ids = array("i", [(node.device.ids[0] + 1) % 12]) + node.device.ids[1:]


def _unlink(state: State, rng: random.Random, node: Node) -> None:
    assert node.parent is not None
    node.parent.children = {key: child for key, child in node.parent.children.items() if child is not node}


def _shift(state: State, rng: random.Random, node: Node) -> None:
    node.start += 1


def _out_of_order(state: State, rng: random.Random, node: Node) -> None:
    for order in (state.device.final, state.device.lru, state.host.lru):
        if node in order:
            order.remove(node)


def _no_transfer(state: State, rng: random.Random, node: Node) -> None:
    node.transfer = None


def _words(state: State, rng: random.Random, node: Node) -> None:
    node.words += b"1234"


def _ahead(state: State, rng: random.Random, node: Node) -> None:
    node.uncomputed = True


RUN_CORRUPTIONS = [
    *(_pins, _ready, _lose_copy, _other_block, _unlink, _shift, _out_of_order, _no_transfer, _words, _ahead),
]


def _swap_table(state: State, rng: random.Random, request: Request) -> None:
    request.table = request.table[::-1]


def _cut_table(state: State, rng: random.Random, request: Request) -> None:
    request.table = request.table[:-1]


def _forget_wait(state: State, rng: random.Random, request: Request) -> None:
    request.waits_for = {}


def _wait_for_nothing(state: State, rng: random.Random, request: Request) -> None:
    request.waits_for = {**request.waits_for, 999: 0}


def _rename(state: State, rng: random.Random, request: Request) -> None:
    request.request_id += "x"


def _computed(state: State, rng: random.Random, request: Request) -> None:
    request.computed = ALL


def _higher_leaf(state: State, rng: random.Random, request: Request) -> None:
    request.leaf = request.leaf.parent or request.leaf


REQUEST_CORRUPTIONS = [_swap_table, _cut_table, _forget_wait, _wait_for_nothing, _rename, _computed, _higher_leaf]


def _free_twice(state: State, rng: random.Random) -> None:
    pool = state.pool(rng.choice(list(Tier)))
    pool.free.append(pool.free[-1] if pool.free else 0)


def _lose_free(state: State, rng: random.Random) -> None:
    free = state.pool(rng.choice(list(Tier))).free
    if free:
        free.pop()


def _count(state: State, rng: random.Random) -> None:
    place, name = rng.choice(state.places), rng.choice(("evictable", "resident"))
    setattr(place, name, getattr(place, name) + 1)


def _forget_waiters(state: State, rng: random.Random) -> None:
    for transfer in state.transfers.values():
        transfer.waiters = {}


def _targets(state: State, rng: random.Random) -> None:
    for transfer in state.transfers.values():
        transfer.targets = transfer.targets[::-1] + array("i", [1])


STATE_CORRUPTIONS = [_free_twice, _lose_free, _count, _forget_waiters, _targets]


def corrupt(state: State, event: Event, rng: random.Random) -> str:
    """Damage something that the event has touched; its name, or nothing if there is nothing."""
    found = mentions(event)
    runs = [state.nodes[id] for id in found.nodes if id in state.nodes]
    requests = [state.requests[id] for id in found.requests if id in state.requests]
    kind = rng.randrange(3)
    if kind == 0 and runs:
        damage = rng.choice(RUN_CORRUPTIONS)
        damage(state, rng, rng.choice(runs))
        return damage.__name__
    if kind == 1 and requests:
        spoil = rng.choice(REQUEST_CORRUPTIONS)
        spoil(state, rng, rng.choice(requests))
        return spoil.__name__
    if kind == 2 and (runs or requests):
        break_it = rng.choice(STATE_CORRUPTIONS[:3] if not found.transfers else STATE_CORRUPTIONS)
        break_it(state, rng)
        return break_it.__name__
    return ""


@pytest.mark.parametrize("policy", HostPolicy)
def test_what_the_full_check_finds_in_what_an_event_touched(policy: HostPolicy) -> None:
    caught: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for seed in range(600):
        rng = random.Random(seed)
        state = opened(policy)
        incremental = IncrementalCheck(state)
        moment = rng.randrange(3, 120)
        # What no invariant minds (private blocks in another order) may contradict the rest of its transaction.
        with contextlib.suppress(InvariantViolation):
            for count, event in enumerate(events(state, random.Random(seed)), 1):
                name = corrupt(state, event, rng) if count >= moment else ""
                if name:
                    broken = check(state)
                    if broken:
                        (caught if incremental.after(event) else missed)[name] += 1
                        break
                assert not incremental.after(event)
    assert not missed, (missed, caught)
    assert len(caught) >= 14 and {"_ahead", "_computed"} < set(caught), caught


def test_what_an_event_did_not_touch_is_found_by_the_full_check() -> None:
    state = opened(HostPolicy.OFF)
    incremental = IncrementalCheck(state)
    stream = events(state, random.Random(1))
    for event in stream:
        assert not incremental.after(event)
        if len(state.nodes) > 2:
            break
    restored = restore(snapshot(state))
    assert not IncrementalCheck(restored).full()
    next(iter(restored.nodes.values())).pins += 1
    assert IncrementalCheck(restored).full()
