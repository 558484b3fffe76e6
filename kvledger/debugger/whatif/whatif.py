"""What if the cache had been larger, had had a host tier, had been told other things?

The recorded traffic runs through the real state machine (:func:`statemachine.decide.decide` and ``apply``) with other
sizes. Transfers end within the command that starts them, as without workers, so every hit counts that is there in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from kvledger.debugger.source.source import Source
from kvledger.debugger.whatif.prefixes import chain, root_seed
from kvledger.debugger.whatif.traffic import (
    Again,
    Ask,
    Begin,
    End,
    Forget,
    Grow,
    Moment,
    Move,
    Publish,
    Refused,
    Shrink,
    Spoil,
    traffic,
)
from statemachine import commands
from statemachine.apply import apply, genesis
from statemachine.decide import decide, peek
from statemachine.errors import OutOfBlocks
from statemachine.events import (
    Event,
    HostPolicy,
    LedgerOpened,
    Outcome,
    ReleaseReason,
    RequestExtended,
    RequestMatched,
    Tier,
)
from statemachine.items import by_block
from statemachine.state.nodes import Request
from statemachine.state.state import State

_EVICT_STEP = 1 << 16


class Hints(StrEnum):
    """What the cache is told when a request ends."""

    RECORDED = "recorded"
    """The ``final`` hints of the log, as far as they had an effect there."""
    NONE = "none"
    PERFECT = "perfect"
    """``final`` exactly where no later request of the log continues the prompt."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A cache to try the traffic on."""

    device_blocks: int
    host_blocks: int
    host_policy: HostPolicy
    hints: Hints


@dataclass(kw_only=True)
class Result:
    """What a scenario comes to. Blocks are counted once per request that asks for them."""

    scenario: Scenario
    requests: int = 0
    blocks: int = 0
    """Full blocks of all prompts."""
    device_hit_blocks: int = 0
    host_hit_blocks: int = 0
    device_evicted_blocks: int = 0
    """Given up or swapped out by the device."""
    host_evicted_blocks: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    backed_up_blocks: int = 0
    stalls: int = 0
    """Requests (or steps of one) for which there was no room."""
    early_releases: int = 0
    """Requests that were ended before their time to make room, the oldest first."""
    too_large: int = 0
    """Requests that do not fit in the device pool at all; what they would have found counts as hits."""

    @property
    def device_hit_rate(self) -> float:
        """Share of the blocks that were on the device."""
        return self.device_hit_blocks / max(self.blocks, 1)

    @property
    def host_hit_rate(self) -> float:
        """Share of the blocks that were on the host only."""
        return self.host_hit_blocks / max(self.blocks, 1)


class Simulation:
    """One scenario under traffic."""

    def __init__(self, scenario: Scenario, recorded: LedgerOpened, continued: set[int]) -> None:
        self.result = Result(scenario=scenario)
        self._continued = continued
        opened = LedgerOpened(
            recorded.block_size,
            scenario.device_blocks,
            scenario.host_blocks,
            staging(recorded, scenario),
            scenario.host_policy,
            0,
            "",
            "",
            recorded.backup_after,
            recorded.chunked_multimodal,
        )
        self.state: State = genesis(opened)
        self._live: dict[int, str] = {}
        """Request of the log → its key here, oldest first."""

    def serve(self, asks: Iterable[Ask]) -> None:
        """Let the engine ask this. What concerns a request that is over already is left out."""
        for ask in asks:
            match ask:
                case Begin():
                    self._begin(ask)
                case Grow() if ask.request in self._live:
                    self._grow(ask.request, ask.blocks)
                case Publish() if ask.request in self._live:
                    blocks = min(ask.blocks, len(self._request(ask.request).table))
                    self._execute(commands.Cache(self._live[ask.request], blocks, ask.words, items=ask.items))
                    self._back_up(ask.request)
                case Again() if ask.request in self._live:
                    self._again(ask)
                case Shrink() if ask.request in self._live:
                    self._shrink(ask)
                case Move() if ask.request in self._live and ask.target in self._live:
                    self._move(ask)
                case End() if ask.request in self._live:
                    self._end(ask.request, ask.reason, self._final(ask))
                case Spoil() if ask.request in self._live:
                    self._execute(commands.Distrust(self._live[ask.request], ask.blocks))
                case Forget():
                    self._forget(ask.tier)
                case _:
                    pass

    def finish(self) -> Result:
        """The numbers so far."""
        result, counters = self.result, self.state.counters
        result.swapped_out_blocks = counters.swapped_out_blocks
        result.swapped_in_blocks = counters.swapped_in_blocks
        result.backed_up_blocks = counters.backed_up_blocks
        result.device_evicted_blocks = counters.device_evicted_blocks
        result.host_evicted_blocks = counters.host_evicted_blocks
        return result

    def _begin(self, ask: Begin) -> None:
        result = self.result
        words = memoryview(ask.words)
        count = len(words) // self.state.block_bytes
        result.requests += 1
        result.blocks += count
        wanted = ask.blocks
        if wanted < count:  # more may match here than was allocated there
            wanted = max(wanted, sum(peek(self.state, words, ask.namespace, ask.limit, ask.items)))
        key = str(ask.request)
        stalled = False
        while wanted <= result.scenario.device_blocks:
            try:
                events = self._execute(commands.Admit(key, words, ask.namespace, ask.limit, wanted, ask.items))
            except OutOfBlocks:
                result.stalls += not stalled
                stalled = True
                if not self._release_oldest():
                    break
                continue
            self._live[ask.request] = key
            matched = events[0]
            assert isinstance(matched, RequestMatched)
            result.device_hit_blocks += matched.device_blocks
            result.host_hit_blocks += matched.host_blocks
            if self.state.opened.backup_after > 1:
                self._back_up(ask.request)
            return
        device, host = peek(self.state, words, ask.namespace, ask.limit, ask.items)
        result.too_large += 1
        result.device_hit_blocks += device
        result.host_hit_blocks += host

    def _grow(self, request: int, blocks: int) -> None:
        stalled = False
        while request in self._live and (count := blocks - len(self._request(request).table)) > 0:
            try:
                self._execute(commands.Allocate([self._live[request]], [count]))
            except OutOfBlocks:
                self.result.stalls += not stalled
                stalled = True
                self._release_oldest()

    def _again(self, ask: Again) -> None:
        request = self._request(ask.request)
        # As an engine does: at least one token is left to compute.
        limit = request.leaf.end + max(len(request.words) // self.state.block_bytes, 1) - 1
        for event in self._execute(commands.Extend(request.request_id, max(limit, ask.start + ask.found))):
            if isinstance(event, RequestExtended):
                self.result.device_hit_blocks += event.device_blocks
        if self.state.opened.backup_after > 1:
            self._back_up(ask.request)

    def _back_up(self, request: int) -> None:
        """Write-through: what was used often enough, as the manager does after every use."""
        if self.state.policy == HostPolicy.WRITE_THROUGH:
            self._execute(commands.Backup(self._request(request).leaf.id))

    def _shrink(self, ask: Shrink) -> None:
        request = self._request(ask.request)
        if request.leaf.end <= ask.blocks < len(request.table):
            self._execute(commands.Trim(request.request_id, ask.blocks))

    def _move(self, ask: Move) -> None:
        request = self._request(ask.request)
        own = request.table[request.leaf.end :]
        self._execute(
            commands.Reassign(request.request_id, self._live[ask.target], own[max(len(own) - ask.blocks, 0) :])
        )

    def _final(self, ask: End) -> bool:
        hints = self.result.scenario.hints
        return ask.final if hints == Hints.RECORDED else hints == Hints.PERFECT and ask.request not in self._continued

    def _release_oldest(self) -> bool:
        oldest = next(iter(self._live), None)
        if oldest is None:
            return False
        self.result.early_releases += 1
        self._end(oldest, ReleaseReason.PREEMPTED, False)
        return True

    def _end(self, request: int, reason: ReleaseReason, final: bool) -> None:
        self._execute(commands.Release(self._live.pop(request), reason, final))

    def _forget(self, tier: Tier | None) -> None:
        if tier is None:
            self._execute(commands.Clear(True))
            for each in (Tier.HOST, Tier.DEVICE):
                while self._execute(commands.Evict(each, _EVICT_STEP)):
                    pass
        elif tier == Tier.HOST or not self._live:
            self._execute(commands.LoseTier(tier, "as recorded", self.state.pools or "simulated"))

    def _request(self, request: int) -> Request:
        return self.state.requests[self.state.numbers[self._live[request]]]

    def _execute(self, command: commands.Command) -> list[Event]:
        """Decide, apply, and let every transfer that begins end at once."""
        state = self.state
        events = decide(state, command)
        for event in events:
            apply(state, event)
        for id, transfer in list(state.transfers.items()):
            for event in decide(state, commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets))):
                apply(state, event)
        return events


def continued_requests(moments: Iterable[Moment], block_bytes: int) -> set[int]:
    """The requests whose prompt a later one continues: it has all but perhaps the last block of it.

    The last block is left out because block-hash traces end in a partial block, which no later prompt repeats.
    """
    marks: dict[int, int] = {}
    waiting: dict[int, list[int]] = {}
    found: set[int] = set()
    for moment in moments:
        for ask in moment.asks:
            if isinstance(ask, Begin):
                items = by_block(ask.items, block_bytes // 4)
                numbers = chain(ask.words, block_bytes, root_seed(ask.namespace), items)
                for number in numbers:
                    if number in waiting:
                        found.update(waiting.pop(number))
                if numbers:
                    marks[ask.request] = numbers[max(len(numbers) - 2, 0)]
            elif isinstance(ask, End) and ask.request in marks:
                waiting.setdefault(marks.pop(ask.request), []).append(ask.request)
    return found


@dataclass(frozen=True)
class Answers:
    """What :func:`what_if` found."""

    results: list[Result]
    refused: int
    """Refusals in the log itself: the engine ended or delayed something there, and so does the traffic."""


def what_if(
    source: Source, scenarios: Sequence[Scenario], progress: Callable[[int], None] = lambda done: None
) -> Answers:
    """Run the traffic of a log through every scenario, side by side, in one pass.

    Args:
        progress: called with the sequence of the event that was reached.

    Raises:
        Contradiction: an event of the log contradicts the state that it meets.
    """
    first = source.at(source.first)
    opened = first.opened
    continued: set[int] = set()
    if any(scenario.hints == Hints.PERFECT for scenario in scenarios):
        continued = continued_requests(traffic(source), first.block_bytes)
    simulations = [Simulation(scenario, opened, continued) for scenario in scenarios]
    refused = 0
    for moment in traffic(source):
        refused += sum(isinstance(ask, Refused) for ask in moment.asks)
        for simulation in simulations:
            simulation.serve(moment.asks)
        progress(moment.sequence)
    return Answers([simulation.finish() for simulation in simulations], refused)


def staging(opened: LedgerOpened, scenario: Scenario) -> int:
    """Host blocks for copies in transit: as many as recorded, or an eighth of a tier that was not there."""
    if not scenario.host_blocks:
        return 0
    return opened.host_staging_blocks if opened.host_blocks else -(-scenario.host_blocks // 8)
