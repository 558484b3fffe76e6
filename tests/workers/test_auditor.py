"""The auditor: real processes, real kills, real damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from ipc import LogReader, LogWriter, Overrun, snapshots
from ipc.names import SHM
from ipc.ownership import remove_objects, segments_of
from ipc.processes import start_time
from kvledger import CacheConfig, CacheManager
from statemachine.apply import apply, genesis
from statemachine.commands import Admit, Release
from statemachine.decide import decide
from statemachine.events import KIND_OF, LedgerOpened, ReleaseReason, RequestMatched
from statemachine.records import codec
from statemachine.records.snapshot import state_digest
from tests.waiting import PATIENCE_S, wait_until
from workers.followers import auditor
from workers.followers.auditor import Auditor, AuditorRunning, AuditState, signals_name
from workers.followers.follow import Follower

SMALL = 64 << 10


@pytest.fixture
def manager() -> Iterator[CacheManager]:
    with CacheManager.create(f"audit-{os.getpid()}", config()) as manager:
        yield manager


def config(**changes: object) -> CacheConfig:
    plain = {"block_size": 4, "device_blocks": 64, "segment_bytes": SMALL, "retain_bytes": None}
    return CacheConfig(**{**plain, **changes})  # type: ignore[arg-type]


def serve(manager: CacheManager, first: int, count: int) -> None:
    for number in range(first, first + count):
        manager.admit(str(number), np.arange(40, dtype=np.int32) + 100 * (number % 9))
        manager.cache(str(number))
        manager.release(str(number))


def serve_and_be_audited(manager: CacheManager, first: int, count: int) -> None:
    """Serve, and give the auditor the time that it needs: it has the lowest priority, and the log must not run away."""
    serve(manager, first, count)
    auditor, last = manager._retention.pid, manager.next_sequence - 1
    wait_until(
        "the auditor has seen what was served, or is gone",
        lambda: not auditor or start_time(auditor) == 0 or audited(manager.name) >= last,
    )


def drain(one: Auditor) -> None:
    while one.step():
        pass
    one.check()


def follow_to_the_end(follower: Follower) -> None:
    while records := follower.poll():
        follower.apply(records)


def test_an_auditor_started_at_any_time_has_the_engines_state(manager: CacheManager) -> None:
    serve(manager, 0, 50)
    early = Auditor(manager.name, snapshot_bytes=SMALL)
    drain(early)
    serve(manager, 50, 400)
    manager.take_digest()
    drain(early)
    assert early.verdict is None and early.checks > 1 and len(snapshots.sequences(manager.name)) == 2
    assert early.follower.state is not None and state_digest(early.follower.state) == manager.digest()
    early.close()
    serve(manager, 450, 20)
    late = Auditor(manager.name)
    assert late.follower.sequence == snapshots.newest_sequence(manager.name) > 0
    drain(late)
    assert late.follower.state is not None and state_digest(late.follower.state) == manager.digest()
    published = auditor.progress(manager.name)
    assert published is not None and published.state == AuditState.FOLLOWING
    assert published.audited == manager.next_sequence - 1
    late.close()


def test_a_damaged_snapshot_is_passed_over(manager: CacheManager) -> None:
    serve(manager, 0, 300)
    one = Auditor(manager.name, snapshot_bytes=SMALL // 2)
    drain(one)
    one.close()
    older, newest = snapshots.sequences(manager.name)
    snapshots.remove(manager.name, newest)
    snapshots.write(manager.name, newest, b"this was never a state")
    follower = Follower(manager.name)
    assert follower.sequence == older
    follower.close()


def test_there_is_one_publishing_auditor(manager: CacheManager) -> None:
    serve(manager, 0, 5)
    first = Auditor(manager.name)
    with pytest.raises(AuditorRunning, match=f"process {os.getpid()}"):
        Auditor(manager.name)
    second = Auditor(manager.name, publish=False)
    drain(second)
    assert second.events == manager.next_sequence - 1
    second.close()
    first.close()
    Auditor(manager.name).close()


def test_a_file_in_the_place_of_the_signals_is_in_nobodys_way(manager: CacheManager) -> None:
    """Else there would be no auditor, and nothing would bound the log any more."""
    serve(manager, 0, 5)
    stray = SHM / signals_name(manager.name)[1:]
    stray.touch(0o600)
    one = Auditor(manager.name)
    drain(one)
    assert one.events == manager.next_sequence - 1
    with pytest.raises(AuditorRunning):
        Auditor(manager.name)
    one.close()
    stray.unlink()


@pytest.fixture
def broken_log() -> Iterator[tuple[LogWriter, list[int]]]:
    """A log that a test writes event by event, as an engine with a defect would."""
    writer = LogWriter.create(f"broken-{os.getpid()}", schema_hash=codec.SCHEMA_HASH, retain_bytes=None)
    yield writer, []
    writer.close(unlink=True)


def events_of_requests(count: int) -> list[object]:
    state = genesis(LedgerOpened(1, 40, 0, 0, 0, 0, "", ""))
    events: list[object] = [state.opened]
    for number in range(count):
        words = memoryview(np.arange(6, dtype=np.int32) + number).cast("B")
        for command in (Admit(str(number), words, b"", 5, 6), Release(str(number), ReleaseReason.FINISHED, False)):
            for event in decide(state, command):
                apply(state, event)
                events.append(event)
    return events


def publish(writer: LogWriter, events: list[object]) -> None:
    for event in events:
        record = codec.encode(event)  # type: ignore[arg-type]
        writer.append([record])


@pytest.mark.parametrize("check_every", [None, 1, 100])
def test_the_event_that_does_not_fit_is_named(broken_log: tuple[LogWriter, list[int]], check_every: int | None) -> None:
    writer, _ = broken_log
    events = events_of_requests(200)
    at = next(i for i in range(333, 400) if isinstance(events[i], RequestMatched))
    del events[at]
    publish(writer, events)
    one = Auditor(writer.ledger, check_every=check_every)
    drain(one)
    assert one.verdict is not None and one.verdict.event == at + 1, one.verdict
    published = auditor.progress(writer.ledger)
    assert published is not None and published.state == AuditState.BROKEN and published.verdict == one.verdict
    assert one.step() == 0
    one.close()


@pytest.mark.parametrize("check_every", [None, 1, 7, 1000])
@pytest.mark.parametrize("at", [1, 2, 50, 398, 399])
def test_the_first_event_after_which_an_invariant_fails_is_found(
    broken_log: tuple[LogWriter, list[int]], check_every: int | None, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect in apply() itself, which validates and then loses a block: only the invariants can see that."""
    writer, _ = broken_log
    events = events_of_requests(200)
    publish(writer, events)
    real, victim = apply, events[at]

    def careless(state: object, event: object) -> None:
        real(state, event)  # type: ignore[arg-type]
        if event == victim:
            state.counters.requests += 1  # type: ignore[attr-defined]
            state.device.pool.free.pop(0)  # type: ignore[attr-defined]

    monkeypatch.setattr("statemachine.records.replay.apply", careless)
    one = Auditor(writer.ledger, check_every=check_every)
    drain(one)
    assert one.verdict is not None and one.verdict.event == at + 1, one.verdict
    assert "conservation: DEVICE block" in one.verdict.reason and type(victim).__name__ in one.verdict.reason
    one.close()


def test_an_invariant_that_broke_before_a_digest_differs_is_named_first(
    manager: CacheManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(manager, 0, 30)
    manager.take_digest()
    real = apply

    def careless(state: object, event: object) -> None:
        real(state, event)  # type: ignore[arg-type]
        if isinstance(event, RequestMatched) and event.request == 3:
            state.device.pool.free.pop(0)  # type: ignore[attr-defined]

    monkeypatch.setattr("statemachine.records.replay.apply", careless)
    reader = LogReader(manager.name)
    at = next(r.sequence for r in reader.poll() if r.kind == KIND_OF[RequestMatched] and r.subject == 3)
    reader.close()
    for check_every in (None, 1, 1000):
        one = Auditor(manager.name, check_every=check_every)
        drain(one)
        assert one.verdict is not None and one.verdict.event == at, one.verdict
        one.close()


def test_a_defect_that_cannot_be_reproduced_is_told(manager: CacheManager) -> None:
    serve(manager, 0, 3)
    one = Auditor(manager.name, check_every=1000)
    one.step()
    assert one.follower.state is not None
    one.follower.state.device.pool.free.pop(0)
    drain(one)
    assert one.verdict is not None and "own memory" in one.verdict.reason
    one.close()


def test_another_digest_is_named(manager: CacheManager, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(manager, 0, 30)
    manager.state.counters.requests += 1  # the engine's memory goes wrong
    manager.take_digest()
    at = manager.next_sequence - 1
    serve(manager, 30, 3)
    one = Auditor(manager.name)
    drain(one)
    assert one.verdict is not None and one.verdict.event == at and "another digest" in one.verdict.reason
    one.close()


def start(ledger: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "workers.followers.auditor", ledger], stderr=subprocess.PIPE)


def audited(ledger: str) -> int:
    found = auditor.progress(ledger)
    return found.audited if found is not None else 0


def test_a_killed_auditor_goes_on_from_its_snapshot(manager: CacheManager) -> None:
    """Killed again and again at whatever it is doing, it still sees everything, and ends with its ledger."""
    served = 0
    for _ in range(4):
        process = start(manager.name)
        goal = manager.next_sequence + 500
        serve(manager, served, 250)
        served += 250
        wait_until("the auditor has seen so much", lambda goal=goal: audited(manager.name) >= goal)
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
    assert snapshots.newest_sequence(manager.name) > 0
    last = start(manager.name)
    wait_until("the last auditor has seen everything", lambda: audited(manager.name) == manager.next_sequence - 1)
    manager.close()
    assert last.wait(PATIENCE_S) == 0
    assert last.stderr is not None
    last.stderr.close()


def test_the_log_stays_at_its_limit_without_an_operators_doing() -> None:
    limit = 6 * SMALL
    with CacheManager.create(f"audit-{os.getpid()}", config(retain_bytes=limit)) as manager:
        serve(manager, 0, 20)
        assert manager._retention.pid == 0, "a short-lived manager starts no process"
        served = 20

        def serve_more() -> None:
            nonlocal served
            serve_and_be_audited(manager, served, 50)
            served += 50

        wait_until(
            "thirty segments have gone, and the log keeps to its limit",
            lambda: segments_of(manager.name)[0][1] > 30 and manager.stats()["log_bytes"] <= limit + 2 * SMALL,
            meanwhile=serve_more,
            pause_s=0,
        )
        stats = manager.stats()
        assert segments_of(manager.name)[0][1] > 30 and stats["snapshot_events"] > 0, stats
        pid = manager._retention.pid
        os.kill(pid, signal.SIGKILL)
        wait_until("the auditor is replaced", lambda: manager._retention.pid != pid, meanwhile=serve_more, pause_s=0.05)
        follower = Follower(manager.name)  # whatever was dropped: snapshot and log together still have everything
        follow_to_the_end(follower)
        assert follower.state is not None and state_digest(follower.state) == manager.digest()
        follower.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_nothing_goes_that_no_snapshot_covers() -> None:
    """With its auditor stopped the log exceeds its limit, and says so; it shrinks again afterwards."""
    limit = 4 * SMALL
    with CacheManager.create(f"audit-{os.getpid()}", config(retain_bytes=limit)) as manager:
        served = 0
        while not manager._retention.pid:
            serve(manager, served, 10)
            served += 10
        wait_until("the auditor has begun", lambda: audited(manager.name))
        os.kill(manager._retention.pid, signal.SIGSTOP)
        while manager.stats()["log_bytes"] < 3 * limit:
            serve(manager, served, 10)
            served += 10
        stats = manager.stats()
        newest = stats["snapshot_events"]
        follower = Follower(manager.name)
        assert follower.sequence >= newest  # a snapshot may be there that its auditor had no time to tell of
        follow_to_the_end(follower)
        assert follower.state is not None and state_digest(follower.state) == manager.digest()
        follower.close()
        os.kill(manager._retention.pid, signal.SIGCONT)

        def serve_more() -> None:
            nonlocal served
            serve_and_be_audited(manager, served, 10)
            served += 10

        wait_until(
            "the log shrinks to its limit",
            lambda: manager.stats()["log_bytes"] <= limit + 2 * SMALL,
            meanwhile=serve_more,
            pause_s=0,
        )


def test_a_follower_that_was_overrun_goes_on_when_it_asks_to(manager: CacheManager) -> None:
    slow = Follower(manager.name)
    slow.apply(slow.poll())
    serve(manager, 0, 600)
    one = Auditor(manager.name, snapshot_bytes=SMALL)
    drain(one)
    manager._writer._retain_bytes = 2 * SMALL
    serve(manager, 600, 300)
    manager._writer._helper.submit(int).result()
    with pytest.raises(Overrun) as overrun:
        follow_to_the_end(slow)
    skipped = slow.resynchronise()
    assert skipped.first == overrun.value.wanted and skipped.last >= overrun.value.available - 1
    follow_to_the_end(slow)
    assert slow.state is not None and state_digest(slow.state) == manager.digest()
    slow.close()
    one.close()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvledger.cli", "audit", *arguments], capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_the_command_says_what_it_found(manager: CacheManager) -> None:
    serve(manager, 0, 30)
    manager.take_digest()
    done = command(manager.name, "--once", "--check-every", "1")
    assert done.returncode == 0 and "all invariants hold" in done.stdout and "1 digest agrees" in done.stdout
    manager.state.counters.requests += 1
    manager.take_digest()
    done = command(manager.name, "--once", "--json")
    assert done.returncode == 1 and f'"broken_at": {manager.next_sequence - 1}' in done.stdout
    assert done.stderr.count("\n") == 1 and f"event {manager.next_sequence - 1}:" in done.stderr
    for name in ("there-is-none", "no name"):
        done = command(name)
        assert done.returncode == 2 and "Traceback" not in done.stderr and name in done.stderr


def follows(manager: CacheManager, pid: int) -> bool:
    found = auditor.progress(manager.name)
    return found is not None and (found.pid, found.audited) == (pid, manager.next_sequence - 1)


def test_the_command_ends_with_its_ledger_or_at_ctrl_c(manager: CacheManager) -> None:
    serve(manager, 0, 30)
    for end in (lambda process: process.send_signal(signal.SIGINT), lambda process: manager.close()):
        process = subprocess.Popen(
            [sys.executable, "-m", "kvledger.cli", "audit", manager.name], stdout=subprocess.PIPE
        )
        wait_until("the command follows", lambda process=process: follows(manager, process.pid))
        end(process)
        output, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 and b"all invariants hold" in output


_READERS = """
import sys, xxhash
from ipc import LogReader
readers = [LogReader(sys.argv[1], name=f"reader {i}") for i in range(16)]
hashes = [xxhash.xxh3_64() for _ in readers]
print("ready", flush=True)
last = int(sys.stdin.readline())
while any(reader.cursor <= last for reader in readers):
    for reader, hash in zip(readers, hashes):
        for record in reader.wait(0.002):
            hash.update(repr(record).encode())
print(*(hash.hexdigest() for hash in hashes))
"""


def test_64_readers_all_read_the_same(manager: CacheManager) -> None:
    command_line = [sys.executable, "-c", _READERS, manager.name]
    processes = [subprocess.Popen(command_line, stdin=-1, stdout=-1, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    serve(manager, 0, 500)
    expected = xxhash.xxh3_64()
    reader = LogReader(manager.name)
    while records := reader.poll():
        for record in records:
            expected.update(repr(record).encode())
    reader.close()
    for process in processes:
        output, _ = process.communicate(f"{manager.next_sequence - 1}\n", timeout=PATIENCE_S)
        assert output.split() == [expected.hexdigest()] * 16


def test_a_damaged_record_is_named(manager: CacheManager) -> None:
    serve(manager, 0, 20)
    one = Auditor(manager.name)
    drain(one)
    at = manager.next_sequence
    offset = manager._writer._offset
    serve(manager, 20, 3)
    manager._writer._buffer[offset + 30] ^= 1
    drain(one)
    assert one.verdict is not None and one.verdict.event == at and "damaged" in one.verdict.reason
    one.close()


def test_a_ledger_that_fails_its_audit_keeps_its_log_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with CacheManager.create(f"audit-{os.getpid()}", config(retain_bytes=4 * SMALL)) as manager:
        serve(manager, 0, 10)
        manager.state.counters.requests += 1  # the engine's memory goes wrong
        manager.take_digest()
        at = manager.next_sequence - 1
        served = 10

        def serve_more() -> None:
            nonlocal served
            serve(manager, served, 5)
            served += 5

        wait_until(
            "the operator hears of it", lambda: "fails its audit" in caplog.text, meanwhile=serve_more, pause_s=0.02
        )
        assert f"fails its audit: event {at}" in caplog.text
        pid = manager._retention.pid
        serve(manager, served, 500)
        stats = manager.stats()
        assert stats["audit_broken_at"] == at and stats["log_bytes"] > 5 * SMALL
        assert manager._retention.pid == pid and segments_of(manager.name)[0] == (1, 0)


_ENGINE = """
import sys, time
import numpy as np
from kvledger import CacheConfig, CacheManager
manager = CacheManager.create(sys.argv[1], CacheConfig(block_size=4, device_blocks=64))
for number in range(50):
    manager.admit(str(number), np.arange(40, dtype=np.int32))
    manager.release(str(number))
print(manager.digest().hex(), flush=True)
time.sleep(600)
"""


def test_the_ledger_of_a_killed_engine_is_audited_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"audit-dead-{os.getpid()}"
    engine = subprocess.Popen([sys.executable, "-c", _ENGINE, name], stdout=subprocess.PIPE, text=True)
    assert engine.stdout is not None
    try:
        digest = engine.stdout.readline().strip()
        one = Auditor(name)
        drain(one)
        assert not one.follower.ended()
        engine.kill()
        engine.wait()
        assert not one.follower.ended(), "it may be started again"
        monkeypatch.setattr("workers.followers.follow.ORPHAN_GRACE_S", 0.05)
        wait_until("it is taken for ended", one.follower.ended)
        assert one.follower.state is not None and state_digest(one.follower.state).hex() == digest
        one.close()
    finally:
        engine.kill()
        engine.stdout.close()
        remove_objects(name)
