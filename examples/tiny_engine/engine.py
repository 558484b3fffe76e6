"""The scheduler: continuous batching, chunked prefill, preemption, greedy decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from examples.tiny_engine.attention import PagedAttention, Rows
from examples.tiny_engine.blocks import BlockManager, Request
from examples.tiny_engine.model import Model
from workers.pools.interface import Pools

_NAP_S = 0.0002


class Completion(NamedTuple):
    """What a request came to: the tokens after its prompt, and the logit of each."""

    tokens: list[int]
    scores: list[float]


class Engine:
    """Serves requests; :meth:`step` is one turn of the loop.

    Args:
        running: requests that are in the batch at most.
        budget: tokens computed per step at most.
        chunk: of these, tokens of one prompt at most.
    """

    def __init__(
        self,
        model: Model,
        blocks: BlockManager,
        pools: Sequence[Pools],
        *,
        running: int = 8,
        budget: int = 64,
        chunk: int = 24,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._attention = PagedAttention(pools)
        self._most_running = running
        self._budget = budget
        self._chunk = chunk
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        """Oldest first."""
        self.done: dict[str, Completion] = {}
        self.computed_tokens = 0
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
        needed = -(-length // self._blocks.block_size)
        if needed > self._blocks.device_blocks:
            raise ValueError(f"request {name!r} needs {needed} blocks, the device has {self._blocks.device_blocks}")
        self._waiting.append(Request(name, tokens, length, len(tokens)))

    def run(self) -> dict[str, Completion]:
        """Serve until nothing is left."""
        while self._waiting or self._running:
            if not self.step():
                time.sleep(_NAP_S)
        return self.done

    def step(self) -> int:
        """One turn; returns the tokens it computed. 0: everybody waits for copies."""
        self._hear()
        self._admit()
        self._grow()
        batch = self._batch()
        if batch:
            self._compute(batch)
        return sum(count for _, count in batch)

    def _hear(self) -> None:
        """A swap-in that failed: compute again what did not come."""
        by_name = {request.name: request for request in self._running}
        for name, computed, table in self._blocks.poll():
            if name in by_name:
                by_name[name].computed, by_name[name].table = computed, table

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._most_running and self._blocks.admit(self._waiting[0]):
            self._running.append(self._waiting.popleft())
        if self._waiting and not self._running and not self._blocks.moving():
            raise RuntimeError(f"request {self._waiting[0].name!r} cannot be admitted although nothing else runs")

    def _grow(self) -> None:
        """Blocks for the tokens of the next step; the youngest requests give theirs up if there are none."""
        size = self._blocks.block_size
        while short := [r for r in self._running if len(r.tokens) > len(r.table) * size]:
            if self._blocks.grow(short):
                return
            victim = self._running.pop()
            self._blocks.release(victim, preempted=True)
            victim.computed = 0
            victim.table = victim.table[:0]
            self._waiting.appendleft(victim)
            self.preemptions += 1

    def _batch(self) -> list[tuple[Request, int]]:
        """Who computes how many tokens: one to decode, a chunk of the prompt to prefill."""
        batch = []
        left = self._budget
        # decoding first: a long prompt must not hold up the others' next token
        for request in sorted(self._running, key=lambda r: len(r.tokens) - r.computed > 1):
            count = min(len(request.tokens) - request.computed, self._chunk, left)
            if count and self._blocks.ready(request):
                batch.append((request, count))
                left -= count
        return batch

    def _compute(self, batch: list[tuple[Request, int]]) -> None:
        tokens, rows = self._rows(batch)
        logits = self._model.forward(tokens, rows, self._attention).numpy()
        for (request, count), row in zip(batch, logits, strict=True):
            request.computed += count
            self._blocks.publish(request)
            if request.computed < len(request.tokens):
                continue  # the prompt goes on
            second, best = np.partition(row, -2)[-2:]
            self.smallest_gap = min(self.smallest_gap, float(best - second))
            request.tokens.append(int(row.argmax()))
            request.scores.append(float(best))
            if len(request.tokens) == request.length:
                self._running.remove(request)
                self._blocks.release(request)
                self.done[request.name] = Completion(request.tokens[request.prompt_length :], request.scores)
        self.computed_tokens += len(tokens)

    def _rows(self, batch: list[tuple[Request, int]]) -> tuple[np.ndarray, Rows]:
        size = self._blocks.block_size
        spans, positions, slots, tables, tokens = [], [], [], [], []
        start = 0
        for request, count in batch:
            spans.append(slice(start, start + count))
            start += count
            stop = request.computed + count
            places = np.arange(request.computed, stop)
            positions.append(places)
            slots.append(request.table[places // size].astype(np.int64) * size + places % size)
            tables.append(request.table[: -(-stop // size)])
            tokens += request.tokens[request.computed : stop]
        return np.array(tokens), Rows(spans, np.concatenate(positions), np.concatenate(slots), tables)
