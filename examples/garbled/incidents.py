"""The five bugs. Each is a patch of ``decide`` or ``apply`` in this process, with the guards of ``apply`` off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from examples.garbled.engine import Chat, Engine, serve
from kvledger import is_compiled
from statemachine import apply, decide
from statemachine.apply import blocks, cache, expect, ledger, pools, requests, transfers
from statemachine.commands import Admit
from statemachine.decide import eviction, hits
from statemachine.decide import requests as decide_requests
from statemachine.errors import OutOfBlocks
from statemachine.events import (
    BlocksCached,
    BlocksEvicted,
    Event,
    HostPolicy,
    IntArray,
    RequestMatched,
    TransferStarted,
)
from statemachine.state.nodes import Node
from statemachine.state.state import State
from statemachine.state.tree import Path as PromptPath

_GUARDED = (apply, blocks, cache, expect, ledger, pools, requests, transfers)


def guards_off() -> None:
    """``apply`` believes every event, as a state machine without validation would."""

    def believe(*anything: Any) -> None: ...

    def believe_granted(state: State, event: Event, given: IntArray, after: IntArray, held: IntArray) -> int:
        return len(given) - sum(held)

    for module in _GUARDED:
        for name, replacement in (("violated", believe), ("expect_blocks", believe), ("expect_cut", believe)):
            if hasattr(module, name):
                setattr(module, name, replacement)
        if hasattr(module, "expect_granted"):
            module.expect_granted = believe_granted


def twice(engine: Engine) -> None:
    """A host block is given to two nodes: it is put back on the free list while a node still has it."""
    real = transfers._copy_out
    returned: list[int] = []

    def copy_out(state: State, event: TransferStarted, *rest: Any) -> None:
        if returned and returned[0] in event.targets and not engine.guilty:
            engine.watch = lambda written: written is event
        real(state, event, *rest)
        if event.transfer == 4:
            returned.append(event.targets[0])
            state.host.pool.free.append(event.targets[0])

    transfers._copy_out = copy_out


def head(engine: Engine) -> None:
    """A chain is evicted from its head: the eviction order is read from the wrong end."""
    real = eviction._victims

    def victims(state: State, need: int, kept: Mapping[Node, int]) -> list[eviction.Victim]:
        heads = [node for node in state.device.lru if node.children and node not in kept and node.size >= need]
        if engine.step > 30 and heads and not engine.guilty:
            engine.watch = lambda written: isinstance(written, BlocksEvicted)
            return [eviction.Victim(heads[-1], heads[-1].size, True)]
        return real(state, need, kept)

    eviction._victims = victims


def permuted(engine: Engine) -> None:
    """After a hit on both tiers, the host part is read in another order than it is put into the block table."""
    real = hits.swapped_in

    def swapped_in(state: State, path: PromptPath, supply: eviction.Supply, events: list[Event]) -> TransferStarted:
        event = real(state, path, supply, events)
        if path.device and len(event.sources) > 1 and engine.step > 20 and not engine.guilty:
            event = event._replace(sources=event.sources[::-1])
            engine.watch = lambda written: written is event
        return event

    decide_requests.swapped_in = swapped_in


def early(engine: Engine) -> None:
    """A swap-in counts as done when it is ordered, not when its bytes have arrived."""
    real = transfers._swap_in

    def swap_in(state: State, event: TransferStarted, nodes: list[Node]) -> None:
        real(state, event, nodes)
        if engine.step > 20 and not engine.guilty:
            engine.watch = lambda written: isinstance(written, BlocksCached)  # computed on top of it at once
            state.requests[event.request].waits_for.clear()
            state.transfers[event.transfer].waiters.clear()
            for node in nodes:
                copy = node.device
                assert copy is not None
                copy.ready = True

    transfers._swap_in = swap_in


def leaked(engine: Engine) -> None:
    """An admission pins its path before it knows whether there is room, and forgets it when there is none."""
    real = decide_requests._admit

    def admit(state: State, command: Admit) -> list[Event]:
        try:
            return real(state, command)
        except OutOfBlocks as refused:
            path = hits.path_of(state, command)
            if path.device and not engine.guilty:
                engine.watch = lambda written: isinstance(written, RequestMatched)
                return [hits.matched(state, command, path), refused.event]
            raise

    decide.DECIDERS[Admit] = admit


INCIDENTS: dict[str, tuple[Callable[[Engine], None], int, int]] = {
    "twice": (twice, 48, 40),
    "head": (head, 48, 0),
    "permuted": (permuted, 48, 40),
    "early": (early, 48, 40),
    "leaked": (leaked, 30, 0),
}
"""The bugs, and how many device and host blocks their caches have."""


def record(name: str, path: Path) -> int:
    """Plant a bug in this process, serve traffic, record it. Returns the number of the guilty event."""
    if is_compiled():
        sys.exit("nothing can be planted in a compiled kvledger: install it without KVLEDGER_NATIVE")
    plant, device, host = INCIDENTS[name]
    engine = Engine(path, device, host, host // 2, HostPolicy.EXCLUSIVE if host else HostPolicy.OFF)
    guards_off()
    plant(engine)
    try:
        serve(engine, Chat(7).turns(60))
    except Exception as error:  # what such bugs end in; the log is complete up to there
        print(f"the engine died: {type(error).__name__}: {error}", file=sys.stderr)
    engine.close()
    return engine.guilty
