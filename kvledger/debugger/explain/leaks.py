"""What outlives its use: requests and pins, transfers without an end, blocks that nobody has or can reach."""

from __future__ import annotations

from typing import NamedTuple

from kvledger.debugger.explain.wording import DIRECTIONS, Wording, block_name, count, ids
from kvledger.debugger.source.source import Entry, Source
from kvledger.recordings.postings import Kind
from statemachine.events import AllocationRefused, Tier
from statemachine.mentions import mentions
from statemachine.state.nodes import Request
from statemachine.state.ownership import owners
from statemachine.state.state import State

_OVERTAKEN = 100
"""So many whole lives of others without a word of a request are no coincidence."""


class Leak(NamedTuple):
    """Something that may have been forgotten."""

    kind: str
    """``request``, ``transfer``, ``block`` or ``run``."""
    name: str
    holds: str
    since: int
    """The event that began it; 0: before the log, or unknown."""
    last: int
    """The newest event that mentions it; 0: none in the log."""
    age_s: float
    """Seconds from ``since`` to the place that was asked about."""
    idle_s: float
    """Seconds from ``last``."""
    made_by: str
    """The event that began it, in words."""
    why: str
    """Why it is suspicious; empty: only because it is there."""


def leaks(source: Source, at: int) -> list[Leak]:
    """All that holds blocks after event ``at``, what is suspicious first, then the oldest.

    What is alive is not a leak by itself: a request of an engine that still runs has every right to its blocks. What
    is suspicious by itself says why.

    Raises:
        SourceError
    """
    state = source.at(at)
    lives = _lives(source, state, at)
    now = next(source.entries(at, at)).time_ns
    found = [
        _request(state, request, lives, now, _overtaken(source, state, lives["request", request.number].last))
        for request in state.requests.values()
    ]
    for transfer in state.transfers.values():
        kind = "quarantined " if transfer.quarantined else ""
        held = f"{kind}{DIRECTIONS[transfer.direction]} of {count(len(transfer.targets), 'block')}"
        names = [state.requests[id].request_id for id in transfer.waiters]
        why = "no rank has ended its quarantine" if transfer.quarantined else ""
        waiting = f", {count(len(names), 'request')} wait for it" if names else ""
        found.append(
            _leak("transfer", str(transfer.id), held + waiting, lives.get(("transfer", transfer.id)), now, why)
        )
    found += _unowned(state)
    found += _unreachable(state)
    return sorted(found, key=lambda leak: (not leak.why, -leak.age_s, leak.since))


class _Life:
    """First and last mention of something, and what the first one says."""

    def __init__(self) -> None:
        self.first: Entry | None = None
        self.last: Entry | None = None
        self.text = ""
        self.refused: Entry | None = None


def _lives(source: Source, state: State, at: int) -> dict[tuple[str, int], _Life]:
    lives: dict[tuple[str, int], _Life] = {}
    for id in state.requests:
        lives["request", id] = _Life()
    for id in state.transfers:
        lives["transfer", id] = _Life()
    spans = {span for (kind, id) in lives for span in source.spans(_KINDS[kind], id) if span[0] <= at}
    keys = {request.request_id: id for id, request in state.requests.items()}
    words = Wording(state.opened.block_size)
    for first, last in sorted(spans):
        for entry in source.entries(first, min(last, at)):
            text = words(entry.event)
            found = mentions(entry.event)
            touched = [("request", id) for id in found.requests] + [("transfer", id) for id in found.transfers]
            if isinstance(entry.event, AllocationRefused) and entry.event.key in keys:
                life = lives["request", keys[entry.event.key]]
                if life.first is not None:
                    life.refused = life.last = entry
            for name in touched:
                if name in lives:
                    life = lives[name]
                    if life.first is None:
                        life.first, life.text = entry, text
                    life.last = entry
                    if not isinstance(entry.event, AllocationRefused):
                        life.refused = None
    return lives


_KINDS: dict[str, Kind] = {"request": "request", "transfer": "transfer"}


def _request(state: State, request: Request, lives: dict[tuple[str, int], _Life], now: int, overtaken: int) -> Leak:
    life = lives["request", request.number]
    own = len(request.private())
    pinned = request.leaf.end
    holds = f"{count(own, 'block')} of its own, pins {count(pinned, 'cached block')}"
    why = ""
    if life.refused is not None:
        why = f"refused at event {life.refused.sequence} and never heard of again, still pins its path"
    elif overtaken >= _OVERTAKEN:
        why = f"{overtaken:,} requests have begun and ended since anything mentioned it: probably never released"
    return _leak("request", request.request_id, holds, life, now, why)


def _overtaken(source: Source, state: State, last: Entry | None) -> int:
    """How many requests have both begun and ended since an event."""
    if last is None or state.next_request - 1 - len(state.requests) < _OVERTAKEN:
        return 0
    begun = source.at(last.sequence).next_request
    living = sum(number >= begun for number in state.requests)
    return state.next_request - begun - living


def _leak(kind: str, name: str, holds: str, life: _Life | None, now: int, why: str) -> Leak:
    if life is None or life.first is None or life.last is None:
        return Leak(kind, name, holds, 0, 0, 0.0, 0.0, "before the log begins", why)
    age, idle = ((now - entry.time_ns) / 1e9 for entry in (life.first, life.last))
    return Leak(kind, name, holds, life.first.sequence, life.last.sequence, age, idle, life.text, why)


def _unowned(state: State) -> list[Leak]:
    found = []
    for tier in Tier:
        lost = set(range(state.pool(tier).capacity))
        for _, blocks in owners(state, state.place(tier)):
            lost.difference_update(blocks)
        if lost:
            name = block_name(tier, next(iter(sorted(lost)))) if len(lost) == 1 else f"{tier.name.lower()} blocks"
            found.append(Leak("block", name, ids(sorted(lost)), 0, 0, 0.0, 0.0, "", "nobody has it"))
    return found


def _unreachable(state: State) -> list[Leak]:
    """Runs of cleared trees: they match nothing and go when the last holder lets go."""
    found = []
    for root in state.retired:
        size, stack = 0, list(root.children.values())
        while stack:
            node = stack.pop()
            size += node.size
            stack += node.children.values()
        why = "" if root.pins else "nobody holds it, and nothing can match it"
        holds = f"{count(size, 'cached block')}, held by {count(root.pins, 'request')}"
        found.append(Leak("run", f"cleared tree {root.words!r}", holds, 0, 0, 0.0, 0.0, "the cache was cleared", why))
    return found
