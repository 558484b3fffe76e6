"""Only what is proven dead is replaced: workers that are slow, out of reach or in the way of a successor. Real ones."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ipc import LedgerExists, SharedMemoryFull, memory
from ipc.ownership import objects_of, remove_objects
from ipc.processes import start_time
from ipc.signals import Signals
from kvledger import CacheConfig, CacheManager, ConfigError
from kvledger.handoff.sender import Sender
from kvledger.manager.handoffs import HandoffError
from kvledger.run.pattern import PatternEngine
from tests.manager.test_recovery import CONFIG, SWAP_OUT_IN_FLIGHT, THREE_SERVED, Engine, prompt, serve
from tests.processes import alive
from tests.waiting import PATIENCE_S, wait_until
from workers import WorkerFailed
from workers.handoff import pushes
from workers.processes import loop, supervisor
from workers.processes.acknowledgements import signals_name
from workers.processes.adopted import AdoptedProcess


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"death-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


@pytest.fixture
def dead(name: str) -> Iterator[Callable[..., Engine]]:
    """Starts an engine that was killed; what of it still runs ends with the test."""
    engines = []

    def start(*doing: str) -> Engine:
        engines.append(Engine(name, *doing))
        engines[-1].kill()
        return engines[-1]

    yield start
    for engine in engines:
        for worker in engine.workers:
            if alive(*worker):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker[0], signal.SIGKILL)
        wait_until("they end", lambda engine=engine: not any(alive(*worker) for worker in engine.workers))


def who_is_there(name: str) -> str:
    """What somebody is told who would create a ledger of this name."""
    with pytest.raises(LedgerExists) as refused:
        CacheManager.create(name, CONFIG)
    return str(refused.value)


def at_rest(manager: CacheManager) -> bool:
    """Let it poll until no transfer is in flight."""
    return wait_until("transfers end", lambda: not manager.state.transfers, meanwhile=manager.poll)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EMFILE])
def test_a_living_worker_is_not_dead_because_it_cannot_be_watched(
    name: str, dead: Callable[..., Engine], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pidfd_open (a sandbox, an old kernel, no descriptor): one worker per rank, and every byte is right."""

    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refuse)
    engine = dead(THREE_SERVED, SWAP_OUT_IN_FLIGHT)  # its workers are stopped: they are slow
    with CacheManager.open(name, CONFIG) as manager:
        assert [manager.worker_pid(rank) for rank in range(CONFIG.ranks)] == [pid for pid, _ in engine.workers]
        assert manager.state.transfers
        first = engine.workers[0][0]
        engine.resume_workers()
        wait_until("they end", lambda: (manager.poll() and False) or not manager.state.transfers)
        written = PatternEngine(manager.pools)
        for round in range(2):
            for number in range(4):
                serve(manager, written, f"{round}-{number}", prompt(number))
        os.kill(first, signal.SIGSTOP)
        assert manager._ranks is not None
        manager._ranks.supervisor.kill(0, "it is to end")  # without a descriptor, by its number
        wait_until("they end", lambda: (manager.poll() and False) or manager.worker_pid(0) not in (None, first))
        assert not alive(*engine.workers[0])


def test_a_worker_that_cannot_be_ended_keeps_its_successor_out(
    name: str, dead: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may still write: the refusal names it, changes nothing, and once it is gone the ledger opens."""
    engine = dead(THREE_SERVED, SWAP_OUT_IN_FLIGHT)
    before = objects_of(name)
    signals = Signals(signals_name(name, 1, 1))
    signals.words[loop.READY] = loop.STARTING  # as if its engine had not seen it join
    said = who_is_there(name)
    monkeypatch.setattr(AdoptedProcess, "_send", lambda self, number: None)  # in another container, or hung
    monkeypatch.setattr(supervisor, "_STOP_S", 0.2)
    with pytest.raises(WorkerFailed, match=rf"process {engine.workers[1][0]}, a worker of rank 1, still runs"):
        CacheManager.open(name, CONFIG)
    assert objects_of(name) == before and all(alive(*worker) for worker in engine.workers)
    assert who_is_there(name) == said
    os.kill(engine.workers[1][0], signal.SIGKILL)
    wait_until("they end", lambda: not alive(*engine.workers[1]))
    signals.close()
    monkeypatch.undo()
    os.kill(engine.workers[0][0], signal.SIGCONT)
    with CacheManager.open(name, CONFIG) as manager:
        assert manager.worker_pid(0) == engine.workers[0][0] and manager.worker_pid(1) != engine.workers[1][0]
        wait_until("they end", lambda: (manager.poll() and False) or not manager.state.transfers)
        assert serve(manager, PatternEngine(manager.pools), "a", prompt(2))


def test_a_worker_out_of_reach_of_signals_leaves_when_it_is_asked_to(
    name: str, dead: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As across containers: no descriptor, and its number means another process here."""
    monkeypatch.setattr("workers.processes.adopted.life_by_number", lambda process: None)
    engine = dead(THREE_SERVED)
    with CacheManager.open(name, CONFIG) as manager:
        assert manager.worker_pid(0) == engine.workers[0][0]
    wait_until("they end", lambda: not any(alive(*worker) for worker in engine.workers))
    assert not objects_of(name)


def test_a_worker_that_only_starts_finds_that_it_is_not_wanted(name: str) -> None:
    """Its engine died; whoever tidies up was there before it had its lock."""
    signals = Signals(signals_name(name, 0, 1), create=True)
    assert AdoptedProcess.of(signals) is None
    arguments = [name, "0", "1", "1", "1", CONFIG.layout.text()]
    worker = [sys.executable, "-m", "workers.transfer", *arguments]
    assert subprocess.run(worker, timeout=PATIENCE_S).returncode == 1
    assert signals.words[loop.READY] == loop.STARTING
    signals.close(remove=True)


@pytest.mark.parametrize("why", ["another configuration", "no room"])
def test_a_refused_open_changes_nothing(
    name: str, dead: Callable[..., Engine], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what the next error says of who was there."""
    engine = dead(THREE_SERVED)
    said = who_is_there(name)
    assert f"is left of process {engine.process.pid}, which is dead" in said
    before = {own.file for own in objects_of(name)}
    before.remove(f"{name}.1.1")  # prepared and never used: it may be put away
    if why == "no room":

        def full(name: str, size: int, *, identity: int) -> None:
            raise SharedMemoryFull(f"no room for {name}")

        monkeypatch.setattr(memory, "create", full)
        with pytest.raises(SharedMemoryFull):
            CacheManager.open(name, CONFIG)
        monkeypatch.undo()
    else:
        with pytest.raises(ConfigError, match="block_size"):
            CacheManager.open(name, CacheConfig(block_size=8, device_blocks=16))
    assert who_is_there(name) == said
    left = {own.file for own in objects_of(name)}
    assert before <= left <= {*before, f"{name}.1.1"}
    with CacheManager.open(name, CONFIG) as manager:
        assert manager.admit("a", prompt(2)).cached_blocks


def test_a_pusher_that_cannot_be_ended_keeps_its_signals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance it writes to looks at its claim there; so nobody opens the ledger, nor starts another sender."""
    program = (
        "import os, sys; from kvledger import CacheManager; from kvledger.handoff.sender import Sender;"
        "from tests.manager.test_recovery import CONFIG\n"
        "sender = Sender(CacheManager.create(sys.argv[1], CONFIG)); pids = [sender.supervisor.pid(r) for r in (0, 1)]\n"
        "for pid in pids: os.kill(pid, 19)\n"
        "print(*pids, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, timeout=PATIENCE_S)
    pushers = [(pid, start_time(pid)) for pid in map(int, done.stdout.split())]
    try:
        assert len(pushers) == 2 and all(started for _, started in pushers), done.stderr
        monkeypatch.setattr(AdoptedProcess, "_send", lambda self, number: None)
        monkeypatch.setattr(supervisor, "_STOP_S", 0.2)
        with pytest.raises(
            HandoffError, match=rf"process {pushers[0][0]}, which pushed blocks of '{name}', still runs"
        ):
            CacheManager.open(name, CONFIG)
        theirs = [own for own in objects_of(pushes.log_name(name)) if own.name.endswith(".signals")]
        assert len(theirs) == 2 and all(alive(*pusher) for pusher in pushers)
        monkeypatch.undo()
        with CacheManager.open(name, CONFIG) as manager:
            assert not any(alive(*pusher) for pusher in pushers)
            Sender(manager).close()
    finally:
        for pid, started in pushers:
            if alive(pid, started):
                os.kill(pid, signal.SIGKILL)


GROUPS = """
import os, sys, time
import numpy as np
from kvledger import CacheManager
from kvledger.handoff.sender import Sender
from tests.manager.test_death import SMALL_LOG
with CacheManager.create(sys.argv[1], SMALL_LOG) as manager:
    sender = Sender(manager)
    for number in range(40000):
        manager.admit("a", np.arange(9, dtype=np.int32) + number)
        manager.release("a")
        if manager._retention.pid:
            break
    first = manager.worker_pid(0)
    print(first, sender.supervisor.pid(0), manager._retention.pid, flush=True)
    said = False
    while True:
        manager.poll()
        sender.poll()
        if not said and manager.worker_pid(0) not in (None, first):
            said = True
            print("goes on", flush=True)
        time.sleep(0.01)
"""
SMALL_LOG = CacheConfig(
    block_size=4, device_blocks=16, ranks=1, block_bytes=64, segment_bytes=64 << 10, retain_bytes=256 << 10
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_processes_beside_the_engine_have_sessions_of_their_own_and_end_with_it(name: str, number: int) -> None:
    """Ending a worker's group does not end the engine; Ctrl-C ends the engine, and the engine everybody."""
    engine = subprocess.Popen(
        [sys.executable, "-c", GROUPS, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert engine.stdout is not None and engine.stderr is not None
        pids = [int(pid) for pid in engine.stdout.readline().split()]
        assert len(pids) == 3 and all(pids)
        others = [(pid, start_time(pid)) for pid in pids]
        assert len({os.getsid(pid) for pid in (engine.pid, *pids)}) == 4
        assert all(os.getpgid(pid) == os.getsid(pid) == pid for pid in pids)
        os.killpg(os.getpgid(pids[0]), signal.SIGKILL)  # what FastDeploy does with the handles it was given
        wait_until("they end", lambda: not alive(*others[0]))
        assert engine.stdout.readline() == "goes on\n", "it replaced the worker"
        assert engine.poll() is None and all(alive(*other) for other in others[1:])
        os.killpg(engine.pid, number)  # as a terminal does
        engine.communicate(timeout=PATIENCE_S)
        wait_until("they end", lambda: not any(alive(*other) for other in others))
    finally:
        engine.kill()
        engine.communicate()
