"""Hit rates beside the best that any policy could reach, and what hints bring.

``python -m benchmarks.hitrate [--quick]``: the conversation trace (the sample where that is not at hand), 64 requests
in flight, through a real manager. The bound is clairvoyant: it evicts what is needed last (Belady), knows what is never
needed again, and holds what running requests use, as any cache must. A prefix is never needed later than what continues
it, so that this order never cuts a path. *Hints*: every request that nobody continues is released as ``final``; to
continue is to repeat all but the last block, which traces of block hashes leave partial.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import figures as f
from benchmarks.replay import conversation
from kvledger.run.run import Run, RunOptions
from kvledger.run.traces import Trace
from statemachine.content import words_of
from statemachine.events import HostPolicy

_CAPACITIES = (5_000, 10_000, 30_000)
_IN_FLIGHT = 64


class Path(NamedTuple):
    """Block names of a request, root first."""

    blocks: list[int]
    """Of the prompt and what is published behind it."""
    prompt: int
    """So many of them are the prompt's."""
    limit: int
    """So many may hit."""


def paths(trace: Trace, block_size: int) -> list[Path]:
    """Blocks of equal content behind equal prefixes get equal numbers."""
    names: dict[tuple[int, bytes], int] = {}
    made = []
    for request in trace.requests:
        words = bytes(words_of(request.tokens, items=request.items))
        prompt = len(words)
        words += bytes(words_of(request.output)) if len(request.output) else b""
        size = 4 * block_size
        parent = names.setdefault((-1, request.namespace), len(names))
        blocks = []
        for start in range(0, len(words) - size + 1, size):
            parent = names.setdefault((parent, words[start : start + size]), len(names))
            blocks.append(parent)
        made.append(Path(blocks, prompt // size, (prompt - 4 * trace.capped) // size))
    return made


class Clairvoyant:
    """A cache that knows the future."""

    def __init__(self, requests: Sequence[Path], capacity: int) -> None:
        self._requests = requests
        self._free = capacity
        self._uses: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            for block in request.blocks[: request.prompt]:
                self._uses.setdefault(block, []).append(number)
        self._pins: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        """Block → its depth."""
        self._idle: list[tuple[int, int, int]] = []
        """Heap: needed last first, deepest first."""
        self._running: deque[Path] = deque()
        self._now = 0

    def hit_rate(self) -> float:
        """Share of the prompts' blocks that hit."""
        hits = total = 0
        for number, request in enumerate(self._requests):
            self._now = number
            if len(self._running) == _IN_FLIGHT:
                self._release()
            hits += self._hits(request)
            total += request.prompt
            self._begin(request)
        return hits / max(total, 1)

    def _hits(self, request: Path) -> int:
        for count, block in enumerate(request.blocks[: request.limit]):
            if block not in self._cached:
                return count
        return max(request.limit, 0)

    def _begin(self, request: Path) -> None:
        for block in request.blocks:
            self._pins[block] = self._pins.get(block, 0) + 1
        for depth, block in enumerate(request.blocks):
            if block in self._cached:
                continue
            if not self._free and not self._evict():
                while self._running and not self._evict():
                    self._release()
            if not self._free:
                break  # longer than the cache
            self._free -= 1
            self._cached[block] = depth
        self._running.append(request)

    def _release(self) -> None:
        for block in self._running.popleft().blocks:
            self._pins[block] -= 1
            if not self._pins[block]:
                del self._pins[block]
                if block in self._cached:
                    heapq.heappush(self._idle, (-self._next_use(block), -self._cached[block], block))

    def _next_use(self, block: int) -> int:
        uses = self._uses.get(block, ())
        at = bisect_right(uses, self._now)
        return uses[at] if at < len(uses) else 1 << 40

    def _evict(self) -> bool:
        while self._idle:
            until, _, block = heapq.heappop(self._idle)
            if block in self._cached and block not in self._pins and -until == self._next_use(block):
                del self._cached[block]
                self._free += 1
                return True
        return False


def hit_rate(trace: Trace, capacity: int, block_size: int) -> float:
    """Through a real manager, its log on."""
    options = RunOptions(
        device_blocks=capacity,
        host_blocks=0,
        host_policy=HostPolicy.OFF,
        block_size=block_size,
        data=False,
        in_flight=_IN_FLIGHT,
    )
    return Run(trace, options).execute().device_hit_rate


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """By capacity: without hints and with perfect ones."""
    trace = conversation(quick)
    block_size = trace.block_size or 16
    requests = paths(trace, block_size)
    last = {block: number for number, request in enumerate(requests) for block in request.blocks[: request.prompt]}
    ends = [
        not request.blocks or last.get(request.blocks[max(request.prompt - 2, 0)], -1) <= number
        for number, request in enumerate(requests)
    ]
    variants = {
        "no hints": trace._replace(requests=[one._replace(final=False) for one in trace.requests]),
        "hints": trace._replace(requests=[one._replace(final=end) for one, end in zip(trace.requests, ends)]),
    }
    made = []
    for capacity in (1_000,) if quick else _CAPACITIES:
        bound = Clairvoyant(requests, capacity).hit_rate()
        for name, variant in variants.items():
            rate = hit_rate(variant, capacity, block_size)
            made.append(
                f.Figure(
                    name=f"{capacity:,} blocks, {name}",
                    unit="% hits",
                    ours=100 * rate,
                    against="clairvoyant bound",
                    theirs=100 * bound,
                    ratios=[rate / bound],
                )
            )
    return made, []


if __name__ == "__main__":
    f.alone("hit rates", figures)
