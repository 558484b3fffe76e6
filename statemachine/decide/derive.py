"""From the events of a log back to the commands they came from.

An event carries what was decided; the wish behind it follows from the event and the state it met. What a command held
beyond that never mattered: how far a prompt went on after its last full block, where a match must not end (a smaller
limit says the same), whether a hint had an effect, how the shares of a refused allocation were split. So deciding a
derived command in the state before it gives the same events, as long as ``decide`` is the same. That is what
:func:`redecide` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from statemachine.commands import (
    Admit,
    Adopt,
    Allocate,
    Backup,
    Cache,
    Clear,
    Command,
    Depart,
    Distrust,
    EndQuarantine,
    Evict,
    Extend,
    FinishTransfer,
    Forget,
    GiveBack,
    JoinWorker,
    LoadWeights,
    LoseTier,
    LoseWorker,
    MakeRoom,
    Match,
    Reassign,
    Release,
    Resize,
    Settle,
    StartEpoch,
    TakeDigest,
    Trim,
)
from statemachine.decide import available_blocks, decide
from statemachine.decide.eviction import droppable
from statemachine.errors import CommandRejected, OutOfBlocks
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksChosen,
    BlocksComputed,
    BlocksDistrusted,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    CopiesReplaced,
    DigestScope,
    DigestTaken,
    Direction,
    EngineDeparted,
    EpochStarted,
    Event,
    EvictReason,
    Outcome,
    PoolResized,
    QuarantineEnded,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    SideAllocated,
    SideFreed,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.items import all_records, within
from statemachine.state.groups import Kind, resumption
from statemachine.state.nodes import ALL, Node
from statemachine.state.state import State
from statemachine.state.tree import content_of, items_of, root_of


class NoCommand(ValueError):
    """No command of this version comes to these events; the message says what is odd about them."""


def is_step_of_resize(events: Sequence[Event]) -> bool:
    """Whether a transaction only prepares a resize: which one, a later ``PoolResized`` says."""
    last = events[-1]
    return isinstance(last, BlocksEvicted) and last.reason == EvictReason.RESIZED


def commands_of(events: Sequence[Event], state: State, resized: PoolResized | None = None) -> Command:
    """The command that a transaction came from.

    Args:
        events: the whole transaction.
        state: the state that it met. It is only read.
        resized: for a transaction that :func:`is_step_of_resize`, the next ``PoolResized`` of the log.

    Raises:
        NoCommand: no command comes to such events; also for :class:`LedgerOpened`, which nobody commands.
    """
    first, last = events[0], events[-1]
    if resized is not None and isinstance(last, BlocksEvicted):
        return Resize(Tier(resized.tier), resized.blocks, len(last.blocks))
    while len(events) > 1 and isinstance(last, CopiesReplaced):  # what follows from the rest
        events = events[:-1]
        last = events[-1]
    # What makes room comes first, what it is for comes last; a few commands begin with what they are.
    named = first if type(first) in (RequestMatched, BlocksCached, EpochStarted) else last
    derive = DERIVERS.get(type(named))
    if derive is None:
        raise NoCommand(f"no command ends with {type(named).__name__}")
    try:
        return derive(state, named, events)
    except (KeyError, ValueError) as error:
        what = ", ".join(type(event).__name__ for event in events)
        raise NoCommand(f"{what}: {'no live request or run' if isinstance(error, KeyError) else ''} {error}") from error


def redecide(
    events: Sequence[Event], state: State, resized: PoolResized | None = None
) -> tuple[Command, list[Event], str]:
    """What today's ``decide`` makes of the command behind a transaction: the command, its events, why it was rejected.

    A refusal that is recorded counts as an event. The arguments are those of :func:`commands_of`.

    Raises:
        NoCommand
    """
    command = commands_of(events, state, resized)
    try:
        return command, decide(state, command), ""
    except OutOfBlocks as error:
        return command, [error.event], str(error)
    except CommandRejected as error:
        return command, [], f"{type(error).__name__}: {error}"


def path_items(leaf: Node | None, cut: int) -> bytes:
    """The items that begin in a path; of its last run only in the first ``cut`` blocks, if that is not 0."""
    if leaf is None:
        return b""
    runs = []
    node = leaf
    while node.parent is not None:
        runs.append(node)
        node = node.parent
    return all_records(within(items_of(runs), 0, leaf.start + cut if cut else leaf.end))


def path_words(leaf: Node | None, cut: int, block_bytes: int) -> bytes:
    """The content of a path from its root; of its last run only the first ``cut`` blocks, if that is not 0."""
    runs: list[Node] = []
    node = leaf
    while node is not None and node.parent is not None:
        runs.append(node)
        node = node.parent
    if not runs:
        return b""
    runs.reverse()
    assert leaf is not None
    length = (leaf.start + cut if cut else leaf.end) * block_bytes
    return content_of(runs)[:length]


def _matched(state: State, event: RequestMatched, events: Sequence[Event]) -> Command:
    leaf = state.nodes[event.leaf] if event.leaf else None
    words = path_words(leaf, event.cut, state.block_bytes) + event.words
    found = event.device_blocks + event.host_blocks
    granted = [each for each in events if isinstance(each, BlocksAllocated)]
    if granted or state.groups:
        blocks = found + sum(len(each.blocks) for each in granted)
        static = _static_tokens(state, events)
        return Admit(event.key, memoryview(words), event.namespace, found, blocks, event.items, static_tokens=static)
    return Match(event.key, memoryview(words), event.namespace, found, event.items)


def _static_tokens(state: State, events: Sequence[Event]) -> int:
    """Room in the static groups that an admission asked for."""
    counts = [
        len(each.blocks)
        for each in events
        if isinstance(each, SideAllocated) and state.groups[each.group - 1].kind == Kind.STATIC
    ]
    return max(counts, default=0) * state.opened.block_size


def _refused(state: State, event: AllocationRefused, events: Sequence[Event]) -> Command:
    if event.request:
        return Allocate([state.requests[event.request].request_id], [event.wanted])
    if event.key in state.numbers:
        return Allocate([event.key, event.key], [event.wanted, 0])
    leaf = state.nodes[event.leaf] if event.leaf else None
    words = path_words(leaf, event.cut, state.block_bytes)
    namespace = root_of(leaf).words if leaf is not None else b""
    device, node = 0, leaf
    available = available_blocks(state)
    while node is not None and node.parent is not None:
        if node.copies[0] is not None:
            count = event.cut if event.cut and node is leaf else node.size
            device += count
            available -= 0 if node.pins else count
        node = node.parent
    limit = len(words) // state.block_bytes
    if event.group:
        return _side_refused(state, event, words, namespace, path_items(leaf, event.cut))
    blocks = event.wanted + device
    # Whether too little was there or too little would have stayed: what was not available to it had to stay.
    watermark = max(available - min(event.available, event.wanted - 1), 0) if state.requests else 0
    return Admit(event.key, memoryview(words), namespace, limit, blocks, path_items(leaf, event.cut), watermark)


def _side_refused(state: State, event: AllocationRefused, words: bytes, namespace: bytes, items: bytes) -> Command:
    """The admission that a side group had no room for."""
    size = state.opened.block_size
    limit = len(words) // state.block_bytes
    blocks, static = limit, 0
    group = state.groups[event.group - 1]
    if group.windowed:
        blocks = event.wanted + resumption(state.groups, limit * size) // size
    elif group.kind == Kind.STATIC:
        static = event.wanted * size
    return Admit(event.key, memoryview(words), namespace, limit, blocks, items, static_tokens=static)


def _settled(state: State, event: WindowPassed, events: Sequence[Event]) -> Command:
    told: dict[int, int] = {}
    for each in events:
        assert isinstance(each, WindowPassed)
        told.update(zip(each.requests, each.settled))
    return Settle([state.requests[id].request_id for id in sorted(told)], [told[id] for id in sorted(told)])


def _granted(events: Sequence[Event]) -> BlocksAllocated:
    """Group 0's part of an allocation. Raises :class:`ValueError`: there is none."""
    found = [event for event in events if isinstance(event, BlocksAllocated)]
    if len(found) != 1:
        raise ValueError("blocks of a layer group are granted to live requests, and none of group 0")
    return found[0]


def _nothing_else(event: SideFreed) -> Command:
    raise NoCommand(f"blocks of layer group {event.group} are given back, and nothing follows")


def _allocated(state: State, event: BlocksAllocated, events: Sequence[Event]) -> Command:
    if any(isinstance(each, BlocksChosen) for each in events):
        return Adopt(state.requests[event.requests[0]].request_id, event.blocks)
    return Allocate([state.requests[id].request_id for id in event.requests], list(event.counts))


def _cached(state: State, event: BlocksCached, events: Sequence[Event]) -> Command:
    request = state.requests[event.request]
    first = events[0]
    computed = first.blocks if isinstance(first, BlocksComputed) else request.computed
    blocks = request.leaf.end + event.duplicates + len(event.blocks)
    return Cache(request.request_id, blocks, event.words, None if computed == ALL else computed, event.items)


def _computed(state: State, event: BlocksComputed, events: Sequence[Event]) -> Command:
    request = state.requests[event.request]
    return Cache(request.request_id, request.leaf.end, b"", event.blocks)


def _distrusted(state: State, event: BlocksDistrusted, events: Sequence[Event]) -> Command:
    return Distrust(state.requests[event.request].request_id, state.nodes[event.node].start + event.cut)


def _extended(state: State, event: RequestExtended, events: Sequence[Event]) -> Command:
    request = state.requests[event.request]
    return Extend(request.request_id, request.leaf.end + event.device_blocks)


def _trimmed(state: State, event: BlocksTrimmed, events: Sequence[Event]) -> Command:
    request = state.requests[event.request]
    left = len(request.table) - len(event.blocks)
    if event.blocks != request.table[left:][::-1]:
        return GiveBack(request.request_id, event.blocks)
    return Trim(request.request_id, left)


def _reassigned(state: State, event: BlocksReassigned, events: Sequence[Event]) -> Command:
    return Reassign(state.requests[event.request].request_id, state.requests[event.target].request_id, event.blocks)


def _released(state: State, event: RequestReleased, events: Sequence[Event]) -> Command:
    return Release(state.requests[event.request].request_id, ReleaseReason(event.reason), event.final > 0)


def _evicted(state: State, event: BlocksEvicted, events: Sequence[Event]) -> Command:
    tier = Tier(event.tier)
    if event.reason == EvictReason.CAPACITY and tier == Tier.DEVICE:
        return _made_room(events)
    if event.reason == EvictReason.DISTRUSTED:
        return Evict(tier, len(event.blocks), distrusted=True)
    if event.reason != EvictReason.CLEARED:
        raise NoCommand(f"{tier.name} blocks are evicted for {EvictReason(event.reason).name}, and nothing follows")
    if len(events) == 1:
        root = root_of(state.nodes[event.nodes[0]])
        for tree_only in (None, root):
            victims = droppable(state.place(tier), len(event.blocks), tree_only)
            if [victim.node.id for victim in victims] == list(event.nodes):
                return Evict(tier, len(event.blocks), None if tree_only is None else root.words)
    nodes = [state.nodes[id] for each in events if isinstance(each, BlocksEvicted) for id in each.nodes]
    return Forget(max(nodes, key=lambda node: node.start).id)


def _replaced(state: State, event: CopiesReplaced, events: Sequence[Event]) -> Command:
    raise NoCommand("copies are replaced, and nobody has cached or released anything before")


def _chosen(state: State, event: BlocksChosen, events: Sequence[Event]) -> Command:
    raise NoCommand("blocks are chosen, and nobody gets them")


def _made_room(events: Sequence[Event]) -> Command:
    """What an allocation would have begun with, alone."""
    blocks = 0
    for event in events:
        if isinstance(event, BlocksEvicted) and event.tier == Tier.DEVICE:
            blocks += len(event.blocks)
        elif isinstance(event, TransferStarted):
            blocks += len(event.sources)
    return MakeRoom(blocks)


def _started(state: State, event: TransferStarted, events: Sequence[Event]) -> Command:
    if event.direction == Direction.SWAP_OUT:
        return _made_room(events)
    if event.direction == Direction.BACKUP:
        return Backup(event.nodes[-1])
    raise NoCommand("a swap-in starts, and no request begins with it")


DERIVERS: dict[type[Any], Callable[[State, Any, Sequence[Event]], Command]] = {
    RequestMatched: _matched,
    AllocationRefused: _refused,
    BlocksAllocated: _allocated,
    BlocksCached: _cached,
    BlocksComputed: _computed,
    BlocksDistrusted: _distrusted,
    SideAllocated: lambda state, event, events: _allocated(state, _granted(events), events),
    WindowPassed: _settled,
    SideFreed: lambda _, event, __: _nothing_else(event),
    RequestExtended: _extended,
    BlocksTrimmed: _trimmed,
    BlocksReassigned: _reassigned,
    RequestReleased: _released,
    BlocksEvicted: _evicted,
    TransferStarted: _started,
    TransferFinished: lambda _, event, __: FinishTransfer(event.transfer, Outcome(event.outcome), event.valid),
    QuarantineEnded: lambda _, event, __: EndQuarantine(event.transfer),
    CacheCleared: lambda _, event, __: Clear(True),
    WeightsLoaded: lambda _, event, events: LoadWeights(event.weights, len(events) > 1),
    PoolResized: lambda _, event, __: Resize(Tier(event.tier), event.blocks),
    TierLost: lambda _, event, __: LoseTier(Tier(event.tier), event.reason, event.pools),
    CopiesReplaced: _replaced,
    BlocksChosen: _chosen,
    EngineDeparted: lambda _, event, __: Depart(event.key, event.what),
    WorkerJoined: lambda _, event, __: JoinWorker(event.rank, event.incarnation, event.pid),
    WorkerLost: lambda _, event, __: LoseWorker(event.rank, event.reason),
    EpochStarted: lambda _, event, __: StartEpoch(event.epoch, event.last_sequence),
    DigestTaken: lambda _, event, __: TakeDigest(event.sequence, DigestScope(event.scope)),
}
"""The event that names a transaction → what derives the command."""
