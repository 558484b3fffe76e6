"""A log whose writer died: every row of the decision table with real bytes, and readers that cross into a new epoch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ipc import LogCorrupt, LogReader, LogWriter, Overrun, Record, SharedMemoryFull, memory, record_bytes, segment
from ipc.control import Control
from ipc.names import segment_name
from ipc.ownership import remove_objects, segments_of
from ipc.processes import own_identity
from ipc.recovery import Decision, End, examine, recover
from ipc.segment import HEADER_BYTES, TAIL, MappedSegment
from ipc.writer import next_epoch
from tests.campaigns.dying import Moment, die_in_append
from tests.waiting import PATIENCE_S, wait_until

SMALL = 64 << 10


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"logrec-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


# The end of a segment, row by row


def write(writer: LogWriter, *subjects: int) -> None:
    records = [(1, subject, b"", bytes([subject]) * 70) for subject in subjects]
    writer.append(records)


RECORD = record_bytes(70)


def flip(writer: LogWriter, record: int, byte: int) -> None:
    writer._buffer[HEADER_BYTES + record * RECORD + byte] ^= 1


def clean(writer: LogWriter) -> None:
    pass


def hint_left_behind(writer: LogWriter) -> None:
    writer._words[TAIL] = HEADER_BYTES + RECORD


def two_of_three_committed(writer: LogWriter) -> None:
    die_in_append(writer, Moment.COMMITTING, write, 7, 8, 9)


def bodies_without_commit_words(writer: LogWriter) -> None:
    die_in_append(writer, Moment.BEFORE_COMMIT, write, 7, 8, 9)


def half_a_body(writer: LogWriter) -> None:
    die_in_append(writer, Moment.IN_A_LINE, write, 7)


def committed_without_hint(writer: LogWriter) -> None:
    die_in_append(writer, Moment.BEFORE_HINT, write, 7, 8)


def published_and_damaged(writer: LogWriter) -> None:
    flip(writer, 2, 80)


def last_published_damaged(writer: LogWriter) -> None:
    flip(writer, 5, 80)


def commit_word_damaged(writer: LogWriter) -> None:
    flip(writer, 2, 61)


def damaged_with_a_lost_hint(writer: LogWriter) -> None:
    flip(writer, 2, 80)
    writer._words[TAIL] = HEADER_BYTES


def published_and_erased(writer: LogWriter) -> None:
    writer._buffer[HEADER_BYTES + 5 * RECORD : HEADER_BYTES + 6 * RECORD] = bytes(RECORD)


ROWS: list[tuple[Callable[[LogWriter], None], Decision, int]] = [
    (clean, Decision.CLEAN, 6),
    (hint_left_behind, Decision.CLEAN, 6),
    (committed_without_hint, Decision.CLEAN, 8),
    (two_of_three_committed, Decision.TORN, 6),
    (bodies_without_commit_words, Decision.TORN, 6),
    (half_a_body, Decision.TORN_BODY, 6),
    (published_and_damaged, Decision.CORRUPT, 2),
    (last_published_damaged, Decision.CORRUPT, 4),
    (commit_word_damaged, Decision.CORRUPT, 2),
    (damaged_with_a_lost_hint, Decision.CORRUPT, 2),
    (published_and_erased, Decision.CORRUPT, 4),
]


def end_of(ledger: str) -> End:
    segment = MappedSegment(ledger, 1, 0)
    try:
        return examine(segment)
    finally:
        segment.close()


def committed_then_nothing(writer: LogWriter) -> None:
    """The rest of the transaction was never written: as if its records had gone out one by one."""
    die_in_append(writer, Moment.BEFORE_HINT, write, 7, 8, 9)
    at = HEADER_BYTES + 8 * RECORD
    writer._buffer[at : at + RECORD] = bytes(RECORD)


ROWS.append((committed_then_nothing, Decision.UNFINISHED, 6))


@pytest.mark.parametrize(("damage", "decision", "whole"), ROWS, ids=[row[0].__name__ for row in ROWS])
def test_decision_table(name: str, damage: Callable[[LogWriter], None], decision: Decision, whole: int) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    for subjects in ([1], [2], [3, 4], [5, 6]):
        write(writer, *subjects)
    damage(writer)
    end = end_of(name)
    assert (end.decision, end.sequence) == (decision, whole + 1)
    assert end.offset == HEADER_BYTES + whole * RECORD
    got: list[Record] = []
    if decision is Decision.CORRUPT:
        assert end.again > end.bad >= end.offset
        with pytest.raises(LogCorrupt, match=f"the log goes on at byte {end.again}") as corrupt:
            recover(name, 1, got.extend)
        assert corrupt.value.offset == end.bad
    else:
        assert recover(name, 1, got.extend).last_sequence == whole
        assert [record.subject for record in got][:6] == [1, 2, 3, 4, 5, 6] and len(got) == whole
    writer.close(unlink=True)


def test_a_prompt_that_looks_like_records_is_not_taken_for_corruption(name: str) -> None:
    """What a user sends stands in payloads; a writer that dies in the middle must not be confused by it."""
    other = f"{name}-other"
    forge = LogWriter.create(other, schema_hash=1, segment_bytes=SMALL)
    write(forge, 1, 2, 3)
    forged = bytes(forge._buffer[HEADER_BYTES : HEADER_BYTES + 3 * RECORD])
    forge.close(unlink=True)
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)

    def prompt(writer: LogWriter) -> None:
        writer.append([(1, 1, b"", forged)])

    die_in_append(writer, Moment.BEFORE_COMMIT, prompt)
    assert end_of(name).decision is Decision.TORN
    writer.close(unlink=True)


def test_a_damaged_header_needs_a_snapshot_from_after_it(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    first_of_second = 0
    for i in range(1000):
        write(writer, i % 200 + 1)
        if writer._index == 2 and not first_of_second:
            first_of_second = writer.next_sequence - 1
    damaged = Control.open(name)  # any mapping of it will do
    damaged.close()
    with open(f"/dev/shm{segment_name(name, 1, 1)}", "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    got: list[Record] = []
    with pytest.raises(LogCorrupt, match="header is damaged"):
        recover(name, 1, got.extend)
    with pytest.raises(LogCorrupt, match="header is damaged"):
        recover(name, first_of_second - 1, got.extend)
    got.clear()
    recover(name, first_of_second, got.extend)  # the next event after such a snapshot
    assert got[0].sequence == first_of_second and got[-1].sequence == 1000
    writer.close(unlink=True)


def to_the_end(reader: LogReader) -> None:
    with contextlib.closing(reader):
        for _ in range(5_000):
            reader.poll(1)


@pytest.mark.parametrize("number", [0, 1])
def test_readers_call_a_damaged_header_damage(name: str, number: int) -> None:
    """Not events that are gone: who keeps more of the log would not get them back."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=None)
    early = LogReader(name)
    bases = [1]
    for i in range(1_200):
        write(writer, i % 200 + 1)
        if writer._index == len(bases):
            bases.append(writer.next_sequence - 1)
    with open(f"/dev/shm{segment_name(name, 1, number)}", "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    what = rf"{segment_name(name, 1, number)} at byte 0: .*header is damaged"
    with pytest.raises(LogCorrupt, match=what):
        to_the_end(LogReader(name, from_sequence=bases[number]))
    if number:
        with pytest.raises(LogCorrupt, match=what):
            to_the_end(early)
    late = LogReader(name, from_sequence=bases[2])
    assert late.poll(1)[0].sequence == bases[2], "what comes after it can be read"
    with pytest.raises(LogCorrupt, match=r"header is damaged"):
        recover(name, bases[number], lambda records: None)
    late.close()
    early.close()
    writer.close(unlink=True)


def test_a_segment_that_is_only_prepared_is_no_damage(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    writer._helper.submit(int).result()
    write(writer, 1)
    assert segments_of(name) == [(1, 0), (1, 1)]
    reader = LogReader(name)
    assert [record.subject for record in reader.poll()] == [1] and not reader.poll()
    reader.close()
    writer.close(unlink=True)


# Readers across epochs


def successor(name: str, dead: LogWriter) -> LogWriter:
    """What a new engine does. The lock is given up as the kernel would."""
    dead._control.close()
    control = Control.open(name)
    control.lock()
    last = recover(name, 1, lambda records: None).last_sequence
    return LogWriter.resume(control, last, epoch=next_epoch(control), segment_bytes=SMALL)


def abandon(writer: LogWriter) -> None:
    """Close what a writer that was left behind has open; its segments stay."""
    writer._helper.close()
    writer._prepared.result().close()


@pytest.mark.parametrize("moment", list(Moment))
def test_readers_cross_and_never_get_what_was_cut_off(name: str, moment: Moment) -> None:
    first = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    early, worker = LogReader(name), LogReader(name, worker=True)
    got: dict[LogReader, list[int]] = {early: [], worker: []}

    def read() -> None:
        for reader, subjects in got.items():
            while records := reader.poll():
                subjects += [record.subject for record in records]

    write(first, 1)
    read()
    write(first, 2)
    die_in_append(first, moment, write, 3, 4)
    counts = moment in (Moment.BEFORE_HINT, Moment.AFTER)
    expected = [1, 2, 3, 4] if counts else [1, 2]
    second = successor(name, first)
    assert second.next_sequence == len(expected) + 1
    read()
    assert got[early] == expected
    write(second, 5)
    read()
    abandon(second)
    third = successor(name, second)  # one that has written nothing in between is nobody's trouble either
    abandon(third)
    fourth = successor(name, third)
    write(fourth, 6)
    read()
    expected += [5, 6]
    assert got[early] == got[worker] == expected
    late = LogReader(name)
    subjects = []
    while records := late.poll():
        subjects += [record.subject for record in records]
    assert subjects == expected
    for reader in (early, worker, late):
        reader.close()
    abandon(first)
    fourth.close(unlink=True)


def test_a_reader_of_a_dead_ledger_sees_what_the_hint_does_not_say(name: str) -> None:
    code = (
        "import sys\nfrom ipc import LogWriter\nfrom tests.campaigns.dying import Moment, die_in_append\n"
        "from tests.ipc.test_log_recovery import write\n"
        "writer = LogWriter.create(sys.argv[1], schema_hash=1, segment_bytes=1 << 16)\n"
        "write(writer, 1)\ndie_in_append(writer, Moment.BEFORE_HINT, write, 2, 3, really=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, name], timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGKILL
    reader = LogReader(name)
    assert [record.subject for record in reader.poll() + reader.poll()] == [1, 2, 3]
    assert not reader.poll()
    reader.close()


def test_old_epochs_go_when_nobody_needs_them(name: str) -> None:
    first = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    slow = LogReader(name)
    write(first, 1)
    abandon(first)
    second = successor(name, first)
    second._retain_bytes = 2 * SMALL
    for i in range(2000):
        write(second, i % 200)
    wait_until("the first epoch's segments go", lambda: segments_of(name)[0][0] == 2)
    slow.poll()
    with pytest.raises(Overrun):
        slow.poll()
    slow.close()
    second.close(unlink=True)


KILLED_WHILE_IT_STARTS_A_PROCESS = """
import os, subprocess, sys
from ipc.control import Control
control = Control.create(sys.argv[1], 1)
subprocess.Popen(["sleep", "0.5"], pass_fds=[control._lock.fd])
os.kill(os.getpid(), 9)
"""


def test_a_lock_that_a_dying_writer_left_to_a_child_is_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the campaign: between fork and exec the child of a dead writer still holds its lock."""
    monkeypatch.setattr("ipc.control._TEARDOWN_S", PATIENCE_S)
    subprocess.run([sys.executable, "-c", KILLED_WHILE_IT_STARTS_A_PROCESS, name], timeout=PATIENCE_S)
    control = Control.open(name)
    assert not control.writer_alive()
    control.lock()
    control.begin_writing()
    assert control.writer == own_identity()
    control.close()


def test_what_was_staged_and_not_published_does_not_count(name: str) -> None:
    """The writer died between staging a transaction and publishing it: nobody may ever see it."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    write(writer, 1)
    writer.stage([(1, 2, b"", b"staged", b"")])
    got: list[Record] = []
    assert recover(name, 1, got.extend).last_sequence == 1 and [record.subject for record in got] == [1]
    writer.close(unlink=True)


def test_the_epoch_of_a_writer_that_died_while_it_began_is_not_used_again(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    write(writer, 1)
    control = Control.open(name)
    assert next_epoch(control) == 2
    segment.create(name, 2, 0, SMALL).close()  # reserved, and not yet announced in the control segment
    assert next_epoch(control) == 3
    control.close()
    writer.close(unlink=True)


def test_a_writer_that_takes_over_without_room_drops_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by simulation: what a dead writer leaves went when there was no room for a second segment."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    for subject in range(1, 250):
        write(writer, subject, subject, subject)
    assert len(segments_of(name)) > 2
    last = writer.next_sequence - 1
    writer.close()
    real = segment.create

    def full(ledger: str, epoch: int, index: int, size: int, identity: int) -> object:
        if index:
            raise SharedMemoryFull("full")
        return real(ledger, epoch, index, size, identity)

    monkeypatch.setattr(segment, "create", full)
    control = Control.open(name)
    control.lock()
    heir = LogWriter.resume(control, last, epoch=2, segment_bytes=SMALL)
    write(heir, 7)
    assert heir._prepared.exception() is not None
    assert recover(name, 1, lambda records: None).last_sequence == last + 1
    heir.close(unlink=True)


@pytest.mark.parametrize("written", [8, 40, 88])
@pytest.mark.parametrize("used", [False, True])
def test_a_header_that_was_never_finished_is_no_damage(name: str, written: int, used: bool) -> None:
    """Found by simulation: a writer killed while it began its next segment left a log that nobody could open."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    write(writer, 1)
    writer._prepared.result()
    begun = memory.attach(segment_name(name, 1, 1), write=True)
    begun[:written] = bytes(writer._buffer[:written])  # the checksum of a header comes last
    if used:  # then it had been finished once, and something stands behind it
        begun[HEADER_BYTES] = 2
    begun.close()
    if used:
        with pytest.raises(LogCorrupt, match="header is damaged"):
            recover(name, 1, lambda records: None)
    else:
        assert recover(name, 1, lambda records: None).last_sequence == 1
        control = Control.open(name)
        heir = LogWriter.resume(control, 1, epoch=next_epoch(control), segment_bytes=SMALL)
        assert (1, 1) not in segments_of(name)
        write(heir, 2)
        assert recover(name, 1, lambda records: None).last_sequence == 2
        heir.close()
    writer.close(unlink=True)
