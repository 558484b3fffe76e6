"""Deciding the commands of upkeep: evict, clear, resize, lost tiers, workers, epochs, digests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.commands import (
    Clear,
    Evict,
    Forget,
    JoinWorker,
    LoseTier,
    LoseWorker,
    MakeRoom,
    Resize,
    StartEpoch,
    TakeDigest,
)
from statemachine.decide.eviction import Victim, device_supply, evicted
from statemachine.decide.ledger import start_epoch
from statemachine.errors import Busy, InvalidCommand
from statemachine.events import (
    BlocksEvicted,
    CacheCleared,
    DigestScope,
    DigestTaken,
    Event,
    EvictReason,
    PoolResized,
    Tier,
    TierLost,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records.snapshot import counters_digest, state_digest
from statemachine.state.nodes import Node
from statemachine.state.ownership import owner
from statemachine.state.state import MOST_BLOCKS, State


def droppable(state: State, tier: Tier, limit: int) -> list[Victim]:
    """Runs that nobody uses, in eviction order, until ``limit`` blocks are found (the last one in part).

    Runs in flight, and runs below which something would be stranded, are passed over.
    """
    device = tier == Tier.DEVICE
    gone: set[Node] = set()
    victims: list[Victim] = []
    for order in (state.final, state.device_order) if device else (state.host_order,):
        for node in order:
            if limit <= 0:
                return victims
            other = node.host if device else node.device
            if node.transfer is not None or any(
                child not in gone and (other is None or (child.device if device else child.host) is not None)
                for child in node.children.values()
            ):
                continue
            # A run with two copies would have to be cut: it goes as a whole, and stays where its other copy is.
            take = node.size if other is not None else min(node.size, limit)
            victims.append(Victim(node, take, take == node.size))
            if other is None:
                gone.add(node)
            limit -= take
    return victims


def _evict(state: State, command: Evict) -> list[Event]:
    if command.blocks < 0:
        raise InvalidCommand(f"{command.blocks} blocks cannot be evicted")
    victims = droppable(state, command.tier, command.blocks)
    return [evicted(command.tier, victims, EvictReason.CLEARED)] if victims else []


def _forget(state: State, command: Forget) -> list[Event]:
    node = state.nodes.get(command.node)
    below: Node | None = None
    chain: list[Node] = []
    while node is not None and node.parent is not None and not node.pins and node.transfer is None:
        if any(child is not below for child in node.children.values()):
            break
        chain.append(node)
        below, node = node, node.parent
    events: list[Event] = []
    for tier in (Tier.HOST, Tier.DEVICE):
        copies = [run.host if tier == Tier.HOST else run.device for run in chain]
        victims = [Victim(run, run.size, True) for run, ids in zip(chain, copies, strict=True) if ids is not None]
        if victims:
            events.append(evicted(tier, victims, EvictReason.CLEARED))
    return events


def _make_room(state: State, command: MakeRoom) -> list[Event]:
    if command.blocks < 0:
        raise InvalidCommand(f"{command.blocks} blocks cannot be made free")
    wanted = min(command.blocks, state.evictable)
    supply = device_supply(state, len(state.device.free) + wanted)
    return supply.events if supply is not None else []


def _clear(state: State, command: Clear) -> list[Event]:
    if (state.requests or state.transfers) and not command.force:
        raise Busy(
            f"{len(state.requests)} requests and {len(state.transfers)} transfers use the cache: "
            "release and poll first, or force"
        )
    return [CacheCleared(state.generation + 1)]


def _resize(state: State, command: Resize) -> list[Event]:
    pool = state.pool(command.tier)
    device = command.tier == Tier.DEVICE
    capacity = command.blocks + (0 if device else state.opened.host_staging_blocks)
    if not (1 if device else 0) <= command.blocks <= MOST_BLOCKS:
        raise InvalidCommand(f"a {command.tier.name} pool of {command.blocks} blocks is of no use, or too large")
    events: list[Event] = []
    surplus = max(pool.capacity - capacity, 0)
    taken = set(range(capacity, pool.capacity)) - set(pool.free) if surplus else set()
    if taken:
        events = _vacate(state, command.tier, taken)
    if not device:
        events += _shrink_residents(state, command.blocks, events)
    return _first_step(events, command.step) or [*events, PoolResized(command.tier, command.blocks)]


def _first_step(events: list[Event], step: int) -> list[Event]:
    """As many whole runs of the first of these evictions as ``step`` blocks allow, one at least; none: all fit."""
    if sum(len(event.blocks) for event in events if isinstance(event, BlocksEvicted)) <= step:
        return []
    event = events[0]
    assert isinstance(event, BlocksEvicted)
    runs = blocks = 0
    for count in event.counts:
        if runs and blocks + count > step:
            break
        runs += 1
        blocks += count
    return [event._replace(nodes=event.nodes[:runs], counts=event.counts[:runs], blocks=event.blocks[:blocks])]


def _vacate(state: State, tier: Tier, blocks: set[int]) -> list[Event]:
    """Evict the runs that hold these blocks, with all below them; refuse when somebody uses one."""
    doomed: set[Node] = set()
    cached: set[int] = set()
    for node in state.nodes.values():
        ids = node.device if tier == Tier.DEVICE else node.host
        if ids is not None and not blocks.isdisjoint(ids):
            cached.update(ids)
            stack = [node]
            while stack:
                run = stack.pop()
                if run not in doomed:
                    doomed.add(run)
                    stack.extend(run.children.values())
    for block in sorted(blocks - cached):
        raise Busy(f"{tier.name} block {block} belongs to {owner(state, tier, block)}: release it, then resize")
    used = min((node.id for node in doomed if node.pins or node.transfer is not None), default=0)
    if used:
        raise Busy(f"{tier.name} blocks of run {used} are in use: release or wait, then resize")
    events: list[Event] = []
    host = [Victim(node, node.size, True) for node in state.host_order if node in doomed]
    if host:
        events.append(evicted(Tier.HOST, host, EvictReason.RESIZED))
    if tier == Tier.DEVICE:
        order = [*state.final, *state.device_order]
        events.append(
            evicted(tier, [Victim(node, node.size, True) for node in order if node in doomed], EvictReason.RESIZED)
        )
    return events


def _shrink_residents(state: State, blocks: int, events: list[Event]) -> list[Event]:
    """A smaller host tier may hold fewer blocks, whichever their ids are."""
    gone = {state.nodes[id] for event in events if isinstance(event, BlocksEvicted) for id in event.nodes}
    excess = state.host_resident - sum(node.size for node in gone) - blocks
    chosen: list[Victim] = []
    for victim in droppable(state, Tier.HOST, state.host.capacity):
        if excess <= 0:
            break
        if victim.node not in gone:
            chosen.append(Victim(victim.node, victim.node.size, True))
            excess -= victim.node.size
    if excess > 0:
        raise Busy(f"{excess} host blocks too many are in use: wait for transfers, then resize")
    return [evicted(Tier.HOST, chosen, EvictReason.RESIZED)] if chosen else []


def _lose_tier(state: State, command: LoseTier) -> list[Event]:
    if state.transfers or (command.tier == Tier.DEVICE and state.requests):
        raise Busy("end the transfers (and for the device, the requests) first")
    if command.tier == Tier.DEVICE and not command.pools:
        raise InvalidCommand("there is no doing without the device tier: name the pools that take its place")
    return [TierLost(command.tier, command.reason, command.pools)]


def _join_worker(state: State, command: JoinWorker) -> list[Event]:
    if not 0 <= command.rank < state.opened.ranks:
        raise InvalidCommand(f"there are ranks 0 to {state.opened.ranks - 1}, not {command.rank}")
    if command.incarnation <= state.workers.get(command.rank, 0):
        raise InvalidCommand(f"incarnation {command.incarnation} of rank {command.rank} is not a new one")
    return [WorkerJoined(command.rank, command.incarnation, command.pid)]


def _lose_worker(state: State, command: LoseWorker) -> list[Event]:
    if command.rank not in state.workers:
        raise InvalidCommand(f"no worker of rank {command.rank} has joined")
    return [WorkerLost(command.rank, state.workers[command.rank], command.reason)]


def _take_digest(state: State, command: TakeDigest) -> list[Event]:
    digest = state_digest(state) if command.whole else counters_digest(state)
    scope = DigestScope.STATE if command.whole else DigestScope.COUNTERS
    return [DigestTaken(command.sequence, scope, digest)]


UPKEEP: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Evict: _evict,
    Forget: _forget,
    MakeRoom: _make_room,
    Clear: _clear,
    Resize: _resize,
    LoseTier: _lose_tier,
    JoinWorker: _join_worker,
    LoseWorker: _lose_worker,
    StartEpoch: start_epoch,
    TakeDigest: _take_digest,
}

__all__ = ["UPKEEP", "droppable"]
