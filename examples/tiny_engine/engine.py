"""The scheduler: continuous batching, chunked prefill, preemption, greedy decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from examples.tiny_engine.attention import PagedAttention, Rows
from examples.tiny_engine.dropin import DropIn
from examples.tiny_engine.model import Model
from kvledger import CacheManager, Marks, OutOfBlocks, Pools, ReleaseReason

_NAP_S = 0.0002


@dataclass(eq=False)
class Request:
    """A request in the engine. What of it is computed, and where, the manager knows."""

    name: str
    tokens: list[int]
    """The prompt, then what was generated."""
    length: int
    """Tokens when it is done."""
    prompt_length: int
    scores: list[float] = field(default_factory=list)
    """The logit of each generated token."""


class Completion(NamedTuple):
    """What a request came to: the tokens after its prompt, and the logit of each."""

    tokens: list[int]
    scores: list[float]


class Chunk(NamedTuple):
    """What a step computes of one request: its tokens from ``start`` to ``stop``."""

    request: Request
    start: int
    stop: int


class Engine:
    """Serves requests; :meth:`step` is one turn of the loop.

    Args:
        manager: kvledger's, or FastDeploy's behind the same calls.
        caching: use what other requests have cached.
        running: requests that are in the batch at most.
        budget: tokens computed per step at most.
        chunk: of these, tokens of one prompt at most.
        marks: notes which blocks are written and read (``kvledger check LEDGER --engine FILE``).
    """

    def __init__(
        self,
        model: Model,
        manager: CacheManager | DropIn,
        pools: Sequence[Pools],
        *,
        caching: bool = True,
        running: int = 8,
        budget: int = 64,
        chunk: int = 24,
        marks: Marks | None = None,
    ) -> None:
        self._model = model
        self._manager = manager
        self._attention = PagedAttention(pools)
        self._most_matched = None if caching else 0
        self._most_running = running
        self._budget = budget
        self._chunk = chunk
        self._marks = marks
        self._number = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        """Oldest first."""
        self._computed: dict[str, int] = {}
        """By the last step."""
        self.done: dict[str, Completion] = {}
        self.computed_tokens = 0
        self.cached_tokens = 0
        """That were found in the cache."""
        self.preemptions = 0
        self.smallest_gap = float("inf")
        """Between the best and the second best logit of any step: what greedy decoding decided on."""

    def submit(self, name: str, prompt: Iterable[int], generate: int) -> None:
        """Queue a request for so many new tokens.

        Raises:
            ValueError: it has no tokens, or could never fit.
        """
        tokens = [*prompt]
        if not tokens or generate < 1:
            raise ValueError(f"request {name!r}: a prompt has at least one token, and asks for at least one more")
        length = len(tokens) + generate
        config = self._manager.config
        needed = -(-length // config.block_size)
        if needed > config.device_blocks:
            raise ValueError(f"request {name!r} needs {needed} blocks, the device has {config.device_blocks}")
        self._waiting.append(Request(name, tokens, length, len(tokens)))

    def run(self) -> dict[str, Completion]:
        """Serve until nothing is left."""
        while self._waiting or self._running:
            if not self.step():
                time.sleep(_NAP_S)
        return self.done

    def step(self) -> int:
        """One turn; returns the tokens it computed. 0: everybody waits for copies, or has ended."""
        self._number += 1
        with self._manager.step(self._number):
            self._manager.poll()
            self._manager.commit(self._computed)
            self._end()
            able = self._grow()
            self._admit(able)
            chunks = self._chunks(able)
        self._computed = {}
        if chunks:
            self._compute(chunks)
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def _end(self) -> None:
        for request in [each for each in self._running if len(each.tokens) == each.length]:
            self._running.remove(request)
            self._manager.release(request.name)
            self.done[request.name] = Completion(request.tokens[request.prompt_length :], request.scores)

    def _grow(self) -> list[Request]:
        """Give room for the tokens of the next step; the youngest request gives its own up if there is none.

        Returns those that can be computed.
        """
        while True:
            grown = self._manager.grow({request.name: len(request.tokens) for request in self._running})
            if grown.refusal is None or grown.refusal.in_transfer:
                out = {*grown.not_ready, *grown.refused}
                return [request for request in self._running if request.name not in out]
            victim = self._running.pop()
            self._manager.release(victim.name, ReleaseReason.PREEMPTED)
            self._waiting.appendleft(victim)
            self.preemptions += 1

    def _admit(self, able: list[Request]) -> None:
        """Begin requests while there is room for all their tokens."""
        while self._waiting and len(self._running) < self._most_running:
            request = self._waiting[0]
            try:
                admission = self._manager.admit(request.name, request.tokens, max_blocks=self._most_matched)
            except OutOfBlocks:
                return
            self._running.append(self._waiting.popleft())
            self.cached_tokens += admission.cached_tokens
            if admission.ready:  # else grow() says when its cached part has arrived
                able.append(request)

    def _chunks(self, able: list[Request]) -> list[Chunk]:
        """Who computes how many tokens: one to decode, a chunk of the prompt to prefill."""
        chunks = [Chunk(each, self._manager.computed(each.name), len(each.tokens)) for each in able]
        # decoding first: a long prompt must not hold up the others' next token
        chunks.sort(key=lambda chunk: chunk.stop - chunk.start > 1)
        left = self._budget
        for place, (request, start, stop) in enumerate(chunks):
            count = min(stop - start, self._chunk, left)
            chunks[place] = Chunk(request, start, start + count)
            left -= count
        return [chunk for chunk in chunks if chunk.stop > chunk.start]

    def _compute(self, chunks: list[Chunk]) -> None:
        tokens, rows = self._rows(chunks)
        logits = self._model.forward(tokens, rows, self._attention).numpy()
        for (request, _, stop), row in zip(chunks, logits, strict=True):
            self._computed[request.name] = stop
            if stop < len(request.tokens):
                continue  # the prompt goes on
            second, best = np.partition(row, -2)[-2:]
            self.smallest_gap = min(self.smallest_gap, float(best - second))
            request.tokens.append(int(row.argmax()))
            self._manager.append(request.name, request.tokens[-1])
            request.scores.append(float(best))
        self.computed_tokens += len(tokens)

    def _rows(self, chunks: list[Chunk]) -> tuple[np.ndarray, Rows]:
        size = self._manager.config.block_size
        spans, positions, slots, tables, tokens = [], [], [], [], []
        begin = 0
        for request, start, stop in chunks:
            spans.append(slice(begin, begin + stop - start))
            begin += stop - start
            places = np.arange(start, stop)
            table = self._manager.block_table(request.name)
            positions.append(places)
            slots.append(table[places // size].astype(np.int64) * size + places % size)
            tables.append(table[: -(-stop // size)])
            if self._marks is not None:
                row, used = len(tables) - 1, tables[-1].tolist()
                self._marks.computed(request.name, start, stop, used[start // size :], row)
                self._marks.read(request.name, used, row)
            tokens += request.tokens[start:stop]
        return np.array(tokens), Rows(spans, np.concatenate(positions), np.concatenate(slots), tables)
