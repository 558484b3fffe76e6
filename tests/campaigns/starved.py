"""A campaign of kills among everybody, where there is no room: ``python -m tests.campaigns.starved --seconds 300``.

A prefill and a decode instance, each with transfer workers, pushers, an auditor and a recorder, share one core with
busy loops, and a small /dev/shm that is nearly full most of the time. Whoever is struck is killed, or stopped for a
while. The engines verify every byte; this process follows both logs, and replays what the recorders have written.

Beside ``tests.campaigns.chaos``: that one chooses the exact moment of an engine's death, and kills no followers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import mmap
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ipc import KvlogReader, LedgerError, LedgerNotFound, Overrun, SharedMemoryFull
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects
from kvledger import CacheManager, CommandRejected
from kvledger.errors import HandoffError
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.run.pattern import chain
from statemachine.check import check
from statemachine.content import words_of
from statemachine.errors import InvariantViolation
from statemachine.events import Outcome
from statemachine.records.replay import Replay
from statemachine.records.snapshot import restore, state_digest
from tests.campaigns import chaos
from tests.campaigns.chaos import BLOCK, Workload
from tests.waiting import PATIENCE_S, wait_until
from workers import WorkerFailed
from workers.followers.follow import Follower
from workers.handoff.pushes import Address

ROOM_BYTES = 24 << 20
"""Of /dev/shm; the two instances need about a quarter of it for their pools."""
NO_ROOM = 3
"""Exit status of an engine that could not begin for want of room."""
CONFIG = dataclasses.replace(chaos.CONFIG, retain_bytes=512 << 10, transfer_timeout_s=2.0)
ROLES = {
    "workers.transfer": "worker",
    "workers.handoff.pusher": "pusher",
    "workers.followers.auditor": "auditor",
    "kvledger.cli": "recorder",
    "tests.campaigns.starved": "engine",
}
"""What a process is, by the module that it runs."""


class Failed(RuntimeError):
    """The campaign has found something."""


# The engine processes


class Instance(Workload):
    """A random workload of its own, and prompts that go from one instance to the other by a mailbox of files."""

    def __init__(self, manager: CacheManager, rng: random.Random, shared: object, mailbox: Path) -> None:
        super().__init__(manager, rng, shared)  # type: ignore[arg-type]
        self.mailbox = mailbox

    def serve(self) -> None:
        """Serve for ever."""
        steps = [self.admit, self.compute, self.generate, self.release, self.verify, self.hand_over]
        while True:
            try:
                self.rng.choices(steps, (4, 4, 3, 3, 2, 4))[0]()
                if self.rng.random() < 0.01:
                    self.manager.clear(force=True)
                self.manager.poll()
                time.sleep(0.0005)  # what is tried is who dies when, not how much is served
            except (CommandRejected, SharedMemoryFull, HandoffError, TimeoutError):
                time.sleep(0.001)  # refused; nothing has changed, and what others do goes on

    def hand_over(self) -> None:
        """Do what is next for the other instance."""

    def check_request(self, request_id: str, tokens: np.ndarray, blocks: np.ndarray) -> None:
        self.engine.verify(request_id, blocks, seeds_of(tokens)[: len(blocks)], self.manager.next_sequence - 1)


class PrefillInstance(Instance):
    """Computes what it finds an address for, and pushes it."""

    def __init__(self, *more: object) -> None:
        super().__init__(*more)  # type: ignore[arg-type]
        self.sender = Sender(self.manager)

    def hand_over(self) -> None:
        for done in self.sender.poll():
            self.manager.release(done.request_id)
        waiting = sorted(letter for letter in self.mailbox.iterdir() if not letter.suffix)
        if not waiting:
            return
        letter = self.rng.choice(waiting)
        try:
            number, text = letter.read_text().split(" ", 1)
        except FileNotFoundError:
            return  # taken back
        finally:
            letter.unlink(missing_ok=True)
        tokens, address = prompt_of(int(number)), Address.parse(text)
        request_id = f"push-{letter.name}"
        blocks = len(tokens) // BLOCK
        admission = self.manager.admit(request_id, tokens, blocks=blocks)
        try:
            self.manager.wait(request_id, PATIENCE_S)
            valid = admission.cached_blocks
            self.engine.write(self.manager.block_table(request_id)[valid:], seeds_of(tokens)[valid:])
            self.sender.send(request_id, address)
        except BaseException:
            self.manager.release(request_id)
            raise


class DecodeInstance(Instance):
    """Reserves room, and verifies what arrives."""

    def __init__(self, *more: object) -> None:
        super().__init__(*more)  # type: ignore[arg-type]
        self.receiver = Receiver(self.manager)
        self.expected: dict[str, np.ndarray] = {}

    def hand_over(self) -> None:
        for received in self.receiver.poll():
            tokens = self.expected.pop(received.request_id)
            try:
                if received.outcome == Outcome.DONE:
                    self.check_request(received.request_id, tokens, received.block_table)
                    self.manager.cache(received.request_id, len(tokens) // BLOCK)
            finally:
                self.manager.release(received.request_id)
        if len(self.expected) > 2 and self.rng.random() < 0.02:  # the user has gone
            gone = self.rng.choice(sorted(self.expected))
            self.manager.release(gone)
            del self.expected[gone]
            if self.rng.random() < 0.5:  # else the prefill instance will hear of it when it pushes
                (self.mailbox / gone).unlink(missing_ok=True)
        if len(self.expected) > 3:
            return
        number = self.rng.randrange(6)
        tokens = prompt_of(number)
        request_id = f"{os.getpid()}-receive-{self.made}"
        self.made += 1
        self.manager.match(request_id, tokens)
        try:
            have = len(self.manager.block_table(request_id))
            self.manager.wait(request_id, PATIENCE_S)
            address = self.receiver.reserve(request_id, len(tokens) // BLOCK - have, peer=self.mailbox.name)
        except BaseException:
            self.manager.release(request_id)
            raise
        self.expected[request_id] = tokens
        letter = self.mailbox / request_id
        letter.with_suffix(".new").write_text(f"{number} {address.text()}")
        letter.with_suffix(".new").rename(letter)


def prompt_of(number: int) -> np.ndarray:
    """Five blocks and a token, the first two of them shared by all."""
    tokens = np.arange(5 * BLOCK, dtype=np.int32) + 50_000
    tokens[2 * BLOCK :] += 1000 * number
    return tokens


def seeds_of(tokens: np.ndarray) -> np.ndarray:
    return chain(words_of(tokens), 4 * BLOCK, b"")


def engine(role: str, name: str, seed: str, mailbox: str) -> int:
    """The life of an engine process; it returns only if it could not begin, or something is wrong."""
    kind = {"prefill": PrefillInstance, "decode": DecodeInstance}[role]
    try:
        started = CacheManager.open_or_create(name, CONFIG)
        instance = kind(started.manager, random.Random(seed), mmap.mmap(-1, 4096), Path(mailbox))
    except (SharedMemoryFull, WorkerFailed) as error:
        print(f"{name}: {type(error).__name__}: {error}", flush=True)
        return NO_ROOM
    served = Path(mailbox).parent / f"{name}.served"
    if served.exists() and not started.warm:
        print(f"{name} has served requests, and its ledger is not there any more: {started}", flush=True)
        return 1
    served.touch()
    instance.serve()
    return 1


# The process that watches


class Ledger:
    """One instance as it is seen from outside: its engine, its recorder, its log."""

    def __init__(self, role: str, name: str, folder: Path) -> None:
        self.role, self.name, self.folder = role, name, folder
        self.engine: subprocess.Popen[bytes] | None = None
        self.recorder: subprocess.Popen[bytes] | None = None
        self.engines = self.recorders = 0
        self.follower: Follower | None = None
        self.struck_at = self.events = self.skipped = self.checks = 0

    def follow(self) -> None:
        """Read on; now and then every invariant is checked."""
        try:
            if self.follower is None:
                self.follower = Follower(self.name)
            while records := self.follower.poll():
                state = self.follower.apply(records)
                self.events += len(records)
                if self.events // 200 > self.checks:
                    self.checks = self.events // 200
                    wrong = check(state)
                    if wrong:
                        raise Failed(f"{self.name}, after event {self.follower.sequence}: {wrong[0]}")
            if not self.follower.reader.exists():  # its engine could not begin, and has removed it
                self.follower.close()
                self.follower = None
        except Overrun:
            assert self.follower is not None
            with contextlib.suppress(Overrun):  # there will be a snapshot
                self.follower.resynchronise()
                self.skipped += 1
        except LedgerNotFound:
            pass  # not yet

    def keep_running(self, seed: str, mailbox: Path) -> str:
        """Start who is not there. Returns why an engine or a recorder ended, for the books."""
        if self.engine is not None and (status := self.engine.poll()) is not None:
            self.engine = None
            if status not in (-signal.SIGKILL, NO_ROOM):
                raise Failed(f"the engine of {self.name} ended with status {status}: see {self.said('engine')}")
            return "engine without room" if status == NO_ROOM else ""
        if self.engine is None:
            self.engines += 1
            self.engine = self.start(
                "engine", "tests.campaigns.starved", "--engine", self.role, self.name, seed, mailbox
            )
        if self.recorder is not None and (status := self.recorder.poll()) is not None:
            self.recorder = None
            if "contradict" in self.said("recorder").read_text():
                raise Failed(f"the recorder of {self.name} ended with status {status}: see {self.said('recorder')}")
        if self.recorder is None and self.follower is not None:
            self.recorders += 1
            self.recorder = self.start("recorder", "kvledger.cli", "record", self.name, self.recording(self.recorders))
        return ""

    def start(self, what: str, module: str, *arguments: object) -> subprocess.Popen[bytes]:
        with self.said(what).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def said(self, what: str) -> Path:
        return self.folder / f"{self.name}.{what}.txt"

    def recording(self, number: int) -> Path:
        return self.folder / f"{self.name}.{number:03}.kvlog"

    def end(self) -> None:
        """The next engine finds everything as this process has followed it, and takes it down in peace."""
        with CacheManager.open(self.name) as manager:
            self.follow()
            wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
            wait_until("the end of the log is seen", self.at(manager), meanwhile=self.follow)
            assert self.follower is not None and self.follower.state is not None
            if state_digest(self.follower.state) != manager.digest():
                raise Failed(f"{self.name}: the followed state and the engine's differ")
        if self.recorder is not None:
            self.recorder.send_signal(signal.SIGTERM)
            self.recorder.wait(PATIENCE_S)
        left = objects_of(self.name)
        if left:
            raise Failed(f"{self.name} has left {sorted(left)}")

    def at(self, manager: CacheManager) -> Callable[[], bool]:
        return lambda: self.follower is not None and self.follower.sequence == manager.next_sequence - 1

    def recorded(self) -> int:
        """Replay what was recorded: each file stands for itself. Returns how many events there are."""
        events = 0
        for number in range(1, self.recorders + 1):
            if not self.recording(number).exists() or not self.recording(number).stat().st_size:
                continue  # killed before it had written a beginning
            reader = KvlogReader(self.recording(number))
            replay = Replay(restore(reader.snapshot) if reader.snapshot else None)
            while records := reader.poll():
                replay.feed(records)
            reader.close()
            wrong = check(replay.state) if replay.events else []
            if wrong:
                raise Failed(f"{self.recording(number)}: {wrong[0]}")
            events += replay.events
        return events


class Campaign:
    """Strikes everybody for so long."""

    def __init__(self, seconds: float, seed: int, folder: Path, *, little_room: bool) -> None:
        self.seconds, self.seed, self.little_room = seconds, seed, little_room
        self.rng = random.Random(seed)
        self.ballast = SHM / f"ballast-{os.getpid()}"
        prefill, decode = (f"starved-{role}-{os.getpid()}" for role in ("prefill", "decode"))
        self.mailbox = folder / prefill  # named for the instance that reads it
        self.mailbox.mkdir()
        self.ledgers = [Ledger("prefill", prefill, folder), Ledger("decode", decode, folder)]
        self.killed: Counter[str] = Counter()
        self.stopped: Counter[str] = Counter()
        self.others: Counter[str] = Counter()
        self.stops: list[tuple[float, int]] = []

    def run(self) -> None:
        """Strike, follow, keep running; then end in peace."""
        begun = time.monotonic()
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
        try:
            strike_at = begun
            while time.monotonic() - begun < self.seconds:
                for ledger in self.ledgers:
                    ledger.follow()
                    what = ledger.keep_running(f"{self.seed} {ledger.engines}", self.mailbox)
                    if what:
                        self.others[what] += 1
                        self.make_room()
                self.let_go(time.monotonic())
                if time.monotonic() > strike_at:
                    strike_at = time.monotonic() + self.rng.random()
                    self.strike()
                    if self.little_room and self.rng.random() < 0.5:
                        self.take_room()
                time.sleep(0.01)
            self.make_room()
            self.let_go(float("inf"))
            for ledger in self.ledgers:
                if ledger.engine is not None:
                    ledger.engine.kill()
                    ledger.engine.wait()
            for ledger in self.ledgers:
                if ledger.follower is not None:
                    ledger.end()
        finally:
            for loop in loops:
                loop.kill()
                loop.wait()
            self.clean()

    def strike(self) -> None:
        """Kill one process, or stop it for a while."""
        ledger = self.rng.choice(self.ledgers)
        sequence = ledger.follower.sequence if ledger.follower is not None else 0
        found = [(pid, role) for pid, role in processes_of(ledger.name)]
        if sequence - ledger.struck_at < 300 and self.rng.random() < 0.9:  # an engine gets somewhere, most of the time
            found = [(pid, role) for pid, role in found if role != "engine"]
        if not found:
            return
        role = self.rng.choice(sorted({role for _, role in found}))
        pid = self.rng.choice(sorted(pid for pid, other in found if other == role))
        if self.rng.random() < 0.25:
            self.stopped[role] += send(pid, signal.SIGSTOP)
            self.stops.append((time.monotonic() + self.rng.choice((0.1, 0.5, 3.0)), pid))
        else:
            self.killed[role] += send(pid, signal.SIGKILL)
            if role == "engine":
                ledger.struck_at = sequence

    def let_go(self, now: float) -> None:
        """Let stopped processes go on whose time has come."""
        for when, pid in [stop for stop in self.stops if stop[0] < now]:
            self.stops.remove((when, pid))
            send(pid, signal.SIGCONT)

    def take_room(self) -> None:
        """Leave so little of /dev/shm."""
        self.make_room()
        if self.rng.random() < 0.3:
            return
        room = os.statvfs(SHM)
        size = room.f_bavail * room.f_frsize - self.rng.choice((0, 16 << 10, 100 << 10, 300 << 10, 1 << 20))
        if size > 0:
            with self.ballast.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, size)

    def make_room(self) -> None:
        """Give it all back."""
        self.ballast.unlink(missing_ok=True)

    def clean(self) -> None:
        """Leave nothing, whatever has happened."""
        self.make_room()
        for ledger in self.ledgers:
            for pid, _ in processes_of(ledger.name):
                send(pid, signal.SIGKILL)
            if ledger.follower is not None:
                ledger.follower.close()
            remove_objects(ledger.name)


def processes_of(ledger: str) -> list[tuple[int, str]]:
    """Who works for a ledger, and as what, by the command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                roles = [ROLES[word] for word in words if word in ROLES]
                if roles and any(word in (ledger, f"{ledger}.pushes") for word in words):
                    found.append((int(entry.name), roles[0]))
    return found


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; says whether there was somebody."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def in_a_little_room(arguments: list[str]) -> int | None:
    """Run this campaign again where /dev/shm is small, if that is permitted here."""
    mount = f"mount -t tmpfs -o size={ROOM_BYTES} none {SHM}"
    command = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        return None
    return subprocess.run(
        [*command, sys.executable, "-m", "tests.campaigns.starved", "--inside", *arguments]
    ).returncode


def main() -> int:
    """Returns the exit status: 1, something was found."""
    if sys.argv[1:2] == ["--engine"]:
        return engine(*sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.starved", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument(
        "--seed", type=int, help="default: drawn, and printed; who is struck when also depends on the machine"
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else secrets.randbelow(10**9)
    if not arguments.inside:
        print(f"seed {seed}", flush=True)
        status = in_a_little_room([f"--seconds={arguments.seconds}", f"--seed={seed}"])
        if status is not None:
            return status
        print("no small /dev/shm may be mounted here (unshare --mount): there is room for all", flush=True)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder = Path(tempfile.mkdtemp(prefix="kvledger-starved-"))
    campaign = Campaign(arguments.seconds, seed, folder, little_room=arguments.inside)
    try:
        campaign.run()
        recorded = sum(ledger.recorded() for ledger in campaign.ledgers)
    except (Failed, InvariantViolation, LedgerError) as error:
        print(f"FAILED (seed {seed}, what was said and recorded is in {folder}): {type(error).__name__}: {error}")
        return 1
    shutil.rmtree(folder)
    events = sum(ledger.events for ledger in campaign.ledgers)
    print(
        f"killed: {said(campaign.killed)}\nstopped: {said(campaign.stopped)}\n"
        f"{sum(ledger.engines for ledger in campaign.ledgers)} engines begun, {campaign.others['engine without room']} "
        f"without room; {events:,} events followed, {recorded:,} of them found in recordings\n"
        "0 lost, 0 double-owned, 0 wrong bytes"
    )
    return 0


def said(counted: Counter[str]) -> str:
    """The counts in words."""
    return ", ".join(f"{counted[role]} {role}s" for role in sorted(counted)) or "nobody"


if __name__ == "__main__":
    sys.exit(main())
