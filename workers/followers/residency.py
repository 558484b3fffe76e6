"""Which blocks a router may count on, per tier, and how each event of the log changes that.

A block is *announced* on the device while a match would find it there, and on the host while the host copy is whole. A
run on its way out of the device stays announced there until the copy has ended, so that a demotion is a store followed
by a removal and never a hole. Blocks that are cached ahead of the step that computes them are announced when they are
computed, and so is what others have cached below them.

What changes is found by asking the runs that an event touches before and after it is applied. Events that can touch
anything (a tier that is lost, a new epoch, kinds that this module does not know) are answered by comparing all runs:
rare, and right whatever they do. Everything is named by content, so cuts and merges of runs change nothing.

Not announced, with all that follows it in the prompt: a block that holds a position of a multimodal item (its words are
not the tokens that a router hashes), and whatever has a namespace other than an adapter's name (a cache salt keeps its
blocks to itself; old weights match nothing).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from statemachine.content import adapter_of
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksComputed,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    CopiesReplaced,
    DigestTaken,
    Direction,
    Event,
    Outcome,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WorkerJoined,
    WorkerLost,
)
from statemachine.hashing import block_hashes
from statemachine.state.nodes import Node
from statemachine.state.state import State

_SILENT = (
    AllocationRefused,
    BlocksAllocated,
    BlocksReassigned,
    BlocksTrimmed,
    DigestTaken,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    TransferStarted,
    WorkerJoined,
    WorkerLost,
)
"""Kinds of events that change nothing of what is announced: they move what nobody can match, or cut runs."""


class Block(NamedTuple):
    """A cached block as the world outside knows it."""

    hash: int
    """64 bits of its chained name (:mod:`statemachine.hashing`)."""
    parent: int | None
    tokens: tuple[int, ...]
    adapter: str
    """Name of the LoRA adapter; empty: none."""
    depth: int
    """Position in its prompt, in blocks."""


class Stored(NamedTuple):
    """Blocks that can be found on a tier from now on, parents before their children."""

    tier: Tier
    blocks: list[Block]


class Removed(NamedTuple):
    """Blocks that a tier has no more, children before their parents."""

    tier: Tier
    hashes: list[int]


class Cleared(NamedTuple):
    """Nothing that was announced holds any more, on any tier."""


Change = Stored | Removed | Cleared
_Announced = dict[tuple[Tier, int], Block]


class _Name(NamedTuple):
    """A run's blocks as they are called outside."""

    start: int
    size: int
    blocks: list[Block]
    """Those that have a name: from the run's beginning to the first position of an item."""
    last: bytes
    """Full hash of the run's last block; empty where that has no name, so that nothing below has one."""


class Residency:
    """What is announced in a state, and what an event changes: :meth:`before` it is applied, then :meth:`after`."""

    def __init__(self) -> None:
        self._names: dict[int, _Name] = {}
        """By run."""
        self._touched: set[int] | None = set()
        """Runs that the event in hand may change; ``None``: any."""
        self._was: _Announced = {}

    def everything(self, state: State) -> list[Change]:
        """All that is announced, for whoever begins here: a clearing, then what there is."""
        return [Cleared(), *_changes({}, self._announced(state.nodes.values(), state))]

    def before(self, state: State, event: Event) -> None:
        """Remember what the event may change."""
        runs = _touched(state, event)
        self._touched = None if runs is None else {run.id for run in runs}
        self._was = self._announced(state.nodes.values() if runs is None else runs, state)

    def after(self, state: State, event: Event) -> list[Change]:
        """What the event has changed: first what is stored, parents first, then what is removed, children first."""
        if type(event) is CacheCleared or type(event) is WeightsLoaded:
            self._names.clear()  # other trees have names from here on
        if self._touched is None:
            runs: Iterable[Node] = state.nodes.values()
        else:
            ids = self._touched | _made(event) if self._touched or type(event) is BlocksCached else set()
            runs = [state.nodes[id] for id in sorted(ids) if id in state.nodes]
        is_now = self._announced(runs, state)
        if len(self._names) > 2 * len(state.nodes) + 1000:
            self._names = {id: name for id, name in self._names.items() if id in state.nodes}
        if type(event) is CacheCleared or type(event) is WeightsLoaded:
            # Tokens that were announced under the old weights get other names: both at once would confuse a router.
            return [Cleared(), *_changes({}, is_now)] if self._was or is_now else []
        return _changes(self._was, is_now)

    def _announced(self, runs: Iterable[Node], state: State) -> _Announced:
        announced: _Announced = {}
        for run in runs:
            for tier in _tiers(run):
                announced |= {(tier, block.hash): block for block in self._name(run, state).blocks}
        return announced

    def _name(self, run: Node, state: State) -> _Name:
        unnamed: list[Node] = []
        above = run
        while above.parent is not None and not self._is_named(above):
            unnamed.append(above)
            above = above.parent
        name = _Name(0, 0, [], b"") if above.parent is None else self._names[above.id]
        for node in reversed(unnamed):
            name = _name_below(name, node, state)
            self._names[node.id] = name
        return name

    def _is_named(self, run: Node) -> bool:
        name = self._names.get(run.id)
        return name is not None and name.start == run.start and name.size == run.size


def _name_below(above: _Name, run: Node, state: State) -> _Name:
    """The name of a run below one that has its own, or below the root of its namespace."""
    root = run
    while root.parent is not None:
        root = root.parent
    namespace = root.words
    adapter = adapter_of(namespace, state.weights)
    nothing = _Name(run.start, run.size, [], b"")
    if state.roots.get(namespace) is not root or adapter is None or (run.start and not above.last):
        return nothing
    size = state.opened.block_size
    words = np.frombuffer(run.words, "<i4").reshape(run.size, size)
    items = np.flatnonzero((words < 0).any(axis=1))
    count = int(items[0]) if len(items) else run.size
    hashes = block_hashes(run.words, size, namespace, parent=above.last or None)[:count]
    parent = above.blocks[-1].hash if above.blocks else None
    blocks: list[Block] = []
    for position, (digest, row) in enumerate(zip(hashes, words[:count].tolist(), strict=True)):
        block = Block(int.from_bytes(digest[:8], "little"), parent, tuple(row), adapter, run.start + position)
        blocks.append(block)
        parent = block.hash
    return _Name(run.start, run.size, blocks, hashes[-1] if count == run.size else b"")


def _tiers(run: Node) -> Iterator[Tier]:
    """Where a run is announced."""
    if run.distrusted:
        return
    leaves = run.transfer is not None and run.transfer.direction != Direction.SWAP_IN and not run.valid(Tier.HOST)
    device, host = run.valid() or leaves, run.valid(Tier.HOST)
    above: Node | None = run
    while (device or host) and above is not None:
        if above.uncomputed:
            return
        above = above.parent
    if device:
        yield Tier.DEVICE
    if host:
        yield Tier.HOST


def _touched(state: State, event: Event) -> list[Node] | None:
    """The runs that an event may change, as far as they exist before it; ``None``: it may be any."""
    match event:
        case BlocksEvicted():
            return [state.nodes[id] for id in event.nodes if id in state.nodes]
        case BlocksCached():
            request = state.requests.get(event.request)
            path = [] if request is None else _path(state.nodes.get(event.leaf), request.leaf)
            return (
                [*path, *_below(path[-1])] if event.taken and path else path
            )  # what is taken may be ahead from now on
        case CopiesReplaced():  # what is replaced may be ahead from now on
            runs = [state.nodes[id] for id in event.nodes if id in state.nodes]
            return [*runs, *_below(runs[-1])] if runs else []
        case RequestReleased() | BlocksComputed():
            request = state.requests.get(event.request)
            path = [] if request is None else _path(request.leaf, None)
            ahead = [run for run in path if run.uncomputed]
            return [*path, *_below(ahead[-1])] if ahead else []
        case TransferFinished():
            transfer = state.transfers.get(event.transfer)
            parts = [] if transfer is None else [part.node for part in transfer.parts if part.node is not None]
            whole = transfer is not None and event.outcome == Outcome.DONE and event.valid == len(transfer.targets)
            return parts if whole else [run for part in parts for run in _below(part)]
    return [] if isinstance(event, _SILENT) else None


def _made(event: Event) -> set[int]:
    """Ids of runs that an event makes, or that absorb others."""
    match event:
        case BlocksCached():
            return {event.node, event.upper}
        case BlocksEvicted() | TransferFinished():
            return {event.upper}
        case RequestReleased():
            return set(event.merged)
    return set()


def _path(leaf: Node | None, above: Node | None) -> list[Node]:
    runs = []
    while leaf is not None and leaf is not above and leaf.parent is not None:
        runs.append(leaf)
        leaf = leaf.parent
    return runs


def _below(top: Node) -> Iterator[Node]:
    """A run and everything below it."""
    pending = [top]
    while pending:
        run = pending.pop()
        yield run
        pending.extend(run.children.values())


def _changes(was: _Announced, is_now: _Announced) -> list[Change]:
    stored = sorted((block.depth, tier, hash) for (tier, hash), block in is_now.items() if (tier, hash) not in was)
    removed = sorted((-block.depth, tier, hash) for (tier, hash), block in was.items() if (tier, hash) not in is_now)
    changes: list[Change] = []
    for tier in Tier:
        for chain in _chains([is_now[tier, hash] for _, its, hash in stored if its == tier]):
            changes.append(Stored(tier, chain))
    for tier in reversed(Tier):
        if hashes := [hash for _, its, hash in removed if its == tier]:
            changes.append(Removed(tier, hashes))
    return changes


def _chains(blocks: list[Block]) -> Iterator[list[Block]]:
    """Blocks, given parents first, as chains of consecutive ones, each after the one that holds its parent."""
    ends: dict[int | None, list[Block]] = {}
    chains: list[list[Block]] = []
    for block in blocks:
        chain = ends.pop(block.parent, None) if block.parent is not None else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(block)
        ends[block.hash] = chain
    yield from chains
