"""Continuous batching over kvledger, to copy from. It counts tokens; which blocks hold them is the manager's business.

Token budget, chunked prefill, drafts, preemption, aborts from any thread, sessions of several turns, adapters, images.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

from kvledger import BlockTable, CacheManager, Item, ReleaseReason, namespace_key


@dataclass
class Request:
    """One request, or a session: ``turns`` are what the user says after each answer of ``length`` tokens."""

    id: str
    tokens: list[int]
    length: int
    items: Sequence[Item] = ()
    lora: str = ""
    turns: list[list[int]] = field(default_factory=list)
    answered: int = 0  # tokens of the present answer
    drafts: list[int] = field(default_factory=list)  # guesses of what follows the tokens
    failed: str = ""
    done: Event = field(default_factory=Event)


class Model(Protocol):
    """What computes: KV of tokens into slots, and the next token from the KV of all before it."""

    def draft(self, request: Request) -> list[int]:
        """Guess some of the next tokens."""

    def forward(self, request: Request, start: int, stop: int, table: BlockTable) -> list[int]:
        """Write the KV of these positions; returns the token that follows each of them."""


class Scheduler:
    """Calls :meth:`step` again and again, in the thread that owns the manager."""

    def __init__(self, manager: CacheManager, model: Model, budget: int = 64) -> None:
        self.manager, self.model, self.budget = manager, model, budget
        self.number = 0
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.computed: dict[str, int] = {}  # by the last step

    def submit(self, request: Request) -> None:
        """Queue a request. From any thread."""
        self.waiting.append(request)

    def abort(self, request: Request) -> None:
        """Give up a request whose client is gone. From any thread: the next step sees it."""
        request.failed = "aborted"

    def step(self) -> None:
        """Plan a step as one transaction, and compute it when that is published: nobody acts on what is not logged."""
        self.number += 1
        with self.manager.step(self.number):
            self.manager.poll()  # copies that have ended
            self.manager.commit(self.computed)
            self._end([each for each in self.running.values() if each.failed or each.answered >= each.length])
            batch = self._grow(self._wanted())
            self._admit(batch)
        self.computed = {id: self._compute(self.running[id], stop) for id, stop in batch.items()}

    def _end(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.manager.release(request.id, ReleaseReason.FAILED if request.failed else ReleaseReason.FINISHED)
            del self.running[request.id]
            request.done.set()

    def _wanted(self) -> dict[str, int]:
        """How far each running request is to be computed: what is known, as far as the budget goes."""
        wanted, left = {}, self.budget
        for id in self.running:
            start, known = self.manager.computed(id), self.manager.known(id)
            if left > 0:
                wanted[id] = min(known, start + left)
                left -= wanted[id] - start
        return wanted

    def _grow(self, wanted: dict[str, int]) -> dict[str, int]:
        """Give them room. Where there is none, the request that came last gives way and comes back later."""
        grown = self.manager.grow(wanted)
        while grown.refusal is not None and not grown.refusal.in_transfer:  # waiting would not help
            if grown.refusal.never_fits:
                victim = self.running[grown.refusal.request_id]
                victim.failed = str(grown.refusal)
                self._end([victim])
            else:
                id, victim = self.running.popitem()
                self.manager.release(id, ReleaseReason.PREEMPTED)
                self.waiting.appendleft(victim)
            wanted.pop(victim.id, None)
            grown = self.manager.grow(wanted)
        return {id: wanted[id] for id in wanted if id not in {*grown.not_ready, *grown.refused}}

    def _admit(self, batch: dict[str, int]) -> None:
        """Begin requests in order, each with a first chunk, if its whole prompt would fit."""
        left = self.budget - sum(stop - self.manager.computed(id) for id, stop in batch.items())
        while self.waiting and left > 0:
            request = self.waiting[0]
            if not request.failed:
                namespace = namespace_key(lora=request.lora)
                asked = self.manager.can_admit(
                    request.id, request.tokens, items=request.items, namespace=namespace, new_tokens=left, must_fit=True
                )
                if asked.refusal is not None:
                    if not asked.refusal.never_fits:
                        return
                    request.failed = str(asked.refusal)
            self.waiting.popleft()
            if request.failed:
                request.done.set()
                continue
            admission = self.manager.admit(request.id, asked)
            self.running[request.id] = request
            request.drafts = []
            if admission.ready:  # else grow() says when its cached part has arrived
                batch[request.id] = min(len(request.tokens), admission.cached_tokens + left)
                left -= batch[request.id] - admission.cached_tokens

    def _compute(self, request: Request, stop: int) -> int:
        """Run the model, keep the drafts that it confirms, take the others back. Returns how far it is computed."""
        manager, drafts, known = self.manager, request.drafts, len(request.tokens)
        start = manager.computed(request.id)
        following = self.model.forward(request, start, stop, manager.block_table(request.id))
        if stop < known:
            return stop  # a chunk of a prompt
        following = following[known - 1 - start :]
        right = 0
        while right < stop - known and drafts[right] == following[right]:
            right += 1
        manager.retract(request.id, len(drafts) - right)
        manager.append(request.id, following[right])  # known now, computed by the next step
        request.tokens += following[: right + 1]
        request.answered += right + 1
        request.drafts = []
        if request.answered >= request.length and request.turns:
            manager.append(request.id, request.turns[0])
            request.tokens += request.turns.pop(0)
            request.answered = 0
        elif request.answered < request.length:
            request.drafts = self.model.draft(request)[: request.length - request.answered - 1]
            manager.append(request.id, request.drafts)
        return known + right
