"""The simulator: the real log on weakly ordered memory, and whole ledgers with crashes, from seeds."""

from __future__ import annotations

import inspect
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import typer

from ipc import Control, LedgerNotFound, LogCorrupt, LogReader, LogWriter, reader, writer
from ipc.ownership import remove_objects
from ipc.recovery import recover
from ipc.writer import next_epoch
from kvledger.cli.simulate import simulate as command
from kvledger.manager import forks
from kvledger.manager.ranks import Ranks
from kvledger.run.pattern import WrongBytes
from kvledger.testing import runs
from kvledger.testing.runs import AnyPlan, Fault, SimulationFailed, simulate_or_shrink
from kvledger.testing.schedule import Process, Schedule
from kvledger.testing.simulator import Operation, Plan
from kvledger.testing.split import SplitPlan
from kvledger.testing.system import System, installed
from kvledger.testing.weak_memory import Order
from statemachine.commands import FinishTransfer
from statemachine.events import HostPolicy, Outcome
from tests.waiting import PATIENCE_S

SEEDS = 100


def deliver(seed: int, order: Order, count: int = 15, size: int = 300) -> None:
    """One writer, one reader, some transactions; the reader must get exactly them."""
    rng = random.Random(seed)
    schedule = Schedule(rng, order)
    sent: list[tuple[int, int, bytes, bytes]] = []
    got: list[tuple[int, int, bytes, bytes]] = []

    def write() -> int:
        log = LogWriter.create("log", schema_hash=1, segment_bytes=16 << 10, retain_bytes=None)
        for number in range(count):
            entries = [(1, number, bytes([i]) * 24, bytes([number]) * rng.randrange(size)) for i in range(3)]
            log.append(entries)
            sent.extend(entries)
        while len(got) < 3 * count:
            schedule.sleep(0.01)
        log.close()
        return 0

    def read() -> int:
        log = None
        while len(got) < 3 * count:
            try:
                log = log or LogReader("log")
                got.extend((record.kind, record.subject, record.args, record.payload) for record in log.poll())
            except LedgerNotFound:
                pass
            schedule.sleep(1e-6 * rng.randrange(20))
        return 0

    schedule.spawn("writer", write)
    schedule.spawn("reader", read)
    with pytest.MonkeyPatch.context() as patch, installed(System(schedule, {})):
        patch.setattr(writer, "LEAST_SEGMENT_BYTES", 8 << 10)
        schedule.run()
    assert got == sent


def succeed(seed: int, order: Order) -> None:
    """A writer is killed somewhere, and another one goes on where it ended; the reader must get what both agree on."""
    rng = random.Random(seed)
    schedule = Schedule(rng, order)
    sent: list[int] = []
    got: list[int] = []
    done = False

    def write() -> int:
        log = LogWriter.create("log", schema_hash=1, segment_bytes=16 << 10, retain_bytes=None)
        for number in range(1000):
            log.append([(1, number, bytes(24), bytes([1]) * rng.randrange(200)) for _ in range(rng.randrange(1, 4))])
        return 0

    def operate() -> int:
        nonlocal done
        first = schedule.spawn("writer", write)
        first.strike_at = rng.randrange(400, 2_200)  # once it is created
        schedule.wait(lambda: first.exit_code is not None, None)
        schedule.sleep(1e-6 * rng.randrange(100))
        control = Control.open("log")
        control.lock()
        last = recover("log", 1, lambda records: sent.extend(record.sequence for record in records)).last_sequence
        log = LogWriter.resume(control, last, epoch=next_epoch(control), segment_bytes=16 << 10, retain_bytes=None)
        log.append([(1, 7, bytes(24), b"successor")])
        sent.append(last + 1)
        while len(got) < len(sent):
            schedule.sleep(0.01)
        done = True
        log.close(unlink=True)
        return 0

    def read() -> int:
        log = None
        while not done:
            try:
                log = log or LogReader("log")
                got.extend(record.sequence for record in log.poll())
            except LedgerNotFound:
                pass
            schedule.sleep(1e-6 * rng.randrange(20))
        return 0

    schedule.spawn("operator", operate)
    schedule.spawn("reader", read)
    with pytest.MonkeyPatch.context() as patch, installed(System(schedule, {})):
        patch.setattr(writer, "LEAST_SEGMENT_BYTES", 8 << 10)
        schedule.run()
    assert got == sent == list(range(1, len(sent) + 1))


def begin(seed: int, count: int = 20) -> None:
    """Ledgers are created while somebody tries to open them: one is not there yet, or it is whole."""
    schedule = Schedule(random.Random(seed), Order.WEAK)
    opened = 0

    def create() -> int:
        for number in range(count):
            control = Control.create(f"log{number}", schema_hash=7)
            while opened == number:
                schedule.sleep(1e-6)
            remove_objects(f"log{number}")
            control.close()
        return 0

    def look() -> int:
        nonlocal opened
        while opened < count:
            try:
                control = Control.open(f"log{opened}")
            except LedgerNotFound:
                schedule.sleep(1e-6)
                continue
            assert control.schema_hash == 7
            control.close()
            opened += 1
        return 0

    schedule.spawn("creator", create)
    schedule.spawn("other", look)
    with installed(System(schedule, {})):
        schedule.run()


def test_a_ledger_that_is_being_created_is_not_there_or_whole() -> None:
    for seed in range(SEEDS):
        begin(seed)


def park(seed: int) -> None:
    """A worker that sleeps for hours unless it is woken, and a writer that writes rarely."""
    rng = random.Random(seed)
    schedule = Schedule(rng, Order.WEAK)
    count = 12
    got = 0

    def write() -> int:
        log = LogWriter.create("log", schema_hash=1, segment_bytes=16 << 10, retain_bytes=None)
        while not log._listeners:
            log.listen()
            schedule.sleep(1e-5)
        for number in range(count):
            log.append([(1, number, bytes(24), b"")])
            pause = 1e-6 * rng.randrange(1, 60)
            while got <= number:
                schedule.sleep(pause)
                pause *= 2
        log.close()
        return 0

    def work() -> int:
        nonlocal got
        log = None
        while got < count:
            try:
                log = log or LogReader("log", worker=True, kind_mask=1 << 1)
                got += len(log.wait(10_000.0))
            except LedgerNotFound:
                schedule.sleep(1e-5)
        return 0

    schedule.spawn("writer", write)
    schedule.spawn("worker", work)
    with pytest.MonkeyPatch.context() as patch, installed(System(schedule, {})):
        patch.setattr(writer, "LEAST_SEGMENT_BYTES", 8 << 10)
        patch.setattr(reader, "SPINS", 2)
        schedule.run()
    assert schedule.now_ns < 1_000 * 10**9, "it slept through a transaction"


def test_a_parked_worker_is_never_forgotten() -> None:
    """The writer stores the hint and loads the parked word, the worker does it the other way round."""
    for seed in range(2 * SEEDS):
        park(seed)


def changed(function: Callable[..., Any], old: str, new: str, module: ModuleType) -> Callable[..., Any]:
    """A method with some of its lines replaced."""
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, "the code has changed: adapt the planted fault"
    space: dict[str, Any] = {}
    exec(compile(source.replace(old, new), inspect.getsourcefile(function) or "", "exec"), vars(module), space)
    return space[function.__name__]  # type: ignore[no-any-return]


FENCE = "    self._release()\n    self._acquire()\n"
PUBLISH = (
    "    self._release()  # who sees the hint sees all that it covers, commit words included\n    self._acquire()\n"
)
COMMITS = "    for word, value in commits:\n        words32[word] = value\n"
HINT = "    self._words[TAIL] = offset\n"
FAULTS = {
    "the fence before the commit words": (
        LogWriter,
        "publish",
        COMMITS + PUBLISH,
        PUBLISH + COMMITS,
        writer,
        {Order.WEAK},
    ),
    "the writer does not fence": (LogWriter, "publish", PUBLISH, "    pass\n", writer, {Order.WEAK}),
    "the hint before the commit words": (
        LogWriter,
        "publish",
        COMMITS + PUBLISH + HINT,
        HINT + PUBLISH + COMMITS,
        writer,
        set(Order),
    ),
    "the reader does not fence": (
        LogReader,
        "poll",
        FENCE + "    return self._read",
        "    return self._read",
        reader,
        {Order.WEAK},
    ),
}


@pytest.mark.parametrize("order", Order)
def test_the_log_delivers_what_was_written(order: Order) -> None:
    for seed in range(SEEDS):
        deliver(seed, order)


@pytest.mark.parametrize("order", Order)
def test_the_log_delivers_across_segments(order: Order) -> None:
    for seed in range(SEEDS // 2):
        deliver(seed, order, count=40, size=900)


@pytest.mark.parametrize("order", Order)
def test_the_log_delivers_across_writers(order: Order) -> None:
    for seed in range(3 * SEEDS):
        succeed(seed, order)


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_memory_order_is_found_where_it_matters(
    fault: str, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On x86-64 (TSO) the fences are not needed; on a weakly ordered machine the log is damaged without them."""
    owner, name, old, new, module, where = FAULTS[fault]
    monkeypatch.setattr(owner, name, changed(getattr(owner, name), old, new, module))
    found = 0
    for seed in range(SEEDS):
        try:
            deliver(seed, order)
        except LogCorrupt:
            found += 1
    assert bool(found) == (order in where)


def survived(draw: Callable[[int], AnyPlan], seeds: int) -> tuple[Counter[str], list[runs.Outcome]]:
    """Where the processes of so many plans were killed, and what the runs did."""
    outcomes = [simulate_or_shrink(draw(seed)) for seed in range(seeds)]
    return Counter(place for outcome in outcomes for place in outcome.struck), outcomes


def test_engines_workers_and_followers_survive_what_seeds_plan() -> None:
    """The short form of ``make soak``."""
    known = dict(forks._living)
    struck, outcomes = survived(Plan.draw, 1_000)
    assert struck.total() > 400 and sum(outcome.engines for outcome in outcomes) > 1_200
    assert sum(outcome.verified_bytes for outcome in outcomes) > 200_000
    # the faults strike where it hurts
    for place in ("the body of a transaction", "the publication of a transaction", "a copy", "recovery"):
        assert struck[place] >= 10, struck
    assert forks._living == known, "a real fork knows managers of simulated engines"


def test_a_split_pair_survives_what_seeds_plan() -> None:
    """The short form of ``kvledger simulate --split``."""
    struck, outcomes = survived(SplitPlan.draw, 300)
    assert struck.total() > 100 and sum(outcome.received for outcome in outcomes) > 200
    assert sum(outcome.verified_bytes for outcome in outcomes) > 100_000
    for place in ("the publication of a transaction", "a copy", "recovery"):
        assert struck[place] >= 5, struck


@pytest.mark.parametrize(
    ("where", "broken"),
    [
        ("kvledger.handoff.receiver.claimed", lambda tickets: {}),
        ("workers.handoff.pusher.Pusher._may_send", lambda self, push: True),
    ],
    ids=["nobody asks who still writes", "layers go before they are written"],
)
def test_a_split_pair_that_is_broken_is_found(monkeypatch: pytest.MonkeyPatch, where: str, broken: object) -> None:
    monkeypatch.setattr(where, broken)

    def run_all() -> None:
        for seed in range(200):
            SplitPlan.draw(seed).simulate()

    with pytest.raises(WrongBytes):
        run_all()


def test_lines_that_are_not_looked_at_store_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores are looked for behind lines that can have stored something only; this looks behind the others too."""
    real = Process._line
    skipped = 0

    def line(self: Process, frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal skipped
        if not self._storing and self._frame == id(frame):
            skipped += 1
            for map, before, _ in self.buffer._writable:
                assert map == before, f"{frame.f_code.co_filename} stores something before line {frame.f_lineno}"
        return real(self, frame, event, argument)

    monkeypatch.setattr(Process, "_line", line)
    for seed in range(20):
        Plan.draw(seed).simulate()
        SplitPlan.draw(seed).simulate()
    assert skipped > 20_000


def test_a_seed_does_the_same_thing_again() -> None:
    first, again = Plan.draw(2).simulate(), Plan.draw(2).simulate()
    assert first == again and first.points > 1000
    first, again = SplitPlan.draw(2).simulate(), SplitPlan.draw(2).simulate()
    assert first == again and first.points > 1000


def test_a_failing_plan_is_made_smaller_and_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that believes its workers before they have copied: the answer of one rank is taken for all."""
    real = Ranks.started

    def hasty(self: Ranks, sequence: int) -> None:
        real(self, sequence)
        for id, transfer in list(self._state.transfers.items()):
            if id in self._state.transfers and not transfer.quarantined:
                self._execute(FinishTransfer(id, Outcome.DONE, len(transfer.targets)))

    monkeypatch.setattr(Ranks, "started", hasty)
    plans = (replace(Plan.draw(seed), policy=HostPolicy.EXCLUSIVE, host_blocks=8) for seed in range(200))

    def run_all() -> None:
        for plan in plans:
            simulate_or_shrink(plan)

    with pytest.raises(SimulationFailed, match=r"WrongBytes.*\n.*kvledger simulate --seed \d+") as failed:
        run_all()
    assert len(failed.value.plan.operations) <= 6 and not failed.value.plan.faults
    with pytest.raises(WrongBytes):
        exec(failed.value.program(), {})
    monkeypatch.undo()
    exec(failed.value.program(), {})


def test_a_copy_that_was_overtaken_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has copied a run out, and dies while it copies another one in to the same places; rank 1 is behind.

    What seed 2805 found when nothing was given up, made smaller.
    """
    first, second, third = (2, 2, 2, 2, 2), (1, 1, 2, 1, 1), (3, 2, 2)
    steps = [("serve", first), ("serve", second), ("serve", third), ("release", first), ("serve", first)]
    operations = tuple(Operation(*step) for step in [*steps, ("serve", third)])
    faults = Fault(3, "worker 1", "slow"), Fault(4, "worker 0", "die")

    def run_all() -> None:
        for seed in range(20):
            Plan(seed, Order.TSO, HostPolicy.EXCLUSIVE, 2, 7, 11, operations, faults).simulate()

    run_all()
    monkeypatch.setattr(Ranks, "_abandon_overtaken", lambda self, done: None)
    with pytest.raises(WrongBytes):
        run_all()


def test_an_engine_that_dies_between_two_lost_pools_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """What seed 70001442 found when one loss vouched for the other pool, too, made smaller."""
    operations = (Operation("serve", (1, 1)), Operation("release")) * 5
    lost = Fault(2, "device 0", "lose"), Fault(2, "host 0", "lose")

    def run_all() -> None:
        for publication in range(1, 7):
            faults = (*lost, Fault(10, "engine", "die"), Fault(publication, "engine", "die", 2))
            outcome = Plan(1, Order.TSO, HostPolicy.WRITE_THROUGH, 1, 6, 9, operations, faults).simulate()
            assert outcome.engines == 3

    run_all()
    monkeypatch.setattr("kvledger.manager.ranks.ids_after", lambda known, found, tier: found)
    with pytest.raises(WrongBytes):
        run_all()


def test_ctrl_c_ends_every_process_before_the_real_system_is_back() -> None:
    schedule = Schedule(random.Random(0), Order.TSO)
    main = threading.get_ident()

    def interrupt() -> int:
        signal.pthread_kill(main, signal.SIGINT)
        while True:
            schedule.sleep(1)

    def serve() -> int:
        while True:
            schedule.sleep(1)

    processes = [schedule.spawn("one", serve), schedule.spawn("other", interrupt), schedule.spawn("third", serve)]
    with pytest.raises(KeyboardInterrupt), installed(System(schedule, {})):
        schedule.run()
    assert [process.exit_code for process in processes] == [-9] * 3


def test_an_interrupted_campaign_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def third(plan: Plan) -> Any:
        if plan.seed == 702:
            raise KeyboardInterrupt
        return plan.simulate()

    monkeypatch.setattr(runs, "simulate_or_shrink", third)
    with pytest.raises(typer.Exit) as ended:
        command(seed=700, runs=5)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().out.startswith("2 runs from seed 700")


@pytest.mark.parametrize("split", [False, True])
def test_a_campaign_leaves_what_fails_as_a_program(
    split: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(plan: AnyPlan) -> Any:
        raise SimulationFailed(plan, WrongBytes('block 3\\ does not hold "its" tokens'))

    monkeypatch.setattr(runs, "simulate_or_shrink", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(typer.Exit):
        command(seed=7, runs=5, split=split)
    (program,) = tmp_path.iterdir()
    assert f"python {program.name}" in capsys.readouterr().err
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr  # nothing is broken here
