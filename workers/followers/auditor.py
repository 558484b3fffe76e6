"""The auditor: replays a ledger live, checks its invariants and digests, and writes the snapshots.

It has a process of its own, so that none of this costs the engine anything. What it finds out stands in
``/<ledger>.auditor`` (:class:`ipc.signals.Signals`) for everybody to read, see :func:`progress`. It can be killed,
restarted or started late at any time: it goes on from the newest snapshot.

Checking all invariants costs about 0.5 µs per cached block, so doing it after every event would make the auditor fall
behind. By default it checks as often as costs it half of its time, and always before it writes a snapshot. When a check
fails, the events since the last sound state are replayed to find the first one after which something is broken, so what
it reports is as exact as if it had checked after each.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from enum import IntEnum
from types import FrameType
from typing import NamedTuple

from ipc import (
    LedgerError,
    LedgerExists,
    LedgerNotFound,
    LogCorrupt,
    Overrun,
    Record,
    SharedMemoryFull,
    record_bytes,
    snapshots,
)
from ipc.liveness import Lock, life_of
from ipc.ownership import remove_object
from ipc.processes import Identity, Life, own_identity
from ipc.signals import Signals
from statemachine.check import check
from statemachine.errors import InvariantViolation
from statemachine.events import KINDS
from statemachine.records.codec import CodecError
from statemachine.records.replay import Replay
from statemachine.records.snapshot import restore, snapshot
from statemachine.state.state import State
from workers.followers.follow import Follower, Skipped

STATE, HEARTBEAT, AUDITED, SNAPSHOT, BROKEN, PROCESS, STARTED, NAMESPACE = 0, 8, 16, 24, 32, 40, 41, 42
"""Words of the auditor's signals."""
_SNAPSHOTS_KEPT = 2
_SLICE = 64
"""Events between two looks at the clock."""
_WAIT_S = 0.25


class AuditState(IntEnum):
    """What an auditor is doing."""

    STARTING = 0
    FOLLOWING = 1
    BROKEN = 2
    """It found an event that broke something; the text says which and what. It reads no further."""


class AuditorRunning(LedgerError):
    """Another process audits this ledger and writes its snapshots."""


class Verdict(NamedTuple):
    """The first event that broke something, and what."""

    event: int
    reason: str


class AuditProgress(NamedTuple):
    """What an auditor has published."""

    state: AuditState
    audited: int
    """The last event it replayed."""
    snapshot: int
    """The event after which it took its last snapshot; 0: none."""
    verdict: Verdict | None
    pid: int
    alive: bool
    """Whether that process still runs."""


def signals_name(ledger: str) -> str:
    """Name of the auditor's signals."""
    return f"/{ledger}.auditor"


def progress(ledger: str) -> AuditProgress | None:
    """What the auditor of a ledger has published; ``None``: it never had one."""
    try:
        signals = Signals(signals_name(ledger), read_only=True)
    except LedgerNotFound:
        return None
    words = signals.words
    try:
        state = AuditState(words[STATE])
        verdict = Verdict(words[BROKEN], signals.text) if state == AuditState.BROKEN else None
        lock = Lock.on(signals.name, signals.identity)
        try:
            owner = Identity(words[PROCESS], words[STARTED], words[NAMESPACE])
            lives = life_of(lock.is_taken(), owner) is not Life.DEAD
        finally:
            lock.close()
        return AuditProgress(state, words[AUDITED], words[SNAPSHOT], verdict, words[PROCESS], lives)
    except (ValueError, LedgerNotFound):  # no auditor's, or gone with the ledger since
        return None
    finally:
        signals.close()


class Auditor:
    """One auditor; :meth:`step` is the whole loop body.

    Args:
        ledger: its name.
        check_every: check all invariants after so many events; ``None``: as often as takes half of the time.
        snapshot_bytes: write a snapshot after so many bytes of log; ``None``: after a segment's worth.
        snapshot_s: write one after so many seconds too, if anything was logged, and keep no older one: what they hold
            of prompts that are not cached any more goes with them.
        publish: write snapshots and signals. One auditor per ledger does; others only check.

    Raises:
        AuditorRunning: ``publish``, and another process does already.
        ipc.LedgerNotFound, ipc.Overrun
    """

    def __init__(
        self,
        ledger: str,
        *,
        check_every: int | None = None,
        snapshot_bytes: int | None = None,
        snapshot_s: float | None = None,
        publish: bool = True,
    ) -> None:
        self.follower = Follower(ledger)
        self.verdict: Verdict | None = None
        self.skipped: list[Skipped] = []
        """Events that were gone before they could be audited."""
        self.checks = 0
        """How often all invariants were checked."""
        self.events = 0
        """Events audited by this process."""
        self._publisher: _Publisher | None = None
        try:
            if publish:
                self._publisher = _Publisher(self.follower, _SNAPSHOTS_KEPT if snapshot_s is None else 1)
        except BaseException:
            self.follower.close()
            raise
        self._check_every = check_every
        self._snapshot_bytes = snapshot_bytes or self.follower.reader.segment_bytes
        self._snapshot_s = snapshot_s
        self._saved_at = time.monotonic()
        self._sound: bytes | None = None
        """The state after the last check, as a snapshot; ``None``: before the first event."""
        self._since: list[Record] = []
        """Events after that."""
        self._since_bytes = 0
        self._unsaved_bytes = 0
        self._replaying_s = self._checking_s = 0.0
        self._start_over()

    def _start_over(self) -> None:
        state = self.follower.state
        self._sound = None if state is None else snapshot(state)
        self._since.clear()
        self._since_bytes = self._unsaved_bytes = 0

    def step(self, timeout: float = 0.0) -> int:
        """Audit what was logged; waits up to ``timeout`` seconds for it. Returns the number of events.

        Raises:
            ipc.Overrun: it was overrun, and there is no snapshot to go on from.
        """
        if self.verdict is not None:
            return 0
        try:
            records = self.follower.poll(timeout)
        except Overrun:
            self.skipped.append(self.follower.resynchronise())
            self._start_over()
            return 0
        except LogCorrupt as error:
            self._conclude(self.follower.sequence + 1, str(error))
            return 0
        if not records and (self._since or self._is_late()):
            self.check()  # there is time for it now
        size = self._check_every or _SLICE
        for start in range(0, len(records), size):
            self._audit(records[start : start + size])
            if self.verdict is not None:
                break
        if self._publisher is not None:
            self._publisher.heartbeat(self.follower.sequence)
        return len(records)

    def _audit(self, records: list[Record]) -> None:
        begun = time.perf_counter()
        before = self.follower.sequence
        failed = ""
        try:
            self.follower.apply(records)
        except Exception as error:  # also what apply() never means to raise is a finding about this event
            failed = _told(error)
        applied = self.follower.sequence - before
        self.events += applied
        self._since += records[:applied]
        self._since_bytes += sum(record_bytes(len(record.payload)) for record in records)
        self._replaying_s += time.perf_counter() - begun
        if failed:
            self._explain(failed, records, applied)
        elif self._is_due():
            self.check()

    def _is_due(self) -> bool:
        if self._since_bytes >= self._snapshot_bytes or self._is_late():
            return True
        if self._check_every is not None:
            return len(self._since) >= self._check_every
        return self._checking_s <= self._replaying_s

    def _is_late(self) -> bool:
        """Whether it is time for a snapshot, though not much was logged."""
        if self._snapshot_s is None or not self._since_bytes + self._unsaved_bytes:
            return False
        return time.monotonic() - self._saved_at >= self._snapshot_s

    def check(self) -> None:
        """Check all invariants now, and write a snapshot if it is time for one."""
        state = self.follower.state
        if state is None or self.verdict is not None:
            return
        begun = time.perf_counter()
        broken = check(state)
        self.checks += 1
        if broken:
            self._find_first()
            return
        self._sound = snapshot(state)
        late = self._is_late()
        self._unsaved_bytes += self._since_bytes
        self._since = []
        self._since_bytes = 0
        self._checking_s += time.perf_counter() - begun
        if self._publisher is not None and (late or self._unsaved_bytes >= self._snapshot_bytes):
            if self._publisher.save(self.follower.sequence, self._sound):
                self._unsaved_bytes = 0
                self._saved_at = time.monotonic()

    def _explain(self, failed: str, records: list[Record], applied: int) -> None:
        """An event does not fit, or a digest differs: unless an earlier event broke an invariant, that is the first."""
        state = self.follower.state
        if state is not None and check(state):
            self._find_first()
            return
        at = min(applied, len(records) - 1)
        if applied and failed.startswith(f"event {records[applied - 1].sequence}:"):
            at = applied - 1  # a digest is compared after its event was applied
        self._conclude(records[at].sequence, failed)

    def _find_first(self) -> None:
        """All was well in the last sound state, something is broken now: find the event between that did it."""
        low, high = 0, len(self._since)
        sound = self._sound
        broken = ["it cannot be reproduced: this auditor's own memory was damaged"]
        while low < high:
            middle = (low + high) // 2
            state, found = _replayed(sound, self._since[low : middle + 1])
            if found:
                high, broken = middle, found
            else:
                low, sound = middle + 1, snapshot(state)
        record = self._since[min(low, len(self._since) - 1)]
        kind = KINDS[record.kind].__name__
        reason = f"event {record.sequence} ({kind}) broke an invariant: {'; '.join(broken[:5])}"
        self._conclude(record.sequence, reason)

    def _conclude(self, event: int, reason: str) -> None:
        if not reason.startswith("event "):
            reason = f"event {event}: {reason}"
        self.verdict = Verdict(event, reason)
        if self._publisher is not None:
            self._publisher.broken(self.verdict)

    @property
    def digests(self) -> int:
        """How many digests of the engine were compared."""
        return self.follower.digests

    def close(self) -> None:
        """Leave. Signals and snapshots stay as long as the ledger does."""
        if self._publisher is not None:
            self._publisher.close()
        self.follower.close()


def _replayed(sound: bytes | None, records: list[Record]) -> tuple[State, list[str]]:
    """A sound state after some more events, and what is broken in it then."""
    replay = Replay(None if sound is None else restore(sound, expect_sound=False))
    try:
        replay.feed(records)
    except Exception as error:
        return replay.state, [_told(error)]
    return replay.state, check(replay.state)


def _told(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, InvariantViolation | CodecError) else f"{type(error).__name__}: {text}"


class _Publisher:
    """The signals and snapshots of the one auditor of a ledger; a lock on the signals says who that is."""

    def __init__(self, follower: Follower, kept: int) -> None:
        self._follower = follower
        self._kept = kept
        name, identity = signals_name(follower.ledger), follower.reader.identity
        try:
            self._signals = Signals(name, create=True, identity=identity)
        except LedgerExists:
            self._signals = Signals(name, identity=identity)
        words = self._signals.words
        self._lock = Lock.on(name, identity)
        if not self._lock.take():
            pid = words[PROCESS]
            self._lock.close()
            self._signals.close()
            raise AuditorRunning(f"process {pid} audits ledger {follower.ledger!r} already") from None
        words[STARTED], words[NAMESPACE] = 0, 0
        words[PROCESS], words[STARTED], words[NAMESPACE] = own_identity()
        words[BROKEN] = 0
        words[SNAPSHOT] = snapshots.newest_sequence(follower.ledger)
        words[AUDITED] = follower.sequence
        words[STATE] = AuditState.FOLLOWING

    def heartbeat(self, sequence: int) -> None:
        """Audited up to here, and alive."""
        self._signals.words[AUDITED] = sequence
        self._signals.words[HEARTBEAT] = time.time_ns()

    def save(self, sequence: int, data: bytes) -> bool:
        """Write a snapshot and remove old ones; ``False``: there is no room for it."""
        ledger = self._follower.ledger
        try:
            snapshots.write(ledger, sequence, data, self._signals.identity)
        except SharedMemoryFull as error:
            self._signals.text = str(error)
            numbers = snapshots.sequences(ledger)
            for number in numbers[:-1]:
                snapshots.remove(ledger, number)  # the newest is enough to go on from
            return False
        if not self._follower.reader.exists():
            snapshots.remove(ledger, sequence, self._signals.identity)  # the ledger was removed meanwhile
            return True
        self._signals.words[SNAPSHOT] = sequence
        for number in snapshots.sequences(ledger)[: -self._kept]:
            snapshots.remove(ledger, number)
        return True

    def broken(self, verdict: Verdict) -> None:
        """Announce what was found."""
        self._signals.text = verdict.reason
        self._signals.words[BROKEN] = verdict.event
        self._signals.words[STATE] = AuditState.BROKEN

    def close(self) -> None:
        """Leave; with the ledger gone, its signals go too."""
        if not self._follower.reader.exists():
            remove_object(self._signals.name, self._signals.identity)
        self._signals.close()
        self._lock.close()


def main(arguments: list[str]) -> int:
    """``ledger [snapshot_bytes [snapshot_s]]``: audits until SIGTERM, a verdict (status 1), or the engine is gone."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then stops its auditor
    os.nice(5)  # the engine and its workers come first
    try:
        name, often, seconds = [*arguments, "", ""][:3]
        auditor = Auditor(
            name,
            snapshot_bytes=int(often) if often else None,
            snapshot_s=float(seconds) if seconds else None,
        )
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        while not stopping and auditor.verdict is None and (auditor.step(_WAIT_S) or not auditor.follower.ended()):
            pass
    except LedgerError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        auditor.close()
    return 0 if auditor.verdict is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
