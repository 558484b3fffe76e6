"""The log in shared memory: real segments, real processes, real SIGKILL."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import (
    InvalidName,
    KvlogReader,
    KvlogWriter,
    LedgerError,
    LedgerExists,
    LedgerNotFound,
    LogCorrupt,
    LogReader,
    LogWriter,
    Overrun,
    Record,
    SharedMemoryFull,
    TransactionTooLarge,
    memory,
    segment,
)
from ipc.control import READERS, Control
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects, segments_of
from ipc.segment import NEXT, TAIL
from ipc.signals import Signals
from tests.waiting import PATIENCE_S, wait_until

Entry = tuple[int, int, bytes, bytes]
SMALL = 64 << 10
TRANSACTIONS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 2**64 - 1), st.binary(max_size=24), st.binary(max_size=300)),
        min_size=1,
        max_size=4,
    ),
    max_size=60,
)


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"log-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


def write(writer: LogWriter, entries: list[Entry]) -> None:
    writer.append(entries)


def drain(reader: LogReader | KvlogReader) -> list[Record]:
    found = []
    while records := reader.poll():
        found += records
    return found


def at_most(writer: LogWriter, segments: int) -> bool:
    """Whether no more segments than these are left, once the writer's thread has put the old ones away."""
    writer._helper.submit(int).result()
    return len(segments_of(writer.ledger)) <= segments


def plain(record: Record) -> Entry:
    return record.kind, record.subject, record.args, record.payload


@given(TRANSACTIONS, st.integers(1, 100))
def test_readers_get_what_was_written(transactions: list[list[Entry]], start: int) -> None:
    ledger = f"prop-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1, segment_bytes=SMALL, retain_bytes=None)
    try:
        early = LogReader(ledger)
        got = []
        for entries in transactions:
            write(writer, entries)
            got += early.poll()
        expected = [(k, s, a.ljust(24, b"\0"), p) for entries in transactions for k, s, a, p in entries]
        assert [plain(record) for record in got] == expected
        assert [record.sequence for record in got] == list(range(1, len(expected) + 1))
        late = LogReader(ledger, from_sequence=start)
        assert [plain(record) for record in drain(late)] == expected[start - 1 :]
        early.close()
        late.close()
    finally:
        writer.close(unlink=True)


def test_rotation_keeps_every_record_and_retention_drops_whole_segments(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=3 * SMALL)
    slow = LogReader(name)
    for i in range(4000):
        write(writer, [(1, i, b"", bytes(60))])
    assert at_most(writer, 4)  # three kept, one prepared
    with pytest.raises(Overrun) as overrun:
        LogReader(name, from_sequence=1)
    assert overrun.value.wanted == 1 < overrun.value.available
    late = LogReader(name, from_sequence=overrun.value.available)
    assert [record.subject for record in drain(late)] == list(range(overrun.value.available - 1, 4000))
    with pytest.raises(Overrun):
        drain(slow)
    late.close()
    slow.close()
    writer.close(unlink=True)


def test_a_worker_holds_the_log_back(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=SMALL)
    worker = LogReader(name, worker=True)
    for i in range(10):
        write(writer, [(1, i, b"", bytes(60))])
    assert len(drain(worker)) == 10  # it has begun to read, and says how far it is
    for i in range(4000):
        write(writer, [(1, i, b"", bytes(60))])
    held = len(segments_of(name))
    assert held > 8
    assert len(drain(worker)) == 4000
    for i in range(1000):
        write(writer, [(1, i, b"", bytes(60))])
    assert at_most(writer, 4)
    worker.close()
    writer.close(unlink=True)


def test_the_log_is_held_for_a_worker_that_is_yet_to_come(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=SMALL)
    writer.hold(lambda: 700)
    for i in range(4000):
        write(writer, [(1, i, b"", bytes(60))])
    worker = LogReader(name, from_sequence=700, worker=True)
    assert len(drain(worker)) == 3301
    writer.hold(lambda: writer.next_sequence)
    for i in range(2000):
        write(writer, [(1, i, b"", bytes(60))])
        worker.poll()
    assert at_most(writer, 3)
    worker.close()
    writer.close(unlink=True)


def test_half_a_transaction_is_never_delivered(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    reader = LogReader(name)
    write(writer, [(1, 1, b"", b"")])
    write(writer, [(1, 2, b"", b""), (1, 3, b"", b"")])
    assert reader._segment is not None
    tail = writer._words[TAIL]
    writer._words[TAIL] = tail - 64  # as if the hint had moved between the two records
    assert [record.subject for record in reader.poll()] == [1]
    writer._words[TAIL] = tail
    assert [record.subject for record in reader.poll()] == [2, 3]
    reader.close()
    writer.close(unlink=True)


@pytest.mark.parametrize("byte", [4096, 4096 + 30, 4096 + 61, 4096 + 64])
def test_a_flipped_bit_is_found(name: str, byte: int) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    write(writer, [(1, 1, b"abc", b"payload")])
    writer._buffer[byte] ^= 4
    reader = LogReader(name)
    with pytest.raises(LogCorrupt) as corrupt:
        reader.poll()
    assert corrupt.value.offset == 4096 and name in corrupt.value.segment
    reader.close()
    writer.close(unlink=True)


def test_objects_are_private_and_gone_after_a_clean_stop(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1)
    reader = LogReader(name, worker=True)
    for entry in objects_of(name):
        assert stat.S_IMODE((SHM / entry.file).stat().st_mode) == 0o600
    reader.close()
    writer.close(unlink=True)
    assert not objects_of(name)


def test_one_writer(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1)
    with pytest.raises(LedgerExists, match=f"written by process {os.getpid()}"):
        LogWriter.create(name, schema_hash=1)
    writer.close(unlink=True)
    with pytest.raises(LedgerNotFound):
        LogReader(name)


@pytest.mark.parametrize("bad", ["", "a/b", "../x", "a b", "x" * 65, "a\n"])
def test_bad_names(bad: str) -> None:
    with pytest.raises(InvalidName):
        LogWriter.create(bad, schema_hash=1)


def test_limits(name: str) -> None:
    with pytest.raises(LedgerError, match="multiple of 4096"):
        LogWriter.create(name, schema_hash=1, segment_bytes=1000)
    assert not objects_of(name)
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    with pytest.raises(TransactionTooLarge):
        write(writer, [(1, 1, b"", bytes(writer.max_transaction_bytes))])
    assert writer.next_sequence == 1
    write(writer, [(1, 1, b"", bytes(writer.max_transaction_bytes - 128))])
    writer.close(unlink=True)


def test_what_is_staged_is_not_seen_and_is_overwritten(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    reader = LogReader(name)
    write(writer, [(1, 1, b"a" * 24, b"first")])
    writer.stage([(9, 9, b"z" * 24, b"never", b" published"), (9, 9, b"z" * 24, b"", b"x" * 500)])
    assert [record.subject for record in drain(reader)] == [1] and writer.next_sequence == 2
    writer.stage([(2, 2, b"b" * 24, b"head ", b"and tail")])
    writer.publish()
    (record,) = drain(reader)
    assert (record.sequence, record.subject, record.payload) == (2, 2, b"head and tail")
    reader.close()
    writer.close(unlink=True)


def test_a_record_that_is_only_begun_does_not_make_readers_ask_the_kernel_each_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spinning reader nearly always sees the next record before it is published; asking takes 10 µs."""
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL)
    reader = LogReader(name)
    asked: list[bool] = []
    real = reader._control.writer_alive

    def writer_alive() -> bool:
        asked.append(real())
        return asked[-1]

    monkeypatch.setattr(reader._control, "writer_alive", writer_alive)
    writer.stage([(1, 1, b"a" * 24, b"", b"")])
    assert not any(reader.poll() for _ in range(1000)) and 1 <= len(asked) < 100
    writer.publish()
    assert [record.subject for record in reader.poll()] == [1]
    reader.close()
    writer.close(unlink=True)


def test_full_shared_memory_is_an_error_that_leaves_nothing(name: str) -> None:
    free = os.statvfs(SHM)
    too_much = (free.f_bavail * free.f_frsize // 4096 + (1 << 18)) * 4096  # others may free some meanwhile
    with pytest.raises(SharedMemoryFull, match="free"):
        memory.create(f"/{name}.huge", too_much)
    with pytest.raises(SharedMemoryFull):
        LogWriter.create(name, schema_hash=1, segment_bytes=too_much)
    assert not objects_of(name)


def test_more_than_the_memory_behind_a_larger_shm_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tmpfs may be larger than the machine's memory: reserving that much gets the process killed."""
    there = memory.available_memory()
    assert there > 1 << 20
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=there * 4, f_frsize=1))
    with pytest.raises(SharedMemoryFull, match=r"of memory are free.*machine or container"):
        memory.create(f"/{name}.huge", there * 2)
    assert not objects_of(name)


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = memory.available_memory()
    for file, text in (
        ("memory.max", "max\n"),
        ("memory.current", "9000\n"),
        ("memory.stat", "anon 1\ninactive_file 500\n"),
    ):
        (tmp_path / file).write_text(text)
    assert abs(memory.available_memory() - machine) < machine // 2
    (tmp_path / "memory.max").write_text("10000\n")
    assert memory.available_memory() == 1500
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.available_memory() == 0


def test_no_room_for_the_next_segment_refuses_until_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=None)
    reader = LogReader(name)

    def fill(count: int) -> None:
        for i in range(count):
            write(writer, [(1, i, b"", b"")])

    def full(*arguments: object) -> object:
        raise SharedMemoryFull("full")

    real = segment.create
    fill(900)
    monkeypatch.setattr(segment, "create", full)
    fill(900)  # takes the segment that was prepared before, and fills part of it
    with pytest.raises(SharedMemoryFull):
        fill(1000)
    refused_at = writer.next_sequence
    assert writer.refused_segments
    monkeypatch.setattr(segment, "create", real)
    fill(1000)  # every call tries again
    assert not writer.refused_segments
    assert [record.sequence for record in drain(reader)] == list(range(1, refused_at + 1000))
    reader.close()
    writer.close(unlink=True)


def test_too_many_readers_and_dead_lines_are_reused(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1)
    control, killed = Control.open(name), Control.open(name)
    lines = [control.claim("x", mask=0, worker=False, cursor=1) for _ in range(5)]
    lines.append(killed.claim("y", mask=0, worker=True, cursor=1))
    lines += [control.claim("x", mask=0, worker=False, cursor=1) for _ in range(READERS - 6)]
    assert lines == list(range(READERS))
    with pytest.raises(LedgerError, match="128 readers"):
        control.claim("x", mask=0, worker=False, cursor=1)
    assert all(line.alive for line in control.readers())
    killed.close()  # what is left of one that was killed: a line that says who it was, and no lock
    assert [line.line for line in control.readers() if not line.alive] == [5]
    assert control.claim("z", mask=0, worker=False, cursor=1) == 5
    control.give_back(7)
    other = Control.open(name)
    assert other.claim("z", mask=0, worker=False, cursor=1) == 7
    other.close()
    control.close()
    writer.close(unlink=True)


def test_a_parked_worker_is_woken_for_its_kinds_only(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1)
    worker = LogReader(name, worker=True, kind_mask=1 << 7)
    writer.listen()
    got: list[list[Record]] = []
    thread = threading.Thread(target=lambda: got.append(worker.wait(PATIENCE_S)))
    thread.start()
    parked = Control.line(0) + 3
    wait_until("the worker is parked", lambda: writer._control.words[parked])
    write(writer, [(3, 1, b"", b"")])
    thread.join(0.2)
    assert thread.is_alive(), "woken for a kind that it does not want"
    write(writer, [(7, 2, b"", b"")])
    thread.join(PATIENCE_S)
    assert not thread.is_alive() and [record.subject for record in got[0]] == [1, 2]
    worker.close()
    writer.close(unlink=True)


def test_the_next_worker_on_a_line_is_woken_too(name: str) -> None:
    """Found by killing workers: the writer went on ringing the dead worker's doorbell."""
    writer = LogWriter.create(name, schema_hash=1)
    for number in range(2):
        worker = LogReader(name, from_sequence=writer.next_sequence, worker=True, kind_mask=1 << 7)
        writer.listen()
        got: list[list[Record]] = []
        thread = threading.Thread(target=lambda worker=worker, got=got: got.append(worker.wait(PATIENCE_S)))
        thread.start()
        wait_until("the worker is parked", lambda: writer._control.words[Control.line(0) + 3])
        write(writer, [(7, number, b"", b"")])
        thread.join(PATIENCE_S)
        assert not thread.is_alive() and [record.subject for record in got[0]] == [number]
        worker.close()
    writer.close(unlink=True)


_WRITER = """
import sys
from ipc import LogWriter
writer = LogWriter.create(sys.argv[1], schema_hash=1, segment_bytes=64 << 10, retain_bytes=None)
print("ready", flush=True)
i = 0
while True:
    payload = (i % 1000).to_bytes(2, "little") * (i % 200)
    entries = [(1, i, b"", payload)] * (i % 3 + 1)
    writer.append(entries)
    i += 1
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.03, 0.07])
def test_sigkill_in_mid_append_leaves_whole_transactions(name: str, delay: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WRITER, name], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    reader = LogReader(name)
    live = reader.poll()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    records = live + drain(reader)
    assert not reader.writer_alive()
    counts: dict[int, int] = {}
    for record in records:
        assert record.payload == (record.subject % 1000).to_bytes(2, "little") * (record.subject % 200)
        counts[record.subject] = counts.get(record.subject, 0) + 1
    assert all(count == subject % 3 + 1 for subject, count in counts.items())
    reader.close()


@given(TRANSACTIONS, st.data())
def test_kvlog_files(tmp_path: Path, transactions: list[list[Entry]], data: st.DataObject) -> None:
    path = tmp_path / f"{len(os.listdir(tmp_path))}.kvlog"
    records: list[Record] = []
    for entries in transactions:
        for i, (kind, subject, args, payload) in enumerate(entries):
            flags = (1 if i == 0 else 0) | (2 if i == len(entries) - 1 else 0)
            records.append(Record(len(records) + 1, 5, kind, flags, 0, subject, args.ljust(24, b"\0"), payload))
    with KvlogWriter(path, schema_hash=9) as writer:
        writer.write(records)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    reader = KvlogReader(path)
    assert drain(reader) == records and reader.damage is None and reader.schema_hash == 9 and reader.ended
    reader.close()
    with pytest.raises(LedgerError, match="exists"):
        KvlogWriter(path, schema_hash=9)
    whole = path.read_bytes()
    for cut in (64, len(whole) - 32, data.draw(st.integers(64, len(whole) - 1))):
        path.write_bytes(whole[:cut])
        reader = KvlogReader(path)
        found = drain(reader)
        assert found == records[: len(found)] and (not found or found[-1].flags & 2)
        assert not reader.ended and (reader.damage is not None) == (cut not in (64, len(whole) - 32))
        reader.close()
        flipped = bytearray(whole)
        flipped[data.draw(st.integers(64, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(flipped)
        reader = KvlogReader(path)
        found = drain(reader)
        assert found == records[: len(found)] and reader.damage is not None
        reader.close()
    path.write_bytes(b"x" * 100)
    with pytest.raises(LogCorrupt):
        KvlogReader(path)


def test_a_kvlog_file_is_read_from_any_place_it_named(tmp_path: Path) -> None:
    records = [Record(i + 500, 5, 1, 3, 0, i, bytes(24), bytes(i % 977)) for i in range(3000)]
    with KvlogWriter(tmp_path / "x.kvlog", schema_hash=9, base_sequence=500, snapshot=b"state") as writer:
        writer.write(records)
        assert writer.next_sequence == 3500
    reader = KvlogReader(tmp_path / "x.kvlog")
    assert (reader.base_sequence, reader.snapshot) == (500, b"state")
    places = [reader.place]
    while reader.poll(1):
        places.append(reader.place)
    assert len(places) > 4 and reader.damage is None
    for place in places:
        reader.go_to(place)
        assert drain(reader) == records[place.sequence - 500 :]
    reader.close()
    middle = KvlogReader(tmp_path / "x.kvlog", from_sequence=2000)
    assert drain(middle) == records[1500:]
    middle.close()


def test_a_kvlog_file_with_a_chunk_cut_out_ends_there(tmp_path: Path) -> None:
    """Every chunk that is left is intact in itself."""
    path = tmp_path / "x.kvlog"
    records = [Record(i + 1, 5, 1, 3, 0, i, bytes(24), bytes(i % 977)) for i in range(3000)]
    with KvlogWriter(path, schema_hash=9) as writer:
        writer.write(records)
    reader = KvlogReader(path)
    places = [reader.place]
    while reader.poll(1):
        places.append(reader.place)
    reader.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: places[1].offset] + whole[places[2].offset :])
    reader = KvlogReader(path)
    assert drain(reader) == records[: places[1].sequence - 1]
    assert reader.damage is not None and reader.damage.offset == places[1].offset
    reader.close()


def test_signals(name: str) -> None:
    ours = Signals(f"/{name}.signals", create=True)
    theirs = Signals(f"/{name}.signals")
    theirs.text = "why not: ü" * 1000
    theirs.words[0] = 2
    assert ours.words[0] == 2 and ours.text.startswith("why not: ü")
    theirs.close()
    ours.close(remove=True)


def test_a_sealed_segment_says_which_one_follows(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=SMALL, retain_bytes=None)
    reader = LogReader(name)
    for i in range(1000):
        write(writer, [(1, i, b"", b"")])
    assert reader._segment is not None and reader._segment.words[NEXT] == 1
    assert len(drain(reader)) == 1000
    reader.close()
    writer.close(unlink=True)
