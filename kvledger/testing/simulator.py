"""The deterministic simulator: engine, workers and a follower in one process, from one seed, bytes and all.

A :class:`Plan` (what the engine serves, what fails and when) is drawn first, as data. Then the project's real code
runs it: :class:`CacheManager`, transfer workers, log, recovery, on simulated memory (:mod:`.weak_memory`), processes
(:mod:`.schedule`) and system calls (:mod:`.system`). The engine computes real patterns and verifies every byte before
it attends, as ``kvledger run`` does. Every run ends with the invariants, the digest of a replay and an empty
``/dev/shm``. A failing plan is made smaller until nothing more can be left out.

TigerBeetle's VOPR and FoundationDB's simulation are the models.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from ipc import LedgerNotFound, SharedMemoryFull, snapshots
from ipc.ownership import remove_objects
from kvledger.config import CacheConfig
from kvledger.manager.manager import CacheManager
from kvledger.run.pattern import PatternEngine, Seeds, chain
from kvledger.testing.runs import SEGMENT_BYTES, Fault, Outcome, Simulation
from kvledger.testing.system import CAPACITY
from kvledger.testing.weak_memory import Order
from statemachine.content import words_of
from statemachine.errors import OutOfBlocks
from statemachine.events import Direction, HostPolicy, IntArray, ReleaseReason, Tier
from statemachine.records.snapshot import snapshot
from workers import transfer
from workers.followers.auditor import Auditor
from workers.pools import numpy as numpy_pools
from workers.pools.memory import pool_names
from workers.pools.numpy import NumpyPools

LEDGER = "simulated"
_BLOCK = 2
_SNAPSHOT_EVENTS = 4


@dataclass(frozen=True)
class Operation:
    """One step of the engine.

    ``serve`` a prompt, or only ``begin`` it and compute it at an ``extend``; for the oldest request ``decode`` a block,
    ``reserve`` one, ``trim`` what is reserved, ``release`` or ``preempt`` it; for the whole cache ``clear``, ``resize``
    and ``poll``. ``fill``: from now on nothing more fits into ``/dev/shm``, for a while.
    """

    what: str
    prompt: tuple[int, ...] = ()
    final: bool = False


_KINDS = ["serve"] * 10 + ["begin", "extend", "release"] * 3 + ["decode"] * 2
_KINDS += ["reserve", "trim", "clear", "resize", "poll", "preempt", "fill"]
_LEAST_PAUSE_S, _MOST_PAUSE_S = 2e-4, 5e-2
"""Between two looks of the auditor; longer while nothing happens."""
_POOLS = {
    f"{tier} {rank}": name.lstrip("/")
    for rank in (0, 1)
    for tier, name in zip(("device", "host"), pool_names(LEDGER, rank), strict=True)
}
"""What a fault calls them, and their names."""
_COPIES = 8
"""A worker's first so many copies may meet a fault."""
_FULL_NS = 3_000_000_000
"""So long ``/dev/shm`` stays full, unless an engine is refused something before."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run but the schedule, which the seed draws while it runs."""

    command: ClassVar[str] = "kvledger simulate"
    seed: int
    order: Order
    policy: HostPolicy
    ranks: int
    device_blocks: int
    host_blocks: int
    operations: tuple[Operation, ...]
    faults: tuple[Fault, ...]
    tokens: bool = False
    """Whether the engine counts tokens: grows, commits, and does so in steps of one transaction each."""

    @classmethod
    def draw(cls, seed: int, order: Order | None = None) -> Plan:
        """The plan of a seed."""
        rng = random.Random(seed)
        memory = rng.choice(list(Order))
        policy = rng.choice([HostPolicy.EXCLUSIVE] * 3 + [HostPolicy.WRITE_THROUGH] * 2 + [HostPolicy.OFF])
        ranks = rng.choice((1, 1, 2))
        prompts = [tuple(rng.choice((1, 1, 1, 2)) for _ in range(rng.randrange(1, 6))) for _ in range(20)]
        kinds = _KINDS
        if rng.random() < 0.2:  # few prompts, that do not fit into the device pool together: they come and go
            policy, ranks = HostPolicy.EXCLUSIVE, 2
            prompts = [(first, *rng.choices((1, 2), k=rng.randrange(2, 5))) for first in range(1, 4)]
            kinds = ["serve", "serve", "release", "poll"]
        operations = []
        for _ in range(rng.randrange(3, 20)):
            operations.append(Operation(rng.choice(kinds), rng.choice(prompts), rng.random() < 0.2))
        faults = []
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            victim = rng.choice(["engine", "engine", "auditor", *(f"worker {rank}" for rank in range(ranks))])
            what = rng.choice(("kill", "die", "die", "fail", "hang", "slow")) if "worker" in victim else "kill"
            at = 1 + int(rng.random() * 4000 if what == "kill" else rng.random() ** 2 * _COPIES)
            faults.append(Fault(at, victim, what, rng.choice((1, 1, 1, 2))))
        if ranks > 1 and rng.random() < 0.5:  # one rank dies while the other is behind
            at = rng.randrange(1, 6)
            faults += [Fault(at, "worker 1", "slow"), Fault(at + rng.choice((0, 1, 1)), "worker 0", "die")]
        if any(fault.victim == "engine" for fault in faults) and rng.random() < 0.5:
            pools = [name for name in _POOLS if int(name.split()[1]) < ranks]
            lost = rng.sample(pools, rng.choice((0, 0, 1, 2)))
            faults += [Fault(2, pool, "lose") for pool in lost]
            if lost and rng.random() < 0.5:  # between two steps of recovery
                faults.append(Fault(rng.randrange(1, 6), "engine", "die", 2))
            else:  # anywhere in them
                faults.append(Fault(1 + int(rng.random() * 600), "engine", "kill", 2))
        sizes = rng.randrange(6, 10), 0 if policy == HostPolicy.OFF else rng.randrange(4, 12)
        tokens = rng.random() < 0.5
        return cls(seed, order or memory, policy, ranks, *sizes, tuple(operations), tuple(faults), tokens)

    def simulate(self) -> Outcome:
        """Run it. Raises what broke."""
        return EngineSimulation(self).run()

    def config(self) -> CacheConfig:
        """The cache of the run."""
        return CacheConfig(
            block_size=_BLOCK,
            device_blocks=self.device_blocks,
            host_blocks=self.host_blocks,
            host_policy=self.policy,
            ranks=self.ranks,
            block_bytes=16,
            segment_bytes=SEGMENT_BYTES,
            retain_bytes=None,
            transfer_timeout_s=0.5,
        )


@dataclass
class _Live:
    """A running request. ``computed``: its whole prompt is, and cached."""

    key: str
    tokens: npt.NDArray[np.int32]
    computed: bool = False

    @property
    def seeds(self) -> Seeds:
        """What its blocks hold."""
        return chain(words_of(self.tokens), 4 * _BLOCK, b"")


class _Patient:
    """A manager whose caller makes room in ``/dev/shm`` when it is refused something, and asks again."""

    def __init__(self, manager: CacheManager, make_room: Callable[[bool], None]) -> None:
        self._manager = manager
        self._make_room = make_room

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._manager, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            while True:
                self._make_room(False)
                try:
                    return found(*arguments, **options)
                except SharedMemoryFull:
                    self._make_room(True)

        return call


class EngineSimulation(Simulation):
    """One run of a :class:`Plan`."""

    def __init__(self, plan: Plan) -> None:
        programs = {"workers.transfer": self._worker, "workers.followers.auditor": lambda _: self._follow()}
        super().__init__(plan, programs, ("engine",))
        self.plan = plan
        self._next = 0
        self._finished = False
        self._full_until = 0

    def run(self) -> Outcome:
        """See :meth:`Simulation.play`."""
        copying = numpy_pools, "copy_blocks", self._copy(numpy_pools.copy_blocks)
        operator = functools.partial(self.operate, "engine", LEDGER, self._serve, lambda: self._finished)
        return self.play({"operator": operator, "auditor": self._audit}, copying)

    # What goes wrong

    def _copy(self, real: Callable[..., int]) -> Callable[..., int]:
        def copying(pools: NumpyPools, direction: Direction, sources: IntArray, targets: IntArray) -> int:
            def part() -> None:
                done = self._rng.randrange(len(sources) + 1)
                real(pools, direction, sources[:done], targets[:done])

            whole: int = self.copy(lambda: real(pools, direction, sources, targets), part)
            return whole

        return copying

    def before_an_engine(self) -> None:
        """Lose the pools that it will not find."""
        for fault in self.plan.faults:
            if fault.what == "lose" and fault.at == self.outcome.engines + 1:
                self._system.names.pop(_POOLS[fault.victim], None)

    def make_room(self) -> None:
        """The operator has."""
        self._system.capacity = CAPACITY

    def _make_room(self, at_once: bool) -> None:
        if at_once or self._schedule.now_ns > self._full_until:
            self.make_room()

    # The processes

    def _worker(self, arguments: list[str]) -> int:
        self.born(f"worker {arguments[1]}", self._schedule.current())
        return transfer.main(arguments)

    def _serve(self) -> int:
        opened = self.open(LEDGER, self.plan.config(), served=bool(self._next))
        if opened is None:
            return 1
        manager = cast("CacheManager", _Patient(opened, self._make_room))
        engine = PatternEngine(manager.pools)
        live: list[_Live] = []
        while self._next < len(self.plan.operations):
            operation = self.plan.operations[self._next]
            self._next += 1  # an engine that dies here has lost this request, as its clients would see
            self._perform(manager, engine, live, operation)
        while live:
            self._release(manager, engine, live, ReleaseReason.FINISHED, False)
        self.wait(manager.poll, lambda: not manager.state.transfers)
        self.outcome.digest = manager.take_digest().hex()
        self.compare(LEDGER, manager)
        self.outcome.events = manager.next_sequence - 1
        self.outcome.verified_bytes += engine.verified_bytes
        self._finished = True
        manager.close()
        return 0

    def _perform(self, manager: CacheManager, engine: PatternEngine, live: list[_Live], operation: Operation) -> None:
        what = operation.what
        oldest = live[0] if live else None
        if what in ("serve", "begin"):
            request = self._begin(manager, engine, live, operation.prompt)
            if request is not None and what == "serve":
                self._compute(manager, engine, live, request)
        elif what == "extend" and live:
            request = next((request for request in live if not request.computed), live[0])
            self._compute(manager, engine, live, request, extend=True)
        elif what in ("decode", "reserve") and oldest is not None and oldest.computed:
            self._allocate(manager, oldest.key, 1)
            if what == "decode":
                self._decode(manager, engine, oldest, operation.prompt[0])
        elif what == "trim" and oldest is not None and oldest.computed:
            manager.trim(oldest.key, manager.cached_blocks(oldest.key))
        elif what in ("release", "preempt") and live:
            reason = ReleaseReason.FINISHED if what == "release" else ReleaseReason.PREEMPTED
            self._release(manager, engine, live, reason, operation.final)
        elif what == "fill":
            self._system.capacity = self._system.used()
            self._full_until = self._schedule.now_ns + _FULL_NS
        elif what == "clear":
            manager.clear(force=True)
        elif what == "resize" and not live:
            self.wait(manager.poll, lambda: not manager.state.transfers)
            manager.resize(Tier.DEVICE, self.plan.device_blocks - len(operation.prompt) // 2)
        else:
            manager.poll()

    def _begin(
        self, manager: CacheManager, engine: PatternEngine, live: list[_Live], prompt: tuple[int, ...]
    ) -> _Live | None:
        key = f"{self.outcome.engines}.{self._next}"
        tokens = np.repeat(np.array(prompt, np.int32), _BLOCK)
        while True:
            try:
                admission = manager.admit(key, tokens, max_blocks=len(prompt))
                break
            except OutOfBlocks:
                if live:
                    self._release(manager, engine, live, ReleaseReason.PREEMPTED, False)
                elif manager.state.transfers:
                    self.pause(manager.poll, 0.05)
                else:
                    return None  # it does not fit into the pool at all
        self.outcome.hits += admission.device_blocks + admission.host_blocks
        live.append(_Live(key, tokens))
        return live[-1]

    def _compute(
        self, manager: CacheManager, engine: PatternEngine, live: list[_Live], request: _Live, *, extend: bool = False
    ) -> None:
        """Compute what is not cached of a prompt; with ``extend`` only what nobody else has cached meanwhile."""
        key, seeds = request.key, request.seeds
        self.wait(manager.poll, lambda: manager.ready(key))
        missing = len(seeds) - len(manager.block_table(key))
        if missing > 0 and not self._allocate(manager, key, missing):  # a swap-in failed, and there is no room now
            manager.release(key, ReleaseReason.FAILED)
            live.remove(request)
            return
        self.wait(manager.poll, lambda: manager.ready(key))
        if extend:
            manager.extend(key)
        table, valid = manager.block_table(key), manager.cached_blocks(key)
        engine.write(table[valid : len(seeds)], seeds[valid:])
        engine.verify(key, table[: len(seeds)], seeds, manager.next_sequence - 1)
        if self.plan.tokens:
            manager.commit({key: manager.known(key)})
        else:
            manager.cache(key, len(seeds))
        request.computed = True

    def _allocate(self, manager: CacheManager, key: str, blocks: int) -> bool:
        if self.plan.tokens:
            with manager.step(self._next):
                manager.poll()
                grown = manager.grow({key: manager.room(key) + blocks * _BLOCK})
            return not grown.refused
        try:
            manager.allocate({key: blocks})
        except OutOfBlocks:
            return False
        return True

    def _decode(self, manager: CacheManager, engine: PatternEngine, request: _Live, token: int) -> None:
        """A block of generated tokens, if there is a place for it."""
        self.wait(manager.poll, lambda: manager.ready(request.key))
        start = manager.cached_blocks(request.key)
        if len(manager.block_table(request.key)) == start:
            return
        generated = np.full(_BLOCK, token, np.int32)
        request.tokens = np.concatenate([request.tokens, generated])
        engine.write(manager.block_table(request.key)[start : start + 1], request.seeds[start:])
        if self.plan.tokens:
            manager.append(request.key, [*generated.tolist(), token])
            manager.retract(request.key, 1)  # a draft that was wrong
            manager.commit({request.key: manager.known(request.key)})
        else:
            manager.cache(request.key, len(request.tokens) // _BLOCK, generated=generated)

    def _release(
        self, manager: CacheManager, engine: PatternEngine, live: list[_Live], reason: ReleaseReason, final: bool
    ) -> None:
        request = live.pop(0)
        if request.computed:
            seeds = request.seeds
            table = manager.block_table(request.key)
            engine.verify(request.key, table[: len(seeds)], seeds, manager.next_sequence - 1)
        if self.plan.tokens:
            held = manager.release(request.key, reason, final=final, hold=True)
            manager.poll()
            manager.release(held)
        else:
            manager.release(request.key, reason, final=final)

    def _audit(self) -> int:
        """Starts an auditor, and another one when it was killed. It checks every event and writes snapshots."""
        while True:
            child = self._schedule.spawn("auditing", self._follow)
            self.born("auditor", child)
            self._schedule.wait(lambda child=child: child.exit_code is not None, None)  # type: ignore[misc]
            if child.exit_code == 0:
                return 0
            if self._finished:  # killed after the ledger was removed: what it leaves is for the operator
                remove_objects(LEDGER)

    def _follow(self) -> int:
        auditor = None
        saved = 0
        pause = _LEAST_PAUSE_S
        while not self._finished:
            pause = min(2 * pause, _MOST_PAUSE_S)
            try:
                auditor = auditor or Auditor(LEDGER, check_every=8, publish=False)
                if auditor.step():
                    pause = _LEAST_PAUSE_S
            except LedgerNotFound:
                if self._finished:
                    break
            if auditor is not None:
                assert auditor.verdict is None, auditor.verdict
                sequence, state = auditor.follower.sequence, auditor.follower.state
                if state is not None and sequence >= saved + _SNAPSHOT_EVENTS:
                    saved = sequence
                    data = snapshot(state)
                    if not len(data) % 8:  # simulated memory has whole words only
                        with contextlib.suppress(SharedMemoryFull):
                            snapshots.write(LEDGER, sequence, data, auditor.follower.reader.identity)
                        if not auditor.follower.reader.exists():  # the ledger was removed meanwhile
                            snapshots.remove(LEDGER, sequence, auditor.follower.reader.identity)
            self._schedule.sleep(pause)
        if auditor is not None:
            auditor.close()
        return 0
