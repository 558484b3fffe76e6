"""The simulator's split pair: a prefill and a decode instance with their pushers, in one process, from one seed.

The decode instance reserves room and sends addresses; the prefill instance computes layer by layer while its pushers
push. Both verify every byte before they attend, and again before they give blocks back: a pusher that writes where
it may not any more is found. Engines and pushers are killed, copies fail, are slow, or hang.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kvledger.config import CacheConfig
from kvledger.errors import HandoffError
from kvledger.handoff import sender
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.manager.manager import CacheManager
from kvledger.run.pattern import PatternEngine, Seeds, chain
from kvledger.testing.runs import HANGS_S, SEGMENT_BYTES, Fault, Outcome, Simulation
from kvledger.testing.weak_memory import Order
from statemachine import events
from statemachine.content import words_of
from statemachine.errors import OutOfBlocks
from statemachine.events import IntArray, ReleaseReason
from workers import WorkerFailed, transfer
from workers.handoff import pusher, shared_memory, tickets
from workers.handoff.pushes import Address
from workers.pools.numpy import NumpyPools
from workers.processes import loop

PREFILL, DECODE = "prefill", "decode"
_BLOCK = 2
_SLOTS = 15
"""Tickets that may be out at once: every word is compared at every point."""
_COPIES = 8
"""A pusher's first so many copies may meet a fault."""
_LEAST_PAUSE_S, _MOST_PAUSE_S = 1e-4, 2e-2
"""Between two looks of the prefill instance; longer while nothing happens."""


@dataclass(frozen=True)
class Request:
    """One step of the decode instance: ``ask`` the other one for a prompt, ``serve`` it here, ``release`` the oldest
    request, whether it has arrived or not, or ``pause``."""

    what: str
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class SplitPlan:
    """See :class:`.runs.AnyPlan`. Victims are ``prefill``, ``decode``, ``pusher 0`` and ``pusher 1``."""

    command: ClassVar[str] = "kvledger simulate --split"
    seed: int
    order: Order
    ranks: int
    device_blocks: int
    operations: tuple[Request, ...]
    faults: tuple[Fault, ...]

    @classmethod
    def draw(cls, seed: int) -> SplitPlan:
        """The plan of a seed."""
        rng = random.Random(seed)
        order, ranks = rng.choice(list(Order)), rng.choice((1, 1, 2))
        prompts = [tuple(rng.choice((1, 1, 2, 3)) for _ in range(rng.randrange(1, 5))) for _ in range(10)]
        kinds = ["ask"] * 4 + ["serve", "release", "release", "pause"]
        pushers = [f"pusher {rank}" for rank in range(ranks)]
        faults = []
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            victim = rng.choice([PREFILL, DECODE, *pushers])
            what = rng.choice(("kill", "die", "die", "fail", "slow", "hang") if victim in pushers else ("kill", "die"))
            if what == "kill":
                at = 1 + int(rng.random() * 3000)
            else:
                at = 1 + int(rng.random() ** 2 * (_COPIES if victim in pushers else 30))
            faults.append(Fault(at, victim, what, rng.choice((1, 1, 1, 2))))
        if rng.random() < 0.3:  # blocks are taken back, and used, while a pusher has stopped in the middle of them
            kinds = ["ask", "serve", "release", "pause"]
            faults.append(Fault(rng.randrange(1, 6), "pusher 0", "hang"))
        operations = tuple(Request(rng.choice(kinds), rng.choice(prompts)) for _ in range(rng.randrange(3, 14)))
        return cls(seed, order, ranks, rng.randrange(5, 10), operations, tuple(faults))

    def simulate(self) -> Outcome:
        """Run it. Raises what broke."""
        return SplitSimulation(self).run()

    def config(self) -> CacheConfig:
        """The cache of both instances."""
        return CacheConfig(
            block_size=_BLOCK,
            device_blocks=self.device_blocks,
            ranks=self.ranks,
            layers=2,
            block_bytes=16,
            segment_bytes=SEGMENT_BYTES,
            retain_bytes=None,
            transfer_timeout_s=0.5,
        )


@dataclass
class _Order:
    """What the decode instance has asked for, on the engines' own wire."""

    key: str
    tokens: npt.NDArray[np.int32]
    address: str


def _tokens(prompt: tuple[int, ...]) -> npt.NDArray[np.int32]:
    return np.repeat(np.array(prompt, np.int32), _BLOCK)


def _seeds(tokens: npt.NDArray[np.int32]) -> Seeds:
    return chain(words_of(tokens), 4 * _BLOCK, b"")


class SplitSimulation(Simulation):
    """One run of a :class:`SplitPlan`."""

    def __init__(self, plan: SplitPlan) -> None:
        programs: dict[str, Callable[[list[str]], int]] = {
            "workers.transfer": transfer.main,
            "workers.handoff.pusher": self._pusher,
        }
        super().__init__(plan, programs, (PREFILL, DECODE))
        self.plan = plan
        self._next = 0
        self._wire: list[_Order] = []
        self._sends = False
        """There was a sender."""
        self._decoded = False
        self._finished = False

    def run(self) -> Outcome:
        """See :meth:`Simulation.play`."""
        operators: dict[str, Callable[[], int]] = {
            "operator of prefill": functools.partial(
                self.operate, PREFILL, PREFILL, self._prefill, lambda: self._finished
            ),
            "operator of decode": functools.partial(self.operate, DECODE, DECODE, self._decode, lambda: self._decoded),
        }
        return self.play(
            operators,
            (shared_memory, "_copy", self._copy(shared_memory._copy)),
            (pusher, "_ACK_SEGMENT_BYTES", SEGMENT_BYTES),
            (sender, "_SEGMENT_BYTES", SEGMENT_BYTES),
            (tickets, "SLOTS", _SLOTS),
            (tickets, "_WORDS", _SLOTS + 1),
        )

    def _copy(self, real: Callable[..., None]) -> Callable[..., None]:
        def copying(here: NumpyPools, there: NumpyPools, index: int, sources: IntArray, targets: IntArray) -> None:
            def part() -> None:
                done = self._rng.randrange(len(sources) + 1)
                if done:
                    real(here, there, index, sources[:done], targets[:done])

            self.copy(lambda: real(here, there, index, sources, targets), part)

        return copying

    def _pusher(self, arguments: list[str]) -> int:
        self.born(f"pusher {arguments[1]}", self._schedule.current())
        return loop.run(arguments, pusher.Pusher, orphan_grace_s=0.0)

    # The prefill instance

    def _prefill(self) -> int:
        manager = self.open(PREFILL, self.plan.config(), served=self._sends)
        if manager is None:
            return 1
        try:
            sender = Sender(manager)
        except WorkerFailed:
            manager.close(keep=True)
            return 1
        self._sends = True
        engine = PatternEngine(manager.pools)
        seeds: dict[str, Seeds] = {}
        step, pause = 0, _LEAST_PAUSE_S

        def fold() -> None:
            for done in sender.poll():
                self._verify(manager, engine, done.request_id, seeds.pop(done.request_id))
                manager.release(done.request_id)

        while not self._decoded:
            if self._wire and self._admit(manager, self._wire[0]):
                order = self._wire.pop(0)
                step += 1
                seeds[order.key] = _seeds(order.tokens)
                self._compute(manager, engine, sender, order, step)
                pause = _LEAST_PAUSE_S
            fold()
            self._schedule.sleep(pause * self._rng.random())
            pause = min(2 * pause, _MOST_PAUSE_S)
        self.wait(fold, lambda: not sender.busy())
        self.compare(PREFILL, manager)
        self.outcome.verified_bytes += engine.verified_bytes
        self._finished = True
        manager.close()
        return 0

    def _admit(self, manager: CacheManager, order: _Order) -> bool:
        try:
            manager.admit(order.key, order.tokens, blocks=len(order.tokens) // _BLOCK)
        except OutOfBlocks:  # what is being pushed has them
            return False
        return True

    def _compute(self, manager: CacheManager, engine: PatternEngine, sender: Sender, order: _Order, step: int) -> None:
        """Order the push, then write layer by layer."""
        key, seeds = order.key, _seeds(order.tokens)
        sender.send(key, Address.parse(order.address), step=step)
        table, valid = manager.block_table(key), manager.cached_blocks(key)
        for layer in range(manager.config.layers):
            engine.write_layer(layer, table[valid:], seeds[valid:])
            for progress in sender.progress:
                progress.wrote(step, layer + 1)
            self._schedule.sleep(1e-5 * self._rng.randrange(20))
        manager.cache(key, len(seeds))

    # The decode instance

    def _decode(self) -> int:
        manager = self.open(DECODE, self.plan.config(), served=bool(self._next))
        if manager is None:
            return 1
        receiver = Receiver(manager)
        engine = PatternEngine(manager.pools)
        live: dict[str, Seeds] = {}
        waits: set[str] = set()

        def hear() -> None:
            for received in receiver.poll():
                waits.discard(received.request_id)
                if received.outcome == events.Outcome.DONE:
                    self.outcome.received += 1
                    self._verify(manager, engine, received.request_id, live[received.request_id])
                    manager.cache(received.request_id, len(live[received.request_id]))
                else:
                    self._serve(manager, engine, live, received.request_id)

        self.wait(receiver.fold, lambda: self._sends)
        while self._next < len(self.plan.operations):
            operation = self.plan.operations[self._next]
            self._next += 1  # an engine that dies here has lost this request, as its clients would see
            key = f"{self.outcome.engines}.{self._next}"
            if operation.what == "pause":
                self.pause(hear, 0.1 * sum(operation.prompt))
            elif operation.what == "release" and live:
                self._release(manager, engine, live, next(iter(live)), waits)
            elif operation.what != "release":
                tokens = _tokens(operation.prompt)
                live[key] = _seeds(tokens)
                self.outcome.hits += manager.match(key, tokens, max_blocks=len(operation.prompt)).device_blocks
                if operation.what == "ask" and self._ask(manager, receiver, key, tokens):
                    waits.add(key)
                else:
                    self._serve(manager, engine, live, key)
            self._schedule.sleep(1e-5 * self._rng.randrange(1, 100))
            hear()
        self.wait(hear, lambda: not waits)
        if any(fault.what == "hang" for fault in self.plan.faults):
            self.pause(hear, HANGS_S)  # what it writes then is seen
        for key in list(live):
            self._release(manager, engine, live, key, waits)
        self.wait(receiver.fold, lambda: not receiver.busy())
        self.outcome.digest = manager.take_digest().hex()
        self.compare(DECODE, manager)
        self.outcome.events = manager.next_sequence - 1
        self.outcome.verified_bytes += engine.verified_bytes
        self._decoded = True
        manager.close()
        return 0

    def _ask(self, manager: CacheManager, receiver: Receiver, key: str, tokens: npt.NDArray[np.int32]) -> bool:
        """Whether the prefill instance was asked for what is not cached here."""
        missing = len(tokens) // _BLOCK - len(manager.block_table(key))
        if not missing:
            return False
        try:
            address = receiver.reserve(key, missing, peer=PREFILL)
        except (HandoffError, OutOfBlocks):
            return False
        self._schedule.current().buffer.fence()  # a socket is one
        self._wire.append(_Order(key, tokens, address.text()))
        return True

    def _serve(self, manager: CacheManager, engine: PatternEngine, live: dict[str, Seeds], key: str) -> None:
        """Compute here what is not cached of a request; without room for it, it is given up."""
        seeds = live[key]
        missing = len(seeds) - len(manager.block_table(key))
        if missing:
            try:
                manager.allocate({key: missing})
            except OutOfBlocks:
                manager.release(key, ReleaseReason.FAILED)
                del live[key]
                return
        table, valid = manager.block_table(key), manager.cached_blocks(key)
        engine.write(table[valid:], seeds[valid:])
        self._verify(manager, engine, key, seeds)
        manager.cache(key, len(seeds))

    def _release(
        self, manager: CacheManager, engine: PatternEngine, live: dict[str, Seeds], key: str, waits: set[str]
    ) -> None:
        seeds = live.pop(key)
        if key in waits:
            waits.discard(key)
        else:
            self._verify(manager, engine, key, seeds)
        manager.release(key)

    def _verify(self, manager: CacheManager, engine: PatternEngine, key: str, seeds: Seeds) -> None:
        engine.verify(key, manager.block_table(key)[: len(seeds)], seeds, manager.next_sequence - 1)
