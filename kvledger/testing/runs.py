"""What every simulation shares: what goes wrong, the processes it happens to, what a run did, and making it smaller.

A plan says what is served, what fails and when; a :class:`Simulation` runs the project's real code by it, on simulated
memory (:mod:`.weak_memory`), processes (:mod:`.schedule`) and system calls (:mod:`.system`).
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from typing import Any, Protocol

from ipc import LedgerError, LedgerExists, LedgerNotFound, SharedMemoryFull, control, reader, writer
from ipc.ownership import remove_objects
from kvledger.config import CacheConfig
from kvledger.manager.manager import CacheManager
from kvledger.testing.schedule import Process, Schedule, one_core
from kvledger.testing.system import System, installed
from kvledger.testing.weak_memory import Order
from statemachine.check import check
from statemachine.records.snapshot import state_digest
from workers import WorkerFailed, transfer
from workers.followers.follow import Follower
from workers.processes.loop import ORPHAN_GRACE_S

SEGMENT_BYTES = 8 << 10
_READERS = 16
"""Both small, since every word is compared at every point; rotation comes early too."""
SLOW_S, HANGS_S = 0.2, 2.0
"""What a copy takes that is slow, or hangs: less and more than the time-out."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong: ``victim`` is a process (``engine``, ``worker 0``, ``auditor``, …) or a pool (``device 0``)."""

    at: int
    """A kill happens at the n-th point of the schedule that the victim passes; what else goes wrong, at a worker's
    n-th copy or an engine's n-th publication. A pool is not there when the n-th engine starts."""
    victim: str
    what: str
    """``kill``; for workers also ``fail`` (a copy raises), ``slow`` (it takes long, but ends in time), ``hang`` (longer
    than its time-out) and ``die`` (killed in the middle of a copy, or right after it); for engines also ``die`` (right
    after it has published); for pools ``lose``."""
    incarnation: int = 1


class AnyPlan(Protocol):
    """Everything about a run but the schedule, which the seed draws while it runs. A frozen dataclass."""

    @property
    def command(self) -> str:
        """What runs such plans by their seeds."""

    @property
    def seed(self) -> int:
        """What the schedule is drawn from."""

    @property
    def order(self) -> Order:
        """Of the simulated memory."""

    @property
    def ranks(self) -> int:
        """Of each instance."""

    @property
    def operations(self) -> tuple[Any, ...]:
        """What is done, one after the other."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What goes wrong."""

    def simulate(self) -> Outcome:
        """Run it. Raises what broke."""


@dataclass
class Outcome:
    """What a run did."""

    plan: AnyPlan
    points: int = 0
    struck: list[str] = field(default_factory=list)
    """Where each process was that was killed (:func:`place_of`)."""
    engines: int = 0
    events: int = 0
    hits: int = 0
    received: int = 0
    """Requests whose blocks another instance has sent."""
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


class Simulation:
    """One run of a plan. ``programs``: as of :class:`.System`; ``engines``: names of the processes that are one."""

    def __init__(
        self, plan: AnyPlan, programs: dict[str, Callable[[list[str]], int]], engines: tuple[str, ...]
    ) -> None:
        self.outcome = Outcome(plan)
        self._faults = plan.faults
        self._engines = engines
        self._rng = random.Random(plan.seed ^ 0x5EED)
        self._schedule = Schedule(self._rng, plan.order)
        self._system = System(self._schedule, programs)
        self._incarnations: dict[str, int] = {}
        self._fates: dict[Process, Iterator[str | None]] = {}
        """What happens at the next copies of a worker or publications of an engine, one after the other."""

    def play(self, processes: dict[str, Callable[[], int]], *changes: tuple[Any, str, Any]) -> Outcome:
        """Run these processes, and all that they start, to their ends; with ``changes`` as for :func:`.installed`.

        Raises:
            whatever broke: ``WrongBytes``, ``InvariantViolation``, ``Diverged``, ``LogCorrupt``, a leftover, …
        """
        schedule = self._schedule
        common = (
            (writer.LogWriter, "publish", self._publish(writer.LogWriter.publish)),
            (transfer, "_ACK_SEGMENT_BYTES", SEGMENT_BYTES),
            (writer, "LEAST_SEGMENT_BYTES", SEGMENT_BYTES),
            (reader, "SPINS", 2),
            (control, "READERS", _READERS),
            (control, "_BYTES", control._LINES + 64 * _READERS),
        )
        with one_core(), installed(self._system, *common, *changes):
            for name, main in processes.items():
                schedule.spawn(name, main)
            schedule.run()
        left = [*self._system.names, *self._system.semaphores]
        assert not left, f"left in shared memory: {left}"
        self.outcome.points = schedule.points
        self.outcome.struck = [place_of(process.struck) for process in schedule.processes.values() if process.struck]
        return self.outcome

    # What goes wrong

    def born(self, name: str, process: Process) -> None:
        """The next incarnation of a victim has started: its faults are due."""
        number = self._incarnations[name] = self._incarnations.get(name, 0) + 1
        faults = [fault for fault in self._faults if fault.victim == name and fault.incarnation == number]
        kills = [fault.at for fault in faults if fault.what == "kill"]
        process.strike_at = process.lines + min(kills) if kills else 0
        planned = {fault.at: fault.what for fault in faults if fault.what != "kill"}
        self._fates[process] = map(planned.get, itertools.count(1))

    def copy(self, whole: Callable[[], Any], part: Callable[[], None]) -> Any:
        """Do what a copy does, or what is planned for it. ``part``: only so much of it as a process that dies does."""
        process = self._schedule.current()
        fault = next(self._fates[process])
        if fault == "fail":
            raise OSError("a copy failed, as planned")
        if fault in ("slow", "hang"):
            self._schedule.sleep(SLOW_S if fault == "slow" else HANGS_S)
        if fault == "die":
            part()
            process.buffer.collect()
            self._schedule.strike(process)
        return whole()

    def _publish(self, real: Callable[[writer.LogWriter], None]) -> Callable[[writer.LogWriter], None]:
        def publish(log: writer.LogWriter) -> None:
            real(log)
            process = self._schedule.current()
            if process.name in self._engines and next(self._fates[process]) == "die":
                self._schedule.strike(process)

        return publish

    # What operators and engines do

    def operate(self, name: str, ledger: str, serve: Callable[[], int], finished: Callable[[], bool]) -> int:
        """Start an engine, and another one when it has died."""
        while not finished():
            self.before_an_engine()
            engine = self._schedule.spawn(name, serve)
            self.born(name, engine)
            self.outcome.engines += 1
            self._schedule.wait(lambda engine=engine: engine.exit_code is not None, None)  # type: ignore[misc]
        if engine.exit_code:  # killed while it closed: its workers leave by themselves, the rest is for the operator
            self._schedule.sleep(2 * ORPHAN_GRACE_S)
            workers = [process for process in self._schedule.processes.values() if process.name.startswith("workers")]
            assert not any(process.alive and f" {ledger}" in process.name for process in workers)
            remove_objects(ledger)
        return 0

    def before_an_engine(self) -> None:
        """What happens before each start of one."""

    def make_room(self) -> None:
        """Somebody was refused space in ``/dev/shm``."""

    def open(self, ledger: str, config: CacheConfig, *, served: bool) -> CacheManager | None:
        """What an engine does at its start, and its operator when it cannot. ``served``: it may not be lost any more.

        Returns ``None`` if it has to be started again.
        """
        try:
            return CacheManager.open(ledger)
        except LedgerNotFound:
            pass
        except SharedMemoryFull:
            self.make_room()
            return None
        except LedgerError:
            if served:  # that would be a loss
                raise
            remove_objects(ledger)  # its engine died while it created it
        try:
            return CacheManager.create(ledger, config)
        except WorkerFailed:
            return None
        except LedgerExists:
            remove_objects(ledger)  # likewise, even earlier
            return None

    def wait(self, fold: Callable[[], object], done: Callable[[], bool]) -> None:
        """Fold until it is done. Raises ``AssertionError`` if it takes so long that it never will."""
        self.pause(fold, 60.0, done)
        assert done(), "it does not end"

    def pause(self, fold: Callable[[], object], seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """Fold for so long, or until it is done."""
        deadline = self._schedule.now_ns + int(seconds * 1e9)
        pause = 1e-5
        while not done() and self._schedule.now_ns < deadline:
            fold()
            self._schedule.sleep(pause)
            pause = min(2 * pause, 2e-2)

    def compare(self, ledger: str, manager: CacheManager) -> None:
        """The log, from as far back as it reaches, adds up to the engine's state."""
        follower = Follower(ledger, oldest=True)
        while records := follower.poll():
            follower.apply(records)
        assert follower.state is not None and not check(follower.state)
        assert state_digest(follower.state) == manager.digest(), "the replay has another state than the engine"
        follower.close()


class SimulationFailed(AssertionError):
    """A promise was broken; ``plan`` is the smallest one found that breaks it."""

    def __init__(self, plan: AnyPlan, reason: BaseException) -> None:
        self.plan = plan
        self.reason = reason
        super().__init__(
            f"{type(reason).__name__}: {reason}\n  again: {plan.command} --seed {plan.seed} --runs 1"
            f"\n  smallest plan that fails: {source_of(plan)}"
        )

    def program(self) -> str:
        """A Python program that runs the smallest plan, and so fails as this did."""
        reason = f"{type(self.reason).__name__}: {self.reason}".replace("\\", "/").replace('"', "'")
        return (
            f'"""A simulated run that fails. Found from seed {self.plan.seed}, and made smaller:\n\n{reason}\n"""\n\n'
            f"from {type(self.plan).__module__} import *\n\n{source_of(self.plan)}.simulate()\n"
        )


def source_of(value: Any) -> str:
    """A plan, or a part of one, as Python that makes it."""
    if is_dataclass(value):
        parts = ", ".join(f"{each.name}={source_of(getattr(value, each.name))}" for each in fields(value))
        return f"{type(value).__name__}({parts})"
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, tuple):
        return f"({''.join(source_of(each) + ', ' for each in value).rstrip(' ')})"
    return repr(value)


def simulate_or_shrink(plan: AnyPlan) -> Outcome:
    """Run a plan; if it fails, look for a smaller one that does.

    Raises:
        SimulationFailed: with what broke, the smallest plan that breaks it, and the command that repeats it.
    """
    try:
        return plan.simulate()
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


def _broken(plan: AnyPlan) -> BaseException | None:
    try:
        plan.simulate()
    except Exception as error:
        return error
    return None


def _simpler(plan: Any) -> Iterator[Any]:
    """Plans with something left out."""
    for index in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:index] + plan.faults[index + 1 :])
    for size in (4, 2, 1):
        for index in range(0, len(plan.operations), size):
            yield replace(plan, operations=plan.operations[:index] + plan.operations[index + size :])
    if plan.ranks > 1:
        yield replace(plan, ranks=1, faults=tuple(f for f in plan.faults if not f.victim.endswith(" 1")))
