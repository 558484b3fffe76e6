"""Deciding the life of the ledger itself: workers, digests, and what a new engine does with the state of a dead one.

Its requests end, and what only they vouched for goes.

A block is *untrusted* if a request that was still running had cached it: the engine may have died before its keys and
values were written. It is evicted from every tier, unless something hangs below it that a released request cached:
that one has read it. Where a run took such a request's copy in the place of its own, it goes with all that is below.

Everything is one transaction. Who cached what is known only as long as the requests are there, and two requests may
each have cached runs that the other holds, so they could not be released one after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from statemachine.apply import apply
from statemachine.commands import JoinWorker, LoadWeights, LoseWorker, StartEpoch, TakeDigest
from statemachine.decide.eviction import evicted_everywhere
from statemachine.decide.sides import released
from statemachine.errors import InvalidCommand
from statemachine.events import (
    CacheCleared,
    DigestScope,
    DigestTaken,
    EpochStarted,
    Event,
    EvictReason,
    Outcome,
    ReleaseReason,
    RequestReleased,
    TransferFinished,
    WeightsLoaded,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records.snapshot import counters_digest, restore, snapshot, state_digest
from statemachine.state.nodes import Node
from statemachine.state.state import State


def start_epoch(state: State, command: StartEpoch) -> list[Event]:
    """The first events of a new engine. Works on a copy of the state, which takes these events one by one."""
    if command.epoch <= state.epoch:
        raise InvalidCommand(f"epoch {command.epoch} does not come after {state.epoch}")
    trial = restore(snapshot(state), expect_sound=False)
    events: list[Event] = []

    def do(event: Event) -> None:
        apply(trial, event)
        events.append(event)

    do(EpochStarted(command.epoch, command.last_sequence))
    suspects = untrusted(trial) | below_replaced(trial)
    # Copies of untrusted runs are given up. Their blocks stay quarantined until no worker can write them any more.
    for id in sorted({node.transfer.id for node in suspects if node.transfer is not None}):
        do(TransferFinished(id, Outcome.TIMED_OUT, 0, 0))
    for id in sorted(trial.requests):
        for event in released(trial, trial.requests[id]):
            do(event)
        private = trial.requests[id].private()
        do(RequestReleased(id, ReleaseReason.ENGINE_RESTARTED, 0, array("Q"), array("I"), private[::-1]))
    doomed = _doomed(trial, suspects)
    for event in evicted_everywhere(trial, doomed, EvictReason.UNTRUSTED):
        do(event)
    return events


def untrusted(state: State) -> set[Node]:
    """Runs that live requests have cached themselves."""
    found: set[Node] = set()
    for request in state.requests.values():
        node = request.leaf
        while node.parent is not None and node.start >= request.matched:
            if request.has_cached(node):
                found.add(node)
            node = node.parent
    return found


def below_replaced(state: State) -> set[Node]:
    """Runs below those that took copies of live requests; whoever cached them may have read the copies before."""
    found: set[Node] = set()
    for request in state.requests.values():
        stack = [
            child
            for node in state.path(request.leaf)
            if any(start <= node.start < stop for start, stop in request.replaced_ranges)
            for child in node.children.values()
        ]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(node.children.values())
    return found


def _doomed(state: State, suspects: set[Node]) -> set[Node]:
    """Those of the suspects that nobody holds and that have nothing but each other below them."""
    doomed: set[Node] = set()
    for node in sorted(suspects, key=lambda node: -node.start):
        at_rest = state.nodes.get(node.id) is node and not node.pins and node.transfer is None
        if at_rest and all(child in doomed for child in node.children.values()):
            doomed.add(node)
    return doomed


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


def _load_weights(state: State, command: LoadWeights) -> list[Event]:
    if command.weights == state.weights:
        return []
    loaded = WeightsLoaded(command.weights)
    return [loaded, CacheCleared(state.generation + 1)] if command.clear else [loaded]


def _take_digest(state: State, command: TakeDigest) -> list[Event]:
    digest = state_digest(state) if command.scope == DigestScope.STATE else counters_digest(state)
    return [DigestTaken(command.sequence, command.scope, digest)]


LEDGER: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    JoinWorker: _join_worker,
    LoseWorker: _lose_worker,
    LoadWeights: _load_weights,
    StartEpoch: start_epoch,
    TakeDigest: _take_digest,
}
