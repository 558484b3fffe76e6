"""What a new engine does with the state of a dead one: its requests end, and what only they vouched for goes.

A block is *untrusted* if a request that was still running had cached it: the engine may have died before its keys and
values were written. It is evicted from every tier, unless something hangs below it that a released request cached.

Everything is one transaction. Who cached what is known only as long as the requests are there, and two requests may
each have cached runs that the other holds, so they could not be released one after the other.
"""

from __future__ import annotations

from array import array

from statemachine.apply import apply
from statemachine.commands import StartEpoch
from statemachine.decide.eviction import Victim, evicted
from statemachine.errors import InvalidCommand
from statemachine.events import (
    EpochStarted,
    Event,
    EvictReason,
    Outcome,
    ReleaseReason,
    RequestReleased,
    Tier,
    TransferFinished,
)
from statemachine.records.snapshot import restore, snapshot
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
    suspects = untrusted(trial)
    # Copies of untrusted runs are given up. Their blocks stay quarantined until no worker can write them any more.
    for id in sorted({node.transfer.id for node in suspects if node.transfer is not None}):
        do(TransferFinished(id, Outcome.TIMED_OUT, 0, 0))
    for id in sorted(trial.requests):
        private = trial.requests[id].private()
        do(RequestReleased(id, ReleaseReason.ENGINE_RESTARTED, 0, array("Q"), array("I"), private[::-1]))
    doomed = _doomed(trial, suspects)
    host = [node for node in trial.host_order if node in doomed]
    device = [node for order in (trial.final, trial.device_order) for node in order if node in doomed]
    for tier, nodes in ((Tier.HOST, host), (Tier.DEVICE, device)):
        if nodes:
            do(evicted(tier, [Victim(node, node.size, True) for node in nodes], EvictReason.UNTRUSTED))
    return events


def untrusted(state: State) -> set[Node]:
    """Runs that live requests have cached themselves."""
    found: set[Node] = set()
    for request in state.requests.values():
        node = request.leaf
        while node.parent is not None and node.start >= request.matched:
            if not any(start <= node.start < stop for start, stop in request.duplicates + request.joined):
                found.add(node)
            node = node.parent
    return found


def _doomed(state: State, suspects: set[Node]) -> set[Node]:
    """Those of the suspects that nobody holds and that have nothing but each other below them."""
    doomed: set[Node] = set()
    for node in sorted(suspects, key=lambda node: -node.start):
        at_rest = state.nodes.get(node.id) is node and not node.pins and node.transfer is None
        if at_rest and all(child in doomed for child in node.children.values()):
            doomed.add(node)
    return doomed
