"""The hit rate of one device tier over its capacity: all capacities in one pass over the traffic.

A stack-distance algorithm (Mattson et al., 1970) for the policy of this cache. What is in use stands on top of the
stack, below it every block that nobody uses, by the time of its release. A cache with ``C`` blocks holds a block from
one use to the next exactly if, at every allocation in between, the blocks in use and those released after it number
less than ``C``. The distance of a block can fall (private blocks come and go), so its *maximum* counts, and because
evictions go through the stack from the bottom, that maximum is kept by one mark per capacity: everything at or below
the mark is gone. Paths are released deepest block first, so an ancestor always stands above its descendants, and the
blocks a request finds are a prefix of its path.

Where less than what was in use fits, the oldest requests would have been ended early: what is in use has an order too,
by the last request that came for it, and a mark of its own.

Sampling (SHARDS, Waldspurger et al., FAST 2015): of the blocks that nobody uses only those are remembered whose prefix
hashes below a threshold, and distances among them are scaled up. The log knows more than a trace of references does,
and that takes most of the noise away: what is in use is followed completely (it is bounded by the pool), and the log
tells how many of the other blocks each request found. So what was found and what was not are scaled each by its own
true number, and at the recorded capacity the estimate is exact, however few blocks are remembered.

Approximations: requests that could not have run at a capacity (see above); requests longer than a capacity; the private
copy of a block that was there but was left to compute; blocks that turned out bad count as there. Hints are ignored,
and there is no host tier: an exclusive one adds its size to the capacity. What a request found only between
its chunks counts as found wherever its block is there by then; elsewhere it might have looked at other moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvledger.debugger.source.source import Source
from kvledger.debugger.whatif.prefixes import chain, root_seed
from kvledger.debugger.whatif.recency import Places, Recency
from kvledger.debugger.whatif.traffic import Again, Begin, End, Forget, Grow, Moment, Publish, traffic
from statemachine.events import Tier
from statemachine.items import by_block

_HASHES = 1 << 64
_KINDS = 3
_IN_USE, _FOUND, _NOT_FOUND = range(_KINDS)
"""References to blocks that a living request holds, and to others by what the recorded cache answered."""
_OCTAVES_BELOW, _OCTAVES_ABOVE, _PER_OCTAVE = 5, 3, 6


@dataclass(frozen=True)
class Curve:
    """Hit rates by capacity."""

    capacities: list[int]
    """Device blocks, ascending."""
    hit_rates: list[float]
    requests: int
    blocks: int
    """Full blocks of all prompts, the references."""
    sampled_blocks: int
    """References to blocks that were in use, or in the sample."""
    rate: float


class _Live:
    """A request in flight: the slots of its blocks, root first, and the number of the last one.

    ``kinds`` and ``levels`` are how the blocks of its prompt were counted; ``known`` are those that were remembered.
    """

    def __init__(
        self,
        slots: Places,
        seed: int,
        kinds: npt.NDArray[np.int64],
        levels: npt.NDArray[np.int64],
        known: npt.NDArray[np.bool_],
    ) -> None:
        self.slots = slots
        self.seed = seed
        self.kinds = kinds
        self.levels = levels
        self.known = known


class CurveBuilder:
    """Builds a :class:`Curve` from traffic.

    Args:
        capacities: ascending.
        block_bytes: of the words of one block.
        rate: share of the blocks to remember when nobody uses them, more than 0 and at most 1.
    """

    def __init__(self, capacities: Sequence[int], block_bytes: int, rate: float = 1.0) -> None:
        self._capacities = np.array(capacities, np.int64)
        self._block_bytes = block_bytes
        self._rate = rate
        self._highest = np.uint64(int(rate * _HASHES) - 1)
        """Of the numbers of the blocks that are remembered."""
        self._never = len(capacities)
        """The level of what no capacity holds. A *level* is the first of the capacities that hold a block."""
        self._levels_seen = np.zeros((_KINDS, len(capacities) + 1), np.int64)
        """References to blocks that were remembered, by kind and level."""
        self._references = np.zeros(_KINDS, np.int64)
        """All references by kind."""
        self._requests = 0
        self._used, self._unused = Recency(), Recency()
        self._used_mark = np.full(len(capacities), -1, np.int64)
        """By capacity: the newest place whose block is gone."""
        self._unused_mark = np.full(len(capacities), -1, np.int64)
        self._slots: dict[int, int] = {}
        """By the number of a block's prefix (:func:`chain`)."""
        self._free_slots: list[int] = []
        self._numbers = np.zeros(0, np.uint64)
        self._pins = np.zeros(0, np.int32)
        self._places = np.zeros(0, np.int64)
        """In the order of what is used if pinned, else in the other."""
        self._floors = np.zeros(0, np.int32)
        """The level that a block cannot be below, whatever its place: smaller caches lost it before, and whoever uses
        it has not computed it again yet."""
        self._live: dict[int, _Live] = {}

    def feed(self, moment: Moment) -> None:
        """Take in the next transaction."""
        allocated = False
        for ask in moment.asks:
            match ask:
                case Begin():
                    self._begin(ask)
                    allocated = True
                case Grow():
                    allocated = True
                case Again() if ask.request in self._live:
                    self._again(ask)
                case Publish() if ask.request in self._live:
                    self._publish(ask)
                case End() if ask.request in self._live:
                    self._end(ask.request)
                case Forget() if ask.tier != Tier.HOST:
                    self._forget()
                case _:
                    pass
        if allocated:
            self._move_marks(moment.in_use)

    def curve(self) -> Curve:
        """The curve so far."""
        known = self._levels_seen.sum(axis=1)
        scale = self._references / np.maximum(known, 1)
        hits = scale @ np.cumsum(self._levels_seen, axis=1)[:, :-1]
        blocks = int(self._references.sum())
        rates = hits / max(blocks, 1)
        return Curve(self._capacities.tolist(), rates.tolist(), self._requests, blocks, int(known.sum()), self._rate)

    def _begin(self, ask: Begin) -> None:
        items = by_block(ask.items, self._block_bytes // 4)
        numbers = chain(ask.words, self._block_bytes, root_seed(ask.namespace), items)
        self._requests += 1
        slots = self._find(numbers)
        used = self._pins[slots] > 0
        known = used | self._remembered(slots)
        levels = np.maximum.accumulate(np.where(known, self._levels(slots), 0))  # nothing without what is before it
        positions = np.arange(len(slots))
        answers = np.where(positions < ask.limit, levels, self._never)
        kinds = np.where(used, _IN_USE, np.where(positions < ask.found, _FOUND, _NOT_FOUND))
        self._references += np.bincount(kinds, minlength=_KINDS)
        np.add.at(self._levels_seen, (kinds[known], answers[known]), 1)
        self._pin(slots, levels)
        seed = numbers[-1] if numbers else root_seed(ask.namespace)
        self._live[ask.request] = _Live(slots, seed, kinds, answers, known)

    def _again(self, ask: Again) -> None:
        """What was not found when the request came is found now: these references count anew."""
        live = self._live[ask.request]
        stop = min(ask.start + ask.found, len(live.kinds))
        part = slice(ask.start, stop)
        kinds, known = live.kinds[part], live.known[part]
        self._references -= np.bincount(kinds, minlength=_KINDS)
        np.subtract.at(self._levels_seen, (kinds[known], live.levels[part][known]), 1)
        levels = np.maximum.accumulate(self._levels(live.slots[:stop]))[part]
        kinds[:], known[:], live.levels[part] = _IN_USE, True, levels
        self._references[_IN_USE] += len(levels)
        self._levels_seen[_IN_USE] += np.bincount(levels, minlength=self._never + 1)

    def _publish(self, ask: Publish) -> None:
        live = self._live[ask.request]
        if ask.words:
            numbers = chain(ask.words, self._block_bytes, live.seed)
            slots = self._find(numbers)
            self._pin(slots, self._levels(slots))
            live.slots = np.concatenate([live.slots, slots])
            live.seed = numbers[-1]
        self._floors[live.slots[: ask.blocks]] = 0

    def _end(self, request: int) -> None:
        slots = self._live.pop(request).slots
        self._pins[slots] -= 1
        loose = slots[self._pins[slots] == 0]
        places = self._places[loose]
        floors = np.maximum(self._floors[loose], self._level(self._used_mark, places))
        self._used.remove(places)
        kept = (floors < self._never) & self._remembered(loose)
        self._drop(loose[~kept])
        loose = loose[kept]
        self._floors[loose] = floors[kept]
        self._places[loose[::-1]] = self._unused.push(len(loose))

    def _find(self, numbers: list[int]) -> Places:
        known = self._slots
        return np.array([known[number] if number in known else self._new(number) for number in numbers], np.int64)

    def _remembered(self, slots: Places) -> npt.NDArray[np.bool_]:
        """Which blocks are in the sample."""
        sampled: npt.NDArray[np.bool_] = self._numbers[slots] <= self._highest
        return sampled

    def _new(self, number: int) -> int:
        if not self._free_slots:
            size = len(self._numbers)
            more = max(size, 1024)
            self._numbers = np.concatenate([self._numbers, np.zeros(more, np.uint64)])
            self._pins = np.concatenate([self._pins, np.zeros(more, np.int32)])
            self._places = np.concatenate([self._places, np.zeros(more, np.int64)])
            self._floors = np.concatenate([self._floors, np.zeros(more, np.int32)])
            self._free_slots = list(range(size + more - 1, size - 1, -1))
        slot = self._free_slots.pop()
        self._slots[number] = slot
        self._numbers[slot] = number
        self._places[slot] = -1
        self._floors[slot] = self._never
        return slot

    def _drop(self, slots: Places) -> None:
        for slot in slots.tolist():
            number = int(self._numbers[slot])
            if self._slots.get(number) == slot:
                del self._slots[number]
        self._free_slots += slots.tolist()

    def _levels(self, slots: Places) -> npt.NDArray[np.int64]:
        """From which capacity on each block is there."""
        places = self._places[slots]
        by_place = np.where(
            self._pins[slots] > 0, self._level(self._used_mark, places), self._level(self._unused_mark, places)
        )
        return np.maximum(self._floors[slots], by_place)

    def _level(self, marks: Places, places: Places) -> npt.NDArray[np.int64]:
        # marks fall from one capacity to the next larger one
        return self._never - np.searchsorted(marks[::-1], places, side="left")

    def _pin(self, slots: Places, levels: npt.NDArray[np.int64]) -> None:
        """A request takes blocks: whoever had them before, it is the last to come for them."""
        pinned = self._pins[slots] > 0
        places = self._places[slots]
        self._used.remove(places[pinned])
        self._unused.remove(places[~pinned & (places >= 0)])
        self._places[slots[::-1]] = self._used.push(len(slots))
        self._floors[slots] = levels
        self._pins[slots] += 1

    def _move_marks(self, in_use: int) -> None:
        """Blocks were allocated: where there was no room, the bottom of the stack is gone."""
        room = self._capacities - in_use
        kept = np.floor(np.maximum(room, 0) * self._rate).astype(np.int64)
        self._unused_mark = np.maximum(self._unused_mark, self._unused.newest_without(kept))
        if room[0] < 0:
            private = in_use - self._used.live
            marks = self._used.newest_without(np.maximum(self._capacities - private, 0))
            self._used_mark = np.where(room < 0, np.maximum(self._used_mark, marks), self._used_mark)
        if self._unused.sparse:
            self._clean_up()
        if self._used.sparse:
            slots = np.flatnonzero(self._pins > 0)
            before = self._used.renumber()
            self._places[slots] = before[self._places[slots]]
            self._used_mark = before[self._used_mark + 1] - 1

    def _clean_up(self) -> None:
        """Forget what no capacity holds any more, and close the gaps between places."""
        slots = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        slots = slots[self._pins[slots] == 0]
        gone = self._places[slots] <= self._unused_mark[-1]
        self._unused.remove(self._places[slots[gone]])
        self._drop(slots[gone])
        slots = slots[~gone]
        before = self._unused.renumber()
        self._places[slots] = before[self._places[slots]]
        self._unused_mark = before[self._unused_mark + 1] - 1

    def _forget(self) -> None:
        """Nothing cached so far is found again."""
        slots = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        loose = slots[self._pins[slots] == 0]
        self._unused.remove(self._places[loose])
        self._free_slots += loose.tolist()
        self._floors[slots] = self._never
        self._slots.clear()


def default_capacities(recorded: int) -> list[int]:
    """From a thirty-second of the recorded capacity to eight times as much, six steps to a doubling."""
    steps = range(-_OCTAVES_BELOW * _PER_OCTAVE, _OCTAVES_ABOVE * _PER_OCTAVE + 1)
    return sorted({max(round(recorded * 2 ** (step / _PER_OCTAVE)), 1) for step in steps})


def curve(
    source: Source,
    capacities: Sequence[int] | None = None,
    rate: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> Curve:
    """The hit-rate curve of the traffic in a log.

    Args:
        capacities: device blocks; default: :func:`default_capacities`.
        rate: share of the blocks to remember, 1: all of them.
        progress: called with the sequence of the event that was reached.

    Raises:
        Contradiction: an event of the log contradicts the state that it meets.
    """
    first = source.at(source.first)
    chosen = sorted(set(capacities)) if capacities else default_capacities(first.device.pool.capacity)
    return build(traffic(source), chosen, first.block_bytes, rate, progress)


def build(
    moments: Iterable[Moment],
    capacities: Sequence[int],
    block_bytes: int,
    rate: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> Curve:
    """The curve of traffic from anywhere."""
    builder = CurveBuilder(capacities, block_bytes, rate)
    for moment in moments:
        builder.feed(moment)
        progress(moment.sequence)
    return builder.curve()
