"""A campaign of kills: ``python -m tests.campaigns.chaos --kills 1000 --seed 0``.

Engine processes work on one ledger after the other until they are killed, workers are killed and stopped beside them.
An engine dies at a moment of its choice in the transaction with its n-th event of a kind, or from outside after a
random time, in its recovery too. This process follows the log through all of it, checks every invariant after every
event, writes the snapshots, and compares what the dead engine had published with what its successor knows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import secrets
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from ipc import LedgerError, LedgerNotFound, LogReader, snapshots
from ipc.control import Control
from ipc.ownership import objects_of, remove_objects, unlink
from kvledger import CacheConfig, CacheManager, CommandRejected, HostPolicy, OutOfBlocks, Tier
from kvledger.run.pattern import PatternEngine, chain
from statemachine.content import words_of
from statemachine.events import (
    KIND_OF,
    KINDS,
    BlocksReassigned,
    CacheCleared,
    DigestTaken,
    EpochStarted,
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
    TierLost,
    WorkerJoined,
    WorkerLost,
)
from statemachine.records.replay import Replay, event_of
from statemachine.records.snapshot import snapshot, state_digest
from tests.campaigns.dying import Moment, arm
from tests.waiting import PATIENCE_S, wait_until
from workers.pools.memory import pool_names

BLOCK = 4
LIVES = 40
"""Of one ledger; then a new one begins, with another host policy."""
OPERATIONS = 300
_SUBREAPER = 36
_NOT_CREATED = 3
_OPENED, _TIER_LOST, _QUARANTINE_ENDED = (KIND_OF[event] for event in (LedgerOpened, TierLost, QuarantineEnded))
_RARE = {
    KIND_OF[event]
    for event in (LedgerOpened, TierLost, QuarantineEnded, CacheCleared, PoolResized, EpochStarted, DigestTaken)
} | {KIND_OF[event] for event in (WorkerJoined, WorkerLost, BlocksReassigned)}
PUBLISHED, VERIFIED, STRUCK = 0, 8, 16
"""Where the engine process says what it has published and verified, and that it dies as planned (u64 each)."""
CONFIG = CacheConfig(
    block_size=BLOCK,
    device_blocks=40,
    host_blocks=40,
    host_policy=HostPolicy.EXCLUSIVE,
    ranks=2,
    layers=2,
    block_bytes=64,
    segment_bytes=64 << 10,
    retain_bytes=4 << 20,
    transfer_timeout_s=0.5,
)


class Plan:
    """How an engine dies: in the transaction with the ``nth`` event of a kind, or from outside after ``after_s``."""

    def __init__(self, rng: random.Random, kind: int, moment: Moment) -> None:
        self.kind = kind
        self.moment = moment
        self.nth = 1 if kind in _RARE else rng.choice((1, 1, 2, rng.randrange(1, 20)))
        self.after_s = rng.choice((0.0, rng.random() * 0.05, rng.random() * 0.5)) if rng.random() < 0.25 else None

    def __str__(self) -> str:
        if self.after_s is not None:
            return f"killed after {self.after_s * 1e3:.0f} ms"
        return f"{KINDS[self.kind].__name__} number {self.nth}, {self.moment.name}"


# The engine process


class Workload:
    """Random requests on few documents; every byte of what a request may read is verified."""

    def __init__(self, manager: CacheManager, rng: random.Random, shared: mmap.mmap) -> None:
        self.manager = manager
        self.shared = shared
        self.rng = rng
        self.engine = PatternEngine(manager.pools)
        self.live: dict[str, np.ndarray] = {}
        self.made = 0

    def run(self) -> None:
        steps: list[Callable[[], None]] = [self.admit, self.compute, self.generate, self.release, self.verify]
        rare: list[Callable[[], object]] = [
            self.trim,
            self.reassign,
            lambda: self.manager.clear(force=True),
            lambda: self.manager.resize(Tier.DEVICE, self.rng.choice((36, 40))),
            lambda: self.manager.resize(Tier.HOST, self.rng.choice((30, 40))),
            self.manager.take_digest,
        ]
        for _ in range(OPERATIONS):
            try:
                if self.rng.random() < 0.04:
                    self.rng.choice(rare)()
                self.rng.choices(steps, (4, 4, 3, 3, 2))[0]()
            except CommandRejected:
                time.sleep(0.001)
            self.manager.poll()

    def pick(self) -> str:
        return self.rng.choice(sorted(self.live)) if self.live else ""

    def ready(self) -> str:
        key = self.pick()
        return key if key and self.manager.ready(key) else ""

    def admit(self) -> None:
        if len(self.live) >= 5:
            return
        rng = self.rng
        length = rng.randrange(3, 50)
        tokens = np.arange(length, dtype=np.int32) + 1000 * rng.randrange(5)
        if rng.random() < 0.5:  # branches off somewhere
            tokens[rng.randrange(length) :] += 100_000 * rng.randrange(1, 3)
        key = f"{os.getpid()}-{self.made}"
        self.made += 1
        try:
            self.manager.admit(key, tokens, namespace=rng.choice((b"", b"", b"other")))
        except OutOfBlocks:
            self.release()
            raise
        self.live[key] = tokens

    def seeds(self, key: str) -> np.ndarray:
        request = self.manager.state.requests[self.manager.state.numbers[key]]
        return chain(words_of(self.live[key]), 4 * BLOCK, request.namespace)

    def compute(self) -> None:
        key = self.ready()
        if key:
            self.fill(key)
            self.manager.cache(key)
            self.check(key)

    def fill(self, key: str) -> None:
        seeds, table = self.seeds(key), self.manager.block_table(key)
        if len(table) < len(seeds):
            self.manager.allocate({key: len(seeds) - len(table)})
            self.manager.wait(key, PATIENCE_S)
            table = self.manager.block_table(key)
        valid = self.manager.cached_blocks(key)
        self.engine.write(table[valid : len(seeds)], seeds[valid : len(table)])

    def generate(self) -> None:
        key = self.ready()
        if not key:
            return
        generated = np.arange(self.rng.randrange(1, 9), dtype=np.int32) + 7_000_000
        before = self.live[key]
        self.live[key] = np.concatenate([before, generated])
        try:
            self.fill(key)
            self.manager.cache(key, len(self.live[key]) // BLOCK, generated=generated)
        except BaseException:
            self.live[key] = before
            raise

    def verify(self) -> None:
        key = self.ready()
        if key:
            self.check(key)

    def check(self, key: str) -> None:
        valid = self.manager.cached_blocks(key)
        table = self.manager.block_table(key)[:valid]
        before = self.engine.verified_bytes
        self.engine.verify(key, table, self.seeds(key)[:valid], self.manager.next_sequence - 1)
        put(self.shared, VERIFIED, get(self.shared, VERIFIED) + self.engine.verified_bytes - before)

    def release(self) -> None:
        key = self.pick()
        if key:
            if self.manager.ready(key):
                self.check(key)
            self.manager.release(key, final=self.rng.random() < 0.3)
            del self.live[key]

    def trim(self) -> None:
        key = self.ready()
        if key:
            length = len(self.manager.block_table(key))
            self.manager.allocate({key: 2})
            self.manager.trim(key, length)

    def reassign(self) -> None:
        key, other = self.ready(), self.ready()
        if key and other and key != other:
            length = len(self.manager.block_table(key))
            self.manager.allocate({key: 1})
            if self.manager.ready(key):
                self.manager.reassign(key, other, [int(self.manager.block_table(key)[length])])


def get(shared: mmap.mmap, word: int) -> int:
    return int.from_bytes(shared[word : word + 8], "little")


def put(shared: mmap.mmap, word: int, value: int) -> None:
    shared[word : word + 8] = value.to_bytes(8, "little")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def condemn(plan: Plan, shared: mmap.mmap) -> None:
    """From now on the log writers of this process die as planned, and say what they have published."""
    from ipc.writer import LogWriter

    stage, publish = LogWriter.stage, LogWriter.publish
    left = plan.nth
    fatal = False

    def staging(self: LogWriter, records: list[tuple[int, int, bytes, bytes, bytes]], step: int = 0) -> None:
        nonlocal left, fatal
        left -= sum(record[0] == plan.kind for record in records)
        if plan.after_s is None and left <= 0:
            fatal = True
            put(shared, STRUCK, 1)
        if fatal and plan.moment is Moment.BEFORE:
            die()
        if fatal and plan.moment is not Moment.AFTER:
            if plan.moment in (Moment.IN_A_LINE, Moment.IN_A_PAYLOAD):
                arm(self, plan.moment, len(records), die)  # the next line is its last
            stage(self, records, step)
            arm(self, plan.moment, len(records), die)
        else:
            stage(self, records, step)

    def publishing(self: LogWriter) -> None:
        publish(self)
        if fatal:
            put(shared, PUBLISHED, self.next_sequence - 1)
            die()
        put(shared, PUBLISHED, self.next_sequence - 1)

    LogWriter.stage = staging  # type: ignore[method-assign,assignment]
    LogWriter.publish = publishing  # type: ignore[method-assign]


def engine(name: str, config: CacheConfig, first: bool, plan: Plan, seed: str, shared: mmap.mmap) -> int:
    """The whole life of an engine process; it returns only if something is wrong."""
    condemn(plan, shared)
    try:
        if first:
            manager = CacheManager.create(name, config)
        else:
            try:
                manager = CacheManager.open(name, config)
            except LedgerError as error:
                if get(shared, PUBLISHED) or "while" not in str(error):
                    raise
                return _NOT_CREATED
        Workload(manager, random.Random(seed), shared).run()
    except BaseException:
        traceback.print_exc()
        return 1
    die()


# The process that watches


class Failed(RuntimeError):
    """The campaign found something; the message says how to repeat it."""


class Campaign:
    """Kills so many processes, in ledgers of :data:`LIVES` engines each."""

    def __init__(self, kills: int, seed: int) -> None:
        self.wanted = kills
        self.seed = seed
        self.engines = self.workers = self.stopped = self.lives = self.ledgers = self.events = self.checks = 0
        self.verified = self.outside = 0
        self.struck: Counter[tuple[int, Moment]] = Counter()
        """Engines that died where it was planned, by event kind and moment."""
        self.statuses: dict[int, int] = {}
        self.boundaries = [(kind, moment) for kind in sorted(KINDS) if kind != _OPENED for moment in Moment]

    def run(self) -> None:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # orphaned workers come back to us
        order = random.Random(self.seed)
        order.shuffle(self.boundaries)
        while self.engines + self.workers < self.wanted:
            self.ledger(f"chaos-{os.getpid()}-{self.ledgers}")
            self.ledgers += 1

    def ledger(self, name: str) -> None:
        policy = (HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH, HostPolicy.OFF)[self.ledgers % 5 % 3]
        config = CacheConfig(
            **{**vars(CONFIG), "host_policy": policy, "host_blocks": 0 if policy == HostPolicy.OFF else 40}
        )
        self.shared = mmap.mmap(-1, 4096)
        self.replay = Replay(check_every=1)
        self.reader: LogReader | None = None
        try:
            life = 0
            while life < LIVES and self.engines + self.workers < self.wanted:
                self.life(name, config, life)
                life += 1
        except BaseException:
            print(f"seed {self.seed}, ledger {self.ledgers}, life {life}", flush=True)
            raise
        finally:
            self.end(name)

    def life(self, name: str, config: CacheConfig, life: int) -> None:
        seed = f"{self.seed} {self.ledgers} {life}"
        rng = random.Random(seed)
        first = not objects_of(name)
        kind, moment = self.boundaries[self.lives % len(self.boundaries)]
        if first:
            kind, moment = _OPENED, list(Moment)[self.ledgers % len(Moment)]
        plan = Plan(rng, kind, moment)
        if kind == _TIER_LOST and config.host_blocks and self.reader is not None:
            for pool in rng.sample(pool_names(name, rng.randrange(2)), rng.randrange(1, 3)):
                unlink(pool)
        self.lives += 1
        put(self.shared, STRUCK, 0)
        begun = time.monotonic()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os._exit(engine(name, config, first, plan, seed, self.shared))
        stops: list[tuple[float, int]] = []
        while pid not in self.statuses:
            self.follow(name)
            if plan.after_s is not None and time.monotonic() - begun > plan.after_s + 0.02:
                os.kill(pid, signal.SIGKILL)
            if rng.random() < (0.05 if kind == _QUARANTINE_ENDED else 0.01) and len(self.joined()) == config.ranks:
                self.harass(name, rng, stops, only_stop=kind == _QUARANTINE_ENDED)
            for when, worker in list(stops):
                if time.monotonic() > when:
                    stops.remove((when, worker))
                    self.send(worker, signal.SIGCONT)
            if time.monotonic() - begun > PATIENCE_S:
                raise Failed(f"an engine process hangs ({plan})")
            self.reap()
            time.sleep(0.001)
        for _, worker in stops:
            self.send(worker, signal.SIGCONT)
        status = self.statuses.pop(pid)
        if os.waitstatus_to_exitcode(status) == _NOT_CREATED:
            remove_objects(name)
            if self.reader is not None:
                self.reader.close()
                self.reader = None
            return
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise Failed(f"an engine process failed ({plan}), see above")
        self.engines += 1
        if get(self.shared, STRUCK):
            self.struck[kind, moment] += 1
        self.outside += plan.after_s is not None
        self.follow(name)
        published = get(self.shared, PUBLISHED)
        last = self.reader.cursor - 1 if self.reader is not None else 0
        if published > last:
            raise Failed(f"event {published} was published, the log ends at {last} ({plan})")
        if last and rng.random() < 0.3:
            for old in snapshots.sequences(name):
                snapshots.remove(name, old)
            snapshots.write(name, last, snapshot(self.replay.state))

    def follow(self, name: str) -> None:
        """Read on; every event leads to a sound state, and a new engine begins exactly where the old one ended."""
        if self.reader is None:
            try:
                self.reader = LogReader(name)
            except (LedgerNotFound, LedgerError):
                return
        while records := self.reader.poll():
            for record in records:
                if record.kind == KIND_OF[EpochStarted]:
                    event = event_of(record)
                    assert isinstance(event, EpochStarted)
                    if event.last_sequence != record.sequence - 1:
                        raise Failed(
                            f"epoch {event.epoch} begins after {event.last_sequence}, not {record.sequence - 1}"
                        )
            self.replay.feed(records)
            self.events += len(records)

    def harass(self, name: str, rng: random.Random, stops: list[tuple[float, int]], *, only_stop: bool) -> None:
        try:
            control = Control.open(name)
        except LedgerError:
            return
        workers = [reader.pid for reader in control.readers() if reader.worker and reader.alive]
        control.close()
        if workers:
            worker = rng.choice(workers)
            if only_stop or rng.random() < 0.3:
                self.stopped += 1
                self.send(worker, signal.SIGSTOP)
                stops.append((time.monotonic() + rng.choice((0.05, 0.8)), worker))
            else:
                self.workers += 1
                self.send(worker, signal.SIGKILL)

    def joined(self) -> dict[int, int]:
        """Ranks that have had a worker: before that, an engine that cannot start one is right to give up."""
        return self.replay.state.workers if self.replay.events else {}

    def send(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self.statuses[pid] = status

    def end(self, name: str) -> None:
        """The last engine ends in peace: its state is the one that this process has followed to, byte for byte."""
        try:
            # without an event it was killed while it was created: there is nothing to open
            if self.replay.events and sys.exc_info()[0] is None:
                self.reap()
                manager = CacheManager.open(name)
                self.follow(name)
                wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
                self.follow(name)
                if state_digest(self.replay.state) != manager.digest():
                    raise Failed("the followed state and the engine's differ")
                manager.close()
                self.checks += self.replay.checks
                self.verified += get(self.shared, VERIFIED)
        finally:
            if self.reader is not None:
                self.reader.close()
            for pid in self.living(name):
                self.send(pid, signal.SIGKILL)
            remove_objects(name)
            self.shared.close()

    def living(self, name: str) -> list[int]:
        try:
            control = Control.open(name)
        except LedgerError:
            return []
        try:
            return [reader.pid for reader in control.readers() if reader.worker and reader.alive]
        finally:
            control.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill engines and workers, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(10**9)
    print(f"seed {seed}; again: make chaos SEED={seed} KILLS={arguments.kills}", flush=True)
    campaign = Campaign(arguments.kills, seed)
    begun = time.monotonic()
    try:
        campaign.run()
    except Failed as error:
        print(f"FAILED: {error}")
        return 1
    print(
        f"{campaign.engines} engines and {campaign.workers} workers killed, {campaign.stopped} workers stopped, in "
        f"{campaign.ledgers} ledgers and {time.monotonic() - begun:.0f} s\n"
        f"{sum(campaign.struck.values())} engines at {len(campaign.struck)} of {len(KINDS) * len(Moment)} boundaries "
        f"({len({kind for kind, _ in campaign.struck})} of {len(KINDS)} event kinds, {len(Moment)} moments), "
        f"{campaign.outside} at a random time\n"
        f"{campaign.events} events, the invariants checked after each, {campaign.verified:,} bytes verified\n"
        "0 lost, 0 double-owned, 0 wrong bytes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
