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
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ipc import (
    LedgerError,
    LedgerExists,
    LedgerNotFound,
    SharedMemoryFull,
    control,
    reader,
    snapshots,
    writer,
)
from ipc.names import remove_objects
from kvledger.config import CacheConfig
from kvledger.manager import CacheManager
from kvledger.pattern import PatternEngine, Seeds, chain
from kvledger.testing.schedule import Process, Schedule, one_core
from kvledger.testing.system import CAPACITY, System, installed
from kvledger.testing.weak_memory import Order
from statemachine.check import check
from statemachine.content import words_of
from statemachine.encoding import snapshot, state_digest
from statemachine.errors import OutOfBlocks
from statemachine.events import Direction, HostPolicy, IntArray, ReleaseReason, Tier
from workers import WorkerFailed, numpy_pools, transfer
from workers.auditor import Auditor
from workers.follow import Follower
from workers.numpy_pools import NumpyPools
from workers.pools import pool_names

LEDGER = "simulated"
_BLOCK = 2
_SEGMENT_BYTES = 8 << 10
_SNAPSHOT_EVENTS = 4
_READERS = 16
"""Both small, since every word is compared at every point; rotation comes early too."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong: ``victim`` is ``engine``, ``worker 0``, ``worker 1``, ``auditor``, or a pool (``device 0``)."""

    at: int
    """The victim is killed at the so-manieth point of the schedule that it passes; what else happens, happens at a
    worker's so-manieth copy, an engine's so-manieth publication. A pool is not there when the so-manieth engine
    starts."""
    victim: str
    what: str
    """``kill``; for workers also ``fail`` (a copy raises), ``slow`` (it takes long, but ends in time), ``hang`` (longer
    than its time-out) and ``die`` (killed in the middle of a copy, or right after it); for engines also ``die`` (right
    after it has published); for pools ``lose``."""
    incarnation: int = 1


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
_SLOW_S, _HANGS_S = 0.2, 2.0
"""What a copy takes that is slow, or hangs: less and more than the time-out."""
_FULL_NS = 3_000_000_000
"""So long ``/dev/shm`` stays full, unless an engine is refused something before."""


@dataclass(frozen=True)
class Plan:
    """Everything about a run but the schedule, which the seed draws while it runs."""

    seed: int
    order: Order
    policy: HostPolicy
    ranks: int
    device_blocks: int
    host_blocks: int
    operations: tuple[Operation, ...]
    faults: tuple[Fault, ...]

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
        return cls(seed, order or memory, policy, ranks, *sizes, tuple(operations), tuple(faults))

    def config(self) -> CacheConfig:
        """The cache of the run."""
        return CacheConfig(
            block_size=_BLOCK,
            device_blocks=self.device_blocks,
            host_blocks=self.host_blocks,
            host_policy=self.policy,
            ranks=self.ranks,
            block_bytes=16,
            segment_bytes=_SEGMENT_BYTES,
            retain_bytes=None,
            transfer_timeout_s=0.5,
        )


@dataclass
class Outcome:
    """What a run did."""

    plan: Plan
    points: int = 0
    struck: list[str] = field(default_factory=list)
    """Where each process was that was killed (:func:`place_of`)."""
    engines: int = 0
    events: int = 0
    hits: int = 0
    verified_bytes: int = 0
    digest: str = ""

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return len(self.struck)


_PLACES = {
    "copying": "a copy",
    "_rotate": "a rotation",
    "publish": "the publication of a transaction",
    "stage": "the body of a transaction",
    "resume": "recovery",
    "adopt": "recovery",
    "open": "recovery",
    "create": "the creation of a ledger",
    "_read": "reading",
    "wait": "waiting",
    "poll": "waiting",
    "close": "closing",
}


def place_of(functions: list[str]) -> str:
    """What a process was doing that was in these functions, innermost first."""
    return next((place for name, place in _PLACES.items() if name in functions), "something else")


class SimulationFailed(AssertionError):
    """A promise was broken; ``plan`` is the smallest one found that breaks it."""

    def __init__(self, plan: Plan, reason: BaseException) -> None:
        self.plan = plan
        self.reason = reason
        super().__init__(
            f"{type(reason).__name__}: {reason}\n  again: kvledger simulate --seed {plan.seed} --runs 1"
            f"\n  smallest plan that fails: {plan!r}"
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


@dataclass
class Simulation:
    """One run of a plan."""

    plan: Plan
    outcome: Outcome = field(init=False)

    def __post_init__(self) -> None:
        self.outcome = Outcome(self.plan)
        self._rng = random.Random(self.plan.seed ^ 0x5EED)
        self._schedule = Schedule(self._rng, self.plan.order)
        programs = {"workers.transfer": self._worker, "workers.auditor": lambda _: self._follow()}
        self._system = System(self._schedule, programs)
        self._next = 0
        self._finished = False
        self._full_until = 0
        self._incarnations: dict[str, int] = {}
        self._fates: dict[Process, Iterator[str | None]] = {}
        """What happens at the next copies of a worker or publications of an engine, one after the other."""

    def run(self) -> Outcome:
        """Run it.

        Raises:
            whatever broke: ``WrongBytes``, ``InvariantViolation``, ``Diverged``, ``LogCorrupt``, a leftover, …
        """
        schedule = self._schedule
        changes = (
            (numpy_pools, "copy_blocks", self._copy(numpy_pools.copy_blocks)),
            (writer.LogWriter, "publish", self._publish(writer.LogWriter.publish)),
            (transfer, "_ACK_SEGMENT_BYTES", _SEGMENT_BYTES),
            (writer, "_LEAST_SEGMENT", _SEGMENT_BYTES),
            (reader, "SPINS", 2),
            (control, "READERS", _READERS),
            (control, "_BYTES", control._LINES + 64 * _READERS),
        )
        with one_core(), installed(self._system, *changes):
            schedule.spawn("operator", self._operate)
            schedule.spawn("auditor", self._audit)
            schedule.run()
        left = [*self._system.names, *self._system.semaphores]
        assert not left, f"left in shared memory: {left}"
        self.outcome.points = schedule.points
        self.outcome.struck = [place_of(process.struck) for process in schedule.processes.values() if process.struck]
        return self.outcome

    # What goes wrong

    def _born(self, name: str, process: Process) -> None:
        number = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        faults = [fault for fault in self.plan.faults if fault.victim == name and fault.incarnation == number]
        kills = [fault.at for fault in faults if fault.what == "kill"]
        process.strike_at = process.lines + min(kills) if kills else 0
        planned = {fault.at: fault.what for fault in faults if fault.what != "kill"}
        self._fates[process] = map(planned.get, itertools.count(1))

    def _copy(self, real: Callable[..., int]) -> Callable[..., int]:
        def copying(pools: NumpyPools, direction: Direction, sources: IntArray, targets: IntArray) -> int:
            process = self._schedule.current()
            fault = next(self._fates[process])
            if fault == "fail":
                raise OSError("a copy failed, as planned")
            if fault in ("slow", "hang"):
                self._schedule.sleep(_SLOW_S if fault == "slow" else _HANGS_S)
            if fault == "die":
                done = self._rng.randrange(len(sources) + 1)
                real(pools, direction, sources[:done], targets[:done])
                process.buffer.collect()
                self._schedule.strike(process)
            return real(pools, direction, sources, targets)

        return copying

    def _publish(self, real: Callable[[writer.LogWriter], None]) -> Callable[[writer.LogWriter], None]:
        def publish(log: writer.LogWriter) -> None:
            real(log)
            process = self._schedule.current()
            if process.name == "engine" and next(self._fates[process]) == "die":
                self._schedule.strike(process)

        return publish

    def _make_room(self, at_once: bool) -> None:
        if at_once or self._schedule.now_ns > self._full_until:
            self._system.capacity = CAPACITY

    # The processes

    def _worker(self, arguments: list[str]) -> int:
        self._born(f"worker {arguments[1]}", self._schedule.current())
        return transfer.main(arguments)

    def _operate(self) -> int:
        """Starts an engine, and another one when it has died."""
        while not self._finished:
            for fault in self.plan.faults:
                if fault.what == "lose" and fault.at == self.outcome.engines + 1:
                    self._system.names.pop(_POOLS[fault.victim], None)
            engine = self._schedule.spawn("engine", self._serve)
            self._born("engine", engine)
            self.outcome.engines += 1
            self._schedule.wait(lambda engine=engine: engine.exit_code is not None, None)  # type: ignore[misc]
        if engine.exit_code:  # killed while it closed: its workers leave by themselves, the rest is for the operator
            self._schedule.sleep(2 * transfer.ORPHAN_GRACE_S)
            assert not any(p.alive and p.name.startswith("workers") for p in self._schedule.processes.values())
            remove_objects(LEDGER)
        return 0

    def _serve(self) -> int:
        opened = self._open()
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
        self._wait(manager, lambda: not manager.state.transfers)
        self.outcome.digest = manager.take_digest().hex()
        self._compare(manager)
        self.outcome.events = manager.next_sequence - 1
        self.outcome.verified_bytes += engine.verified_bytes
        self._finished = True
        manager.close()
        return 0

    def _open(self) -> CacheManager | None:
        """What an engine does at its start, and its operator when it cannot."""
        try:
            return CacheManager.open(LEDGER)
        except LedgerNotFound:
            pass
        except SharedMemoryFull:
            self._make_room(True)
            return None
        except LedgerError:
            if self._next:  # it has served: that would be a loss
                raise
            remove_objects(LEDGER)  # its engine died while it created it
        try:
            return CacheManager.create(LEDGER, self.plan.config())
        except WorkerFailed:
            return None
        except LedgerExists:
            remove_objects(LEDGER)  # likewise, even earlier
            return None

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
            self._wait(manager, lambda: not manager.state.transfers)
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
                    self._wait(manager, lambda: False, 0.05)
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
        self._wait(manager, lambda: manager.ready(key))
        missing = len(seeds) - len(manager.block_table(key))
        if missing > 0 and not self._allocate(manager, key, missing):  # a swap-in failed, and there is no room now
            manager.release(key, ReleaseReason.FAILED)
            live.remove(request)
            return
        self._wait(manager, lambda: manager.ready(key))
        if extend:
            manager.extend(key)
        table, valid = manager.block_table(key), manager.cached_blocks(key)
        engine.write(table[valid : len(seeds)], seeds[valid:])
        engine.verify(key, table[: len(seeds)], seeds, manager.next_sequence - 1)
        manager.cache(key, len(seeds))
        request.computed = True

    def _allocate(self, manager: CacheManager, key: str, blocks: int) -> bool:
        try:
            manager.allocate({key: blocks})
        except OutOfBlocks:
            return False
        return True

    def _decode(self, manager: CacheManager, engine: PatternEngine, request: _Live, token: int) -> None:
        """A block of generated tokens, if there is a place for it."""
        self._wait(manager, lambda: manager.ready(request.key))
        start = manager.cached_blocks(request.key)
        if len(manager.block_table(request.key)) == start:
            return
        generated = np.full(_BLOCK, token, np.int32)
        request.tokens = np.concatenate([request.tokens, generated])
        engine.write(manager.block_table(request.key)[start : start + 1], request.seeds[start:])
        manager.cache(request.key, generated=generated)

    def _release(
        self, manager: CacheManager, engine: PatternEngine, live: list[_Live], reason: ReleaseReason, final: bool
    ) -> None:
        request = live.pop(0)
        if request.computed:
            seeds = request.seeds
            table = manager.block_table(request.key)
            engine.verify(request.key, table[: len(seeds)], seeds, manager.next_sequence - 1)
        manager.release(request.key, reason, final=final)

    def _wait(self, manager: CacheManager, done: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = self._schedule.now_ns + int(seconds * 1e9)
        pause = 1e-5
        while not done() and self._schedule.now_ns < deadline:
            manager.poll()
            self._schedule.sleep(pause)
            pause = min(2 * pause, 2e-2)
        assert done() or seconds < 1, f"transfers {[*manager.state.transfers]} do not end"

    def _compare(self, manager: CacheManager) -> None:
        """The log, from as far back as it reaches, adds up to the engine's state."""
        follower = Follower(LEDGER, oldest=True)
        while records := follower.poll():
            follower.apply(records)
        assert follower.state is not None and not check(follower.state)
        assert state_digest(follower.state) == manager.digest(), "the replay has another state than the engine"
        follower.close()

    def _audit(self) -> int:
        """Starts an auditor, and another one when it was killed. It checks every event and writes snapshots."""
        while True:
            child = self._schedule.spawn("auditing", self._follow)
            self._born("auditor", child)
            self._schedule.wait(lambda child=child: child.exit_code is not None, None)  # type: ignore[misc]
            if child.exit_code == 0:
                return 0
            if self._finished:  # killed after the ledger was removed: what it leaves is for the operator
                snapshots.remove_partial(LEDGER)
                for sequence in snapshots.sequences(LEDGER):
                    snapshots.remove(LEDGER, sequence)

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
                            snapshots.write(LEDGER, sequence, data)
                        if not auditor.follower.reader.exists():  # the ledger was removed meanwhile
                            snapshots.remove(LEDGER, sequence)
            self._schedule.sleep(pause)
        if auditor is not None:
            auditor.close()
        return 0


def simulate(plan: Plan) -> Outcome:
    """Run a plan. Raises what broke."""
    return Simulation(plan).run()


def simulate_or_shrink(plan: Plan) -> Outcome:
    """Run a plan; if it fails, look for a smaller one that does.

    Raises:
        SimulationFailed: with what broke, the smallest plan that breaks it, and the command that repeats it.
    """
    try:
        return simulate(plan)
    except Exception as first:
        error: BaseException = first
    smaller = True
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C: small enough
        while smaller:
            smaller = False
            for candidate in _simpler(plan):
                found = _broken(candidate)
                if type(found) is type(error):
                    plan, error, smaller = candidate, found, True
                    break
    raise SimulationFailed(plan, error)


def _broken(plan: Plan) -> BaseException | None:
    try:
        simulate(plan)
    except Exception as error:
        return error
    return None


def _simpler(plan: Plan) -> Iterator[Plan]:
    """Plans with something left out."""
    for index in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:index] + plan.faults[index + 1 :])
    for size in (4, 2, 1):
        for index in range(0, len(plan.operations), size):
            yield replace(plan, operations=plan.operations[:index] + plan.operations[index + size :])
    if plan.ranks > 1:
        yield replace(plan, ranks=1, faults=tuple(f for f in plan.faults if not f.victim.endswith(" 1")))
