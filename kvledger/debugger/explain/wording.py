"""Events in words: one line each, in the field's terms, the same wherever an event is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from statemachine.content import parts_of
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
    HostPolicy,
    LedgerOpened,
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
from statemachine.state.groups import parse
from statemachine.state.state import State

_MOST_RANGES = 8
DIRECTIONS = {Direction.SWAP_OUT: "swap-out", Direction.SWAP_IN: "swap-in", Direction.BACKUP: "backup"}


def ids(values: Sequence[int], most: int = _MOST_RANGES) -> str:
    """Ids in their order, runs of neighbours in short: ``4..7, 2, 9..8``."""
    if not values:
        return "none"
    parts: list[str] = []
    start = 0
    while start < len(values) and len(parts) < most:
        stop, step = start + 1, 0
        while stop < len(values) and values[stop] - values[stop - 1] in ((1, -1) if not step else (step,)):
            step = values[stop] - values[stop - 1]
            stop += 1
        first, last = values[start], values[stop - 1]
        parts.append(str(first) if stop - start == 1 else f"{first}..{last}")
        start = stop
    return ", ".join(parts) + (f" and {len(values) - start} more" if start < len(values) else "")


def count(number: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def copies(event: TransferStarted, most: int = _MOST_RANGES) -> str:
    """From which blocks to which, with their tiers."""
    here, there = ("host", "device") if event.direction == Direction.SWAP_IN else ("device", "host")
    return f"{here} {ids(event.sources, most)} → {there} {ids(event.targets, most)}"


class Wording:
    """Puts events into words, in the order of the log: it remembers which request has which name while it lives.

    Args:
        block_size: tokens per block; 0: not known yet, :class:`LedgerOpened` says it.
        names: names of the requests that are live before the first event, by number.
    """

    def __init__(self, block_size: int = 0, names: Mapping[int, str] | None = None) -> None:
        self._block_bytes = 4 * block_size
        self._names = dict(names or {})

    @classmethod
    def after(cls, state: State) -> Wording:
        """For the events that follow a state."""
        return cls(state.opened.block_size, {id: request.request_id for id, request in state.requests.items()})

    def __call__(self, event: Event) -> str:
        """The event in one line."""
        if isinstance(event, RequestReleased):
            text = self._released(event)
            self.learn(event)
            return text
        self.learn(event)
        return WORDS[type(event)](self, event)

    def learn(self, event: Event) -> None:
        """An event that is not to be put into words."""
        if isinstance(event, RequestMatched):
            self._names[event.request] = event.key
        elif isinstance(event, RequestReleased):
            self._names.pop(event.request, None)
        elif isinstance(event, LedgerOpened):
            self._block_bytes = 4 * event.block_size

    def name(self, request: int) -> str:
        """A request's name, or its number where the log does not reach back to its name."""
        key = self._names.get(request)
        return f"request {request}" if key is None else f"request {key!r}"

    def _blocks_of(self, words: bytes) -> str:
        size = self._block_bytes
        return count(len(words) // size, "block") if size else count(len(words) // 4, "token")

    def _opened(self, event: LedgerOpened) -> str:
        text = f"ledger of {event.block_size}-token blocks: {event.device_blocks:,} on the device"
        if event.host_policy != HostPolicy.OFF:
            policy = HostPolicy(event.host_policy).name.lower().replace("_", "-")
            text += f", {event.host_blocks:,} on the host ({policy}, {event.host_staging_blocks:,} for staging)"
        if event.backup_after > 1:
            text += f", backed up at use {event.backup_after}"
        text += f", {count(event.ranks, 'rank')}" if event.ranks else ", no workers"
        groups = [
            f"{number} {group.name} ({group.kind.name.lower()})" for number, group in enumerate(parse(event.groups), 1)
        ]
        return text + (f"; beside group 0 the layer groups {listed(groups)}" if groups else "")

    def _matched(self, event: RequestMatched) -> str:
        hit = []
        if event.device_blocks:
            hit.append(f"{count(event.device_blocks, 'block')} on the device")
        if event.host_blocks:
            hit.append(f"{count(event.host_blocks, 'block')} on the host")
        text = f"{self.name(event.request)} begins (number {event.request}): "
        if hit:
            text += f"finds {' and '.join(hit)}, down to run {event.leaf}"
            if event.upper:
                text += f", whose first {count(event.cut, 'block')} become run {event.upper}"
        else:
            text += "finds nothing cached"
        return text + f"; {self._blocks_of(event.words)} of known content beyond"

    def _allocated(self, event: BlocksAllocated) -> str:
        text = []
        start = 0
        for request, number in zip(event.requests, event.counts):
            blocks = event.blocks[start : start + number]
            text.append(f"{self.name(request)} gets device {_noun(blocks)}")
            start += number
        return "; ".join(text) + _held(event)

    def _refused(self, event: AllocationRefused) -> str:
        who = self.name(event.request) if event.request else f"request {event.key!r}"
        wanted = count(event.wanted, f"group {event.group} block" if event.group else "device block")
        return f"{who} is refused: {wanted} wanted, {event.available:,} free or evictable"

    def _cached(self, event: BlocksCached) -> str:
        name = self.name(event.request)
        parts = []
        fresh = event.blocks[event.taken :]
        if event.node:
            below = f" below run {event.upper or event.leaf}" if event.leaf else " at the end of its path"
            parts.append(f"publishes device {_noun(fresh)} as run {event.node}{below}")
        if event.taken:
            parts.append(f"gives device {_noun(event.blocks[: event.taken])} to runs without a valid device copy")
        if event.duplicates:
            parts.append(f"keeps its own copies of {count(event.duplicates, 'block')} that are cached already")
        if event.upper:
            parts.append(f"cuts run {event.leaf}, whose first {count(event.cut, 'block')} become run {event.upper}")
        if event.words:
            parts.append(f"adds generated content of {self._blocks_of(event.words)}")
        return f"{name} " + (", ".join(parts) or "publishes nothing")

    def _replaced(self, event: CopiesReplaced) -> str:
        noun = "run takes" if len(event.nodes) == 1 else "runs take"
        text = f"{noun} the copies of {self.name(event.request)}, device {_noun(event.blocks)}"
        return f"{ids(event.nodes)}: {text}, which frees {ids(event.freed)}"

    def _chosen(self, event: BlocksChosen) -> str:
        return f"the engine has chosen device {_noun(event.blocks)}"

    def _departed(self, event: EngineDeparted) -> str:
        whose = f" for {event.key!r}" if event.key else ""
        return f"the engine departed from what this ledger does{whose}: {event.what}"

    def _extended(self, event: RequestExtended) -> str:
        parts = []
        if event.leaf:
            more = f"finds {count(event.device_blocks, 'more block')} on the device, down to run {event.leaf}"
            if event.upper:
                more += f", whose first {count(event.cut, 'block')} become run {event.upper}"
            parts.append(more)
        if event.blocks:
            parts.append(f"gives back its own copies, device {_noun(event.blocks)}")
        return f"{self.name(event.request)} {listed(parts)}"

    def _computed(self, event: BlocksComputed) -> str:
        return f"{self.name(event.request)} has computed its first {count(event.blocks, 'block')}"

    def _reassigned(self, event: BlocksReassigned) -> str:
        return f"{self.name(event.request)} hands device {_noun(event.blocks)} to {self.name(event.target)}"

    def _trimmed(self, event: BlocksTrimmed) -> str:
        return f"{self.name(event.request)} gives back device {_noun(event.blocks)}"

    def _released(self, event: RequestReleased) -> str:
        text = f"{self.name(event.request)} ends ({reason_name(event)})"
        if event.blocks:
            text += f", which frees device {_noun(event.blocks)}"
        if event.final:
            text += f", its deepest {count(event.final, 'run')} will be evicted first"
        for run, absorbed in zip(event.merged, event.absorbed):
            text += f", run {run} absorbs {count(absorbed, 'run')} above it"
        return text

    def _sides(self, event: SideAllocated) -> str:
        text = []
        start = 0
        for request, number in zip(event.requests, event.counts):
            text.append(f"{self.name(request)} gets group {event.group} {_noun(event.blocks[start : start + number])}")
            start += number
        return "; ".join(text)

    def _passed(self, event: WindowPassed) -> str:
        tokens = [f"{self.name(id)} has settled {count(n, 'token')}" for id, n in zip(event.requests, event.settled)]
        return f"{listed(tokens)}: the window of group {event.group} has left {_noun(event.blocks)}"

    def _side_freed(self, event: SideFreed) -> str:
        end = f", after its first {count(event.length, 'position')}" if event.length else ""
        return f"{self.name(event.request)} gives back group {event.group} {_noun(event.blocks)}{end}"

    def _evicted(self, event: BlocksEvicted) -> str:
        tier, reason = Tier(event.tier).name.lower(), EvictReason(event.reason).name.lower().replace("_", " ")
        noun = "run" if len(event.nodes) == 1 else "runs"
        text = f"{tier} {_noun(event.blocks)} of {noun} {ids(event.nodes)} evicted ({reason})"
        return text + (f", what stays of run {event.nodes[-1]} above is run {event.upper}" if event.upper else "")

    def _started(self, event: TransferStarted) -> str:
        noun = "run" if len(event.nodes) == 1 else "runs"
        text = f"{DIRECTIONS[Direction(event.direction)]} {event.transfer} starts: {noun} {ids(event.nodes)}, "
        text += copies(event)
        if event.request:
            text += f", for {self.name(event.request)}"
        if event.upper and event.direction == Direction.BACKUP:
            text += f"; what is copied of run {event.nodes[-1]} is run {event.upper}"
        elif event.upper:
            text += f"; what stays of run {event.nodes[0]} is run {event.upper}"
        return text + _held(event)

    def _finished(self, event: TransferFinished) -> str:
        outcome = Outcome(event.outcome).name.lower().replace("_", " ")
        return f"transfer {event.transfer} ends ({outcome}): {count(event.valid, 'block')} arrived on every rank"

    def _quarantine(self, event: QuarantineEnded) -> str:
        return f"the quarantine of transfer {event.transfer} ends: nobody can write its blocks any more"

    def _distrusted(self, event: BlocksDistrusted) -> str:
        good = f" (not its first {count(event.cut, 'block')}, now run {event.upper})" if event.upper else ""
        name = self.name(event.request)
        return f"{name} has turned out bad from run {event.node} on{good}: with all below that never matches again"

    def _cleared(self, event: CacheCleared) -> str:
        return f"the cache is cleared (generation {event.generation}): nothing cached before matches again"

    def _weights(self, event: WeightsLoaded) -> str:
        return f"the weights are those of version {event.weights!r} from here on"

    def _resized(self, event: PoolResized) -> str:
        return f"the {Tier(event.tier).name.lower()} tier has {count(event.blocks, 'block')} from here on"

    def _tier_lost(self, event: TierLost) -> str:
        return f"every copy on the {Tier(event.tier).name.lower()} tier is lost: {event.reason}"

    def _joined(self, event: WorkerJoined) -> str:
        return f"the worker of rank {event.rank} joins (incarnation {event.incarnation}, pid {event.pid})"

    def _lost(self, event: WorkerLost) -> str:
        return f"the worker of rank {event.rank} is lost (incarnation {event.incarnation}): {event.reason}"

    def _epoch(self, event: EpochStarted) -> str:
        return f"epoch {event.epoch}: a new engine took over after event {event.last_sequence}"

    def _digest(self, event: DigestTaken) -> str:
        scope = DigestScope(event.scope).name.lower()
        return f"the engine's digest of the {scope} after event {event.sequence} is {event.digest.hex()}"


def _noun(blocks: Sequence[int]) -> str:
    return f"block{'' if len(blocks) == 1 else 's'} {ids(blocks)}"


def _held(event: BlocksAllocated | TransferStarted) -> str:
    if not event.after:
        return ""
    granted = event.blocks if isinstance(event, BlocksAllocated) else event.targets
    start = len(granted) - sum(event.held)
    parts = []
    for transfer, number in zip(event.after, event.held):
        parts.append(f"{ids(granted[start : start + number])} only after transfer {transfer}")
        start += number
    return "; " + ", ".join(parts)


WORDS: dict[type[Any], Callable[[Wording, Any], str]] = {
    LedgerOpened: Wording._opened,
    RequestMatched: Wording._matched,
    BlocksAllocated: Wording._allocated,
    AllocationRefused: Wording._refused,
    BlocksCached: Wording._cached,
    BlocksReassigned: Wording._reassigned,
    BlocksTrimmed: Wording._trimmed,
    RequestReleased: Wording._released,
    BlocksEvicted: Wording._evicted,
    TransferStarted: Wording._started,
    TransferFinished: Wording._finished,
    QuarantineEnded: Wording._quarantine,
    CacheCleared: Wording._cleared,
    WeightsLoaded: Wording._weights,
    PoolResized: Wording._resized,
    TierLost: Wording._tier_lost,
    WorkerJoined: Wording._joined,
    WorkerLost: Wording._lost,
    EpochStarted: Wording._epoch,
    DigestTaken: Wording._digest,
    RequestExtended: Wording._extended,
    BlocksComputed: Wording._computed,
    CopiesReplaced: Wording._replaced,
    BlocksDistrusted: Wording._distrusted,
    SideAllocated: Wording._sides,
    WindowPassed: Wording._passed,
    SideFreed: Wording._side_freed,
    BlocksChosen: Wording._chosen,
    EngineDeparted: Wording._departed,
}
"""Event → its line."""


def block_name(tier: Tier, block: int) -> str:
    """``device block 7``."""
    return f"{tier.name.lower()} block {block}"


def reason_name(event: RequestReleased) -> str:
    """Why a request ended: ``finished``, ``aborted``."""
    return ReleaseReason(event.reason).name.lower().replace("_", " ")


def namespace_name(namespace: bytes) -> str:
    """``salt 'A'``, ``LoRA 'sql' and salt 'A'``; one that an engine made up itself, or redaction, as hex digits."""
    if not namespace:
        return "the default namespace"
    parts = parts_of(namespace)
    if parts is None:
        return f"namespace {namespace.hex()}"
    return listed(f"{word} {part!r}" for word, part in zip(("LoRA", "salt", "weights"), parts) if part)


def listed(items: Iterable[str]) -> str:
    """``a, b and c``."""
    texts = list(items)
    return " and ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else "".join(texts)
