"""Engines and workers that are really killed: the state is the same, the cache is warm, every byte is right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ipc import LedgerError, LedgerNotFound, LogCorrupt, LogReader, LogWriter, Overrun, WriterAlive, snapshots
from ipc.names import SHM
from ipc.ownership import remove_objects, segments_of, unlink
from ipc.processes import start_time
from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy, ReleaseReason
from kvledger.doctor.ledgers import Ledger, ledgers
from kvledger.run.pattern import PatternEngine, chain
from statemachine.content import words_of
from statemachine.events import (
    BlocksEvicted,
    EpochStarted,
    EvictReason,
    RequestReleased,
    Tier,
    TierLost,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records import codec
from statemachine.records.replay import Replay, event_of, replay
from statemachine.records.snapshot import snapshot, state_digest
from statemachine.state.state import State
from tests.manager.test_manager import admit
from tests.processes import alive
from tests.waiting import wait_until
from workers.pools import backends as pools
from workers.pools import memory as pool_memory
from workers.processes.acknowledgements import KIND, log_name

SMALL = 64 << 10
CONFIG = CacheConfig(
    block_size=4, device_blocks=16, host_blocks=16, host_policy=HostPolicy.EXCLUSIVE, ranks=2, layers=2, block_bytes=64
)


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"recovery-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


ENGINE = """
import sys, time, signal, os
from kvledger import CacheManager
from tests.manager.test_recovery import CONFIG, prompt, serve
from kvledger.run.pattern import PatternEngine
manager = CacheManager.create(sys.argv[1], CONFIG)
engine = PatternEngine(manager.pools)
pids = [manager._ranks.supervisor.pid(rank) for rank in range(CONFIG.ranks)]
exec(sys.argv[2])
print(*pids, flush=True)
time.sleep(600)
"""
THREE_SERVED = "for i in range(3): serve(manager, engine, str(i), prompt(i))\n"
ONE_LIVE = "manager.admit('live', prompt(7)[:12]); manager.wait('live'); manager.cache('live', 2)\n"
SWAP_OUT_IN_FLIGHT = (
    "for pid in pids: os.kill(pid, signal.SIGSTOP)\nmanager.admit('live', prompt(8)); assert manager.state.transfers\n"
)


def prompt(number: int) -> np.ndarray:
    """Six blocks and a token."""
    return np.arange(25, dtype=np.int32) + 1000 * number


def serve(manager: CacheManager, engine: PatternEngine, key: str, tokens: np.ndarray) -> int:
    """A whole request, every byte written and verified; returns its hits."""
    admission = admit(manager, key, tokens)
    manager.wait(key)
    seeds = chain(words_of(tokens), 4 * manager.config.block_size, b"")
    table, valid = manager.block_table(key), manager.cached_blocks(key)
    engine.write(table[valid : len(seeds)], seeds[valid:])
    engine.verify(key, table[: len(seeds)], seeds, manager.next_sequence)
    manager.cache(key)
    manager.release(key)
    return admission.device_blocks + admission.host_blocks


class Engine:
    """A real engine process with real workers, in the middle of something."""

    def __init__(self, name: str, *doing: str) -> None:
        self.name = name
        command = [sys.executable, "-c", ENGINE, name, "".join(doing)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.workers = [(pid, start_time(pid)) for pid in map(int, self.process.stdout.readline().split())]
        assert len(self.workers) == CONFIG.ranks

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def kill_workers(self) -> None:
        for pid, _ in self.workers:
            os.kill(pid, signal.SIGKILL)
        wait_until("the killed workers are gone", lambda: not any(alive(*worker) for worker in self.workers))

    def resume_workers(self) -> None:
        for pid, _ in self.workers:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def engines(name: str) -> Iterator[Callable[..., Engine]]:
    started = []

    def start(*doing: str) -> Engine:
        started.append(Engine(name, *doing))
        return started[-1]

    yield start
    for engine in started:
        engine.process.kill()
        for pid, began in engine.workers:
            if alive(pid, began):
                os.kill(pid, signal.SIGKILL)


def story(name: str) -> list[object]:
    """All events of a ledger; each leads to a sound state, and every digest agrees."""
    reader = LogReader(name)
    run = Replay(check_every=1)
    events: list[object] = []
    while records := reader.poll():
        run.feed(records)
        events += [event_of(record) for record in records]
    reader.close()
    return events


def epoch_of(events: list[object]) -> list[object]:
    """What the last engine logged."""
    first = max(index for index, event in enumerate(events) if isinstance(event, EpochStarted))
    return events[first:]


def settled(manager: CacheManager) -> None:
    """Wait until nothing is in flight."""
    wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)


def answered(name: str, rank: int) -> set[int]:
    """Transfers that the first worker of a rank has answered, whoever has heard of it."""
    reader = LogReader(log_name(name, rank, 1))
    found = {record.subject for record in reader.poll() if record.kind == KIND}
    reader.close()
    return found


def listed(name: str) -> Ledger:
    """What ``kvledger segments`` knows of a ledger."""
    return next(entry for entry in ledgers() if entry.name == name)


def state_before(name: str) -> State:
    """The state up to where the dead engine's log counts."""
    reader = LogReader(name)
    state = replay(reader).state
    reader.close()
    return state


def test_a_killed_engine_is_succeeded_with_a_warm_cache(name: str, engines: Callable[..., Engine]) -> None:
    engine = engines(THREE_SERVED, ONE_LIVE)
    with pytest.raises(WriterAlive, match=rf"process {engine.process.pid}: end that first"):
        CacheManager.open(name)
    engine.kill()
    before = state_before(name)
    digest, hits = state_digest(before), [len(prompt(0)) // 4] * 2
    with CacheManager.open(name) as manager:
        assert {rank: manager._ranks.supervisor.pid(rank) for rank in range(2)} == {  # type: ignore[union-attr]
            rank: pid for rank, (pid, _) in enumerate(engine.workers)
        }, "workers that live are adopted, not restarted"
        assert len(manager._writer._listeners) == 2, "who sleeps is woken by the new engine, too"
        events = story(name)
        since = epoch_of(events)
        started = since[0]
        assert isinstance(started, EpochStarted) and started.epoch == 2
        replayed = Replay()
        reader = LogReader(name)
        replayed.feed([record for record in reader.poll() if record.sequence <= started.last_sequence])
        reader.close()
        assert state_digest(replayed.state) == digest
        released = [event for event in since if isinstance(event, RequestReleased)]
        assert [event.reason for event in released] == [ReleaseReason.ENGINE_RESTARTED]
        gone = [event for event in since if isinstance(event, BlocksEvicted)]
        assert [(event.reason, len(event.blocks)) for event in gone] == [(EvictReason.UNTRUSTED, 2)]
        assert not any(isinstance(event, WorkerJoined | WorkerLost) for event in since)
        attention = PatternEngine(manager.pools)
        assert [serve(manager, attention, f"again {i}", prompt(i)) for i in (1, 2)] == hits
        assert manager.peek(prompt(7), max_blocks=99) == (0, 0), "nobody vouches for what the dead request had cached"
        serve(manager, attention, "live", prompt(7))  # its name is free again
        settled(manager)
        assert state_digest(state_before(name)) == manager.digest()


@pytest.mark.parametrize("workers_too", [False, True])
def test_transfers_in_flight_end_after_the_engine(name: str, engines: Callable[..., Engine], workers_too: bool) -> None:
    engine = engines(THREE_SERVED, SWAP_OUT_IN_FLIGHT)
    engine.kill()
    if workers_too:
        engine.kill_workers()
    else:
        engine.resume_workers()
    with CacheManager.open(name) as manager:
        settled(manager)
        attention = PatternEngine(manager.pools)
        host = [i for i in range(3) if manager.peek(prompt(i), max_blocks=99)[1]]
        assert host, "what was being copied out is on the host"
        for i in range(3):
            assert serve(manager, attention, str(i), prompt(i)) == 6
        settled(manager)
        lost = [event for event in story(name) if isinstance(event, WorkerLost)]
        assert len(lost) == (2 if workers_too else 0)


def test_answers_given_while_there_was_no_engine_count(name: str, engines: Callable[..., Engine]) -> None:
    engine = engines(THREE_SERVED, SWAP_OUT_IN_FLIGHT)
    engine.kill()
    engine.resume_workers()
    in_flight = set(state_before(name).transfers)
    for rank in range(CONFIG.ranks):  # and nobody listens
        wait_until(f"rank {rank} answers", lambda rank=rank: in_flight <= answered(name, rank))  # type: ignore[misc]
    for pid, _ in engine.workers:
        os.kill(pid, signal.SIGSTOP)
    with CacheManager.open(name) as manager:
        settled(manager)
        engine.resume_workers()
        assert serve(manager, PatternEngine(manager.pools), "again", prompt(0)) == 6


def test_engine_after_engine(name: str, engines: Callable[..., Engine]) -> None:
    engines(THREE_SERVED).kill()
    for life in range(2, 5):
        manager = CacheManager.open(name)
        assert manager.state.epoch == life
        assert serve(manager, PatternEngine(manager.pools), f"life {life}", prompt(life % 3)) == 6
        manager.admit("unfinished", prompt(life + 10))
        settled(manager)
        manager._writer.close()  # what the kernel does to the dead: the lock goes, the workers stay
    with CacheManager.open(name) as manager:
        assert manager.state.epoch == 5 and not manager.state.requests
        story(name)


def test_a_ledger_that_was_kept_opens_again(name: str) -> None:
    manager = CacheManager.create(name, CONFIG)
    serve(manager, PatternEngine(manager.pools), "a", prompt(1))
    manager.close(keep=True)
    with CacheManager.open(name, CONFIG) as manager:
        assert serve(manager, PatternEngine(manager.pools), "b", prompt(1)) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 8},
        {"device_blocks": 17},
        {"host_blocks": 8},
        {"host_policy": HostPolicy.WRITE_THROUGH},
        {"host_staging_blocks": 5},
        {"ranks": 1},
        {"layers": 3},
        {"block_bytes": 128},
    ],
)
def test_a_configuration_that_does_not_agree_is_refused(name: str, change: dict[str, object]) -> None:
    CacheManager.create(name, CONFIG).close(keep=True)
    (setting,) = change
    with pytest.raises(ConfigError, match=f"^{setting} is"):
        CacheManager.open(name, CacheConfig(**{**vars(CONFIG), **change}))  # type: ignore[arg-type]
    with CacheManager.open(name) as manager:  # nothing has happened to it
        assert manager.state.epoch == 2


@pytest.mark.parametrize("transfers", [False, True])
def test_recovery_from_a_snapshot(name: str, engines: Callable[..., Engine], transfers: bool) -> None:
    engine = engines(THREE_SERVED, SWAP_OUT_IN_FLIGHT if transfers else "")
    engine.kill()
    state = state_before(name)
    reader = LogReader(name)
    last = reader.poll()[-1].sequence
    reader.close()
    snapshots.write(name, last, snapshot(state))
    engine.kill_workers()
    with CacheManager.open(name) as manager:
        settled(manager)
        assert serve(manager, PatternEngine(manager.pools), "again", prompt(0)) == 6
        story(name)


def test_a_snapshot_bridges_what_the_log_has_lost(name: str) -> None:
    config = CacheConfig(block_size=4, device_blocks=16, segment_bytes=SMALL, retain_bytes=SMALL)
    manager = CacheManager.create(name, config)
    manager._writer.on_rotation = None  # nobody sees to it that snapshots cover what goes
    for i in range(600):
        manager.admit(str(i), prompt(i % 3))
        manager.cache(str(i))
        manager.release(str(i))
    last, data = manager.next_sequence - 1, snapshot(manager.state)
    manager.close(keep=True)
    assert segments_of(name)[0] != (1, 0)
    with pytest.raises(Overrun, match="start again from a snapshot"):
        CacheManager.open(name)
    snapshots.write(name, last, data)
    with CacheManager.open(name) as manager:
        assert manager.peek(prompt(2), max_blocks=99) == (6, 0)
        assert manager.state.epoch == 2


@pytest.mark.parametrize("tier", ["device", "host"])
@pytest.mark.parametrize(
    ("policy", "found"),
    [
        (HostPolicy.EXCLUSIVE, "nothing"),
        (HostPolicy.WRITE_THROUGH, "nothing"),
        (HostPolicy.EXCLUSIVE, "another"),
        (HostPolicy.WRITE_THROUGH, "another"),
        (HostPolicy.EXCLUSIVE, "something else"),
    ],
)
def test_a_pool_that_is_not_the_same_is_a_lost_tier(name: str, tier: str, policy: HostPolicy, found: str) -> None:
    config = CacheConfig(**{**vars(CONFIG), "host_policy": policy})
    manager = CacheManager.create(name, config)
    engine = PatternEngine(manager.pools)
    for i in range(3):
        serve(manager, engine, str(i), prompt(i))
    settled(manager)
    manager.admit("live", prompt(9))
    manager._writer.close()  # the engine is dead, its workers live
    pool = pools.pool_names(name, 1)[tier == "host"]
    unlink(pool)
    if found == "another":  # the same name, size and layout, and nothing in it
        pool_memory.create(pool, pools.pool_sizes(config.layout)[tier == "host"], config.layout)
    elif found != "nothing":  # something that is no pool
        (SHM / pool[1:]).touch(0o600)
    manager = CacheManager.open(name)
    lost = [event for event in story(name) if isinstance(event, TierLost)]
    assert [event.tier for event in lost] == [int(tier == "host")]
    assert f"pool.{tier}.1 is {'not the memory that it was' if found == 'another' else 'gone'}" in lost[0].reason
    state = manager.state
    for node in state.nodes.values():
        assert node.copies[tier != "device"] is None
    hits = sum(serve(manager, PatternEngine(manager.pools), f"again {i}", prompt(i)) for i in range(3))
    assert hits > 0 or (tier, policy) == ("device", HostPolicy.EXCLUSIVE)
    settled(manager)
    manager._writer.close()
    with CacheManager.open(name):  # the new pools are known by now
        assert len([event for event in story(name) if isinstance(event, TierLost)]) == 1
    (SHM / pool[1:]).unlink(missing_ok=True)


def test_an_engine_that_dies_between_two_losses_hides_neither(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has made both pools anew: its successor must not take the one that the log does not call lost for the old."""
    manager = CacheManager.create(name, CONFIG)
    engine = PatternEngine(manager.pools)
    for i in range(3):
        serve(manager, engine, str(i), prompt(i))
    settled(manager)
    manager._writer.close()
    for pool in pools.pool_names(name, 0):
        unlink(pool)
    publish = LogWriter.publish

    def publishing(writer: LogWriter) -> None:
        publish(writer)
        if any(isinstance(event, TierLost) for event in story(name)):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LogWriter, "publish", publishing)
        with pytest.raises(KeyboardInterrupt):
            CacheManager.open(name)
    with CacheManager.open(name) as manager:
        assert [event.tier for event in story(name) if isinstance(event, TierLost)] == [Tier.HOST, Tier.DEVICE]
        assert not manager.state.nodes
        for i in range(3):
            serve(manager, PatternEngine(manager.pools), f"again {i}", prompt(i))


def test_without_workers_nothing_stays_in_flight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine dies between the order of a copy and its end, which without workers follow each other at once."""
    config = CacheConfig(block_size=4, device_blocks=8, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE)
    manager = CacheManager.create(name, config)
    manager.admit("a", prompt(1))
    manager.cache("a")
    manager.release("a")
    monkeypatch.setattr(manager, "_follow", lambda events: None)
    manager.admit("b", prompt(2))
    assert manager.state.transfers
    manager._writer.close()
    with CacheManager.open(name) as manager:
        assert not manager.state.transfers and manager.peek(prompt(1), max_blocks=99) == (1, 5)
        story(name)


def test_a_damaged_log_is_refused_and_stays_as_it_is(name: str) -> None:
    manager = CacheManager.create(name, CacheConfig(block_size=4, device_blocks=16))
    manager.admit("a", prompt(1))
    manager.release("a")
    manager.close(keep=True)
    with open(f"/dev/shm/{name}.1.0", "r+b") as file:
        file.seek(4096 + 30)
        file.write(b"\xff")
    for _ in range(2):
        with pytest.raises(LogCorrupt, match="the log goes on at byte"):
            CacheManager.open(name)
        assert segments_of(name) == [(1, 0)]
        assert listed(name).state == "dead", "who could not open it has not become its engine"


def test_a_ledger_without_an_event_says_what_to_do(name: str) -> None:
    LogWriter.create(name, schema_hash=codec.SCHEMA_HASH, segment_bytes=SMALL).close()
    with pytest.raises(LedgerError, match="segments --remove-dead"):
        CacheManager.open(name)
    with pytest.raises(LedgerNotFound):
        CacheManager.open(f"{name}x")


def test_another_version_is_refused(name: str) -> None:
    LogWriter.create(name, schema_hash=1, segment_bytes=SMALL).close()
    with pytest.raises(LedgerError, match="another event table"):
        CacheManager.open(name)


def test_a_long_dead_engine_had_many_requests(name: str) -> None:
    """Ending them all is one transaction; the new segments are made large enough for it."""
    config = CacheConfig(block_size=4, device_blocks=4000, segment_bytes=SMALL)
    manager = CacheManager.create(name, config)
    for i in range(200):
        manager.admit(str(i), prompt(i))
        manager.cache(str(i))
    assert len(manager.state.requests) == 200
    manager._writer.close()
    with CacheManager.open(name, config) as manager:
        assert not manager.state.requests and manager.available_blocks() == 4000
        assert manager._writer.max_transaction_bytes > SMALL // 4
        assert len(epoch_of(story(name))) == 202
