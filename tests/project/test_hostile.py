"""Hostile input: every public call and every decoder gets what it should never get.

A call is refused with a typed error and changes nothing; bytes are refused with a typed error, or are what they claim.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import (
    Control,
    InvalidName,
    KvlogReader,
    KvlogWriter,
    LedgerError,
    LogReader,
    LogWriter,
    Record,
    segment,
    snapshots,
)
from ipc.names import SHM
from ipc.ownership import remove_objects, segments_of
from ipc.record import Position
from ipc.segment import NEXT, TAIL
from kvledger import (
    Busy,
    CacheConfig,
    CacheManager,
    CommandRejected,
    ConfigError,
    HostPolicy,
    InvalidCommand,
    InvalidTokens,
    Item,
    OutOfBlocks,
    ReleaseReason,
    RequestNotReady,
    Tier,
    UnknownRequest,
    is_compiled,
    namespace_key,
)
from kvledger.errors import CallTooLarge
from kvledger.run import traces
from kvledger.run.traces import TraceError
from statemachine.check import check
from statemachine.errors import InvariantViolation
from statemachine.events import KINDS, LedgerOpened
from statemachine.records import codec
from statemachine.records.codec import CodecError, decode, encode
from statemachine.records.replay import Replay, event_of
from statemachine.records.snapshot import SnapshotError, restore, snapshot, state_digest
from tests.statemachine.test_codec import EVENTS
from tests.waiting import PATIENCE_S, wait_until
from workers.pools.layout import PoolLayout
from workers.processes.acknowledgements import KIND, Acknowledgement, Status

TOKENS = np.arange(16, dtype=np.int32)


class Awkward:
    """Raises whatever is done with it."""

    def __array__(self, *arguments: object, **named: object) -> Any:
        raise RuntimeError("no array")

    def __len__(self) -> int:
        raise RuntimeError("no length")


WRONG_TYPE: tuple[type[Exception], ...] = (TypeError,) if is_compiled() else ()
"""What else the compiled build may raise for an argument."""
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    2**70,
    -(2**70),
    1.5,
    float("nan"),
    float("inf"),
    1j,
    "",
    "a",
    "b",
    "w",
    "\ud800",
    "x" * 3_000,
    b"",
    b"a",
    b"\xff" * 7,
    bytearray(b"abcd"),
    memoryview(b"abcdefgh"),
    [],
    [0],
    [1, 2, 3, 4, 5],
    [-1],
    [2**31],
    [1.0],
    ["a"],
    [[1], [2, 3]],
    [None],
    (),
    {},
    {"a": 1},
    {"a": -1},
    {"a": 2**40},
    {"a": 1.5},
    {5: 1},
    {"a": "1"},
    set(),
    {1, 2},
    range(8),
    object(),
    Awkward(),
    len,
    int,
    np.int64(3),
    np.float32(3),
    np.array([]),
    np.arange(8, dtype=np.int64),
    np.arange(8, dtype=np.int32)[::2],
    np.arange(8, dtype=">i4"),
    np.array([-5, 1]),
    np.array(["a"]),
    np.array([1, None], object),
    np.array(7),
    np.zeros((2, 2), np.int32),
    np.arange(40, dtype=np.int32),
    [Item(b"h" * 16, 0, 2)],
    [Item(b"h" * 16, -1, 2)],
    [Item(b"h", 0, 2)],
    [Item("h" * 16, 0, 2)],  # type: ignore[arg-type]
    [Item(b"h" * 16, "0", 2)],  # type: ignore[arg-type]
    [Item(b"h" * 16, 0, 2**70)],
    [Item(b"h" * 16, 0, 2), Item(b"h" * 16, 1, 2)],
    Tier.HOST,
    Tier.DEVICE,
    HostPolicy.EXCLUSIVE,
    *ReleaseReason,
]
ANY = st.sampled_from(VALUES)
CALLS: dict[str, tuple[int, list[str]]] = {
    "match": (2, ["items", "namespace", "max_blocks"]),
    "admit": (2, ["items", "namespace", "max_blocks", "blocks"]),
    "peek": (1, ["items", "namespace", "max_blocks"]),
    "allocate": (1, []),
    "cache": (1, ["blocks", "generated", "computed"]),
    "extend": (1, []),
    "give_back": (2, []),
    "preempt": (2, []),
    "make_room": (1, []),
    "evict": (2, []),
    "forget": (1, []),
    "can_allocate": (1, []),
    "resume": (0, ["weights", "force"]),
    "trim": (2, []),
    "reassign": (3, []),
    "release": (1, ["reason", "final"]),
    "cached_blocks": (1, []),
    "ready": (1, []),
    "block_table": (1, []),
    "clear": (0, ["force"]),
    "resize": (2, []),
    "step": (1, []),
}
"""Public calls: how many positional arguments, and which named ones."""


@pytest.fixture
def name() -> Iterator[str]:
    ledger = f"hostile-{os.getpid()}"
    yield ledger
    remove_objects(ledger)


def small(**changes: Any) -> CacheConfig:
    return CacheConfig(**{"block_size": 4, "device_blocks": 24, "segment_bytes": 1 << 20, **changes})


def open_with_requests(name: str) -> CacheManager:
    """Two live requests and something cached."""
    config = small(host_blocks=8, host_policy=HostPolicy.EXCLUSIVE)
    manager = CacheManager.create(name, config)
    for key in ("a", "b"):
        manager.admit(key, TOKENS)
        manager.cache(key)
    manager.admit("w", TOKENS + 100, namespace=b"other")
    return manager


def arguments_of(call: str) -> st.SearchStrategy[tuple[str, list[Any], dict[str, Any]]]:
    count, names = CALLS[call]
    plain = st.lists(ANY, min_size=count, max_size=count)
    return st.tuples(st.just(call), plain, st.dictionaries(st.sampled_from(names), ANY) if names else st.just({}))


@given(st.lists(st.sampled_from(sorted(CALLS)).flatmap(arguments_of), min_size=1, max_size=12))
@settings(max_examples=400)
def test_any_call_with_any_arguments(calls: list[tuple[str, list[Any], dict[str, Any]]]) -> None:
    """It works, or it is refused with a typed error and nothing has changed; the log replays to the same state."""
    with open_with_requests(f"fuzz-{os.getpid()}") as manager:
        for call, plain, named in calls:
            before, sequence = manager.digest(), manager.next_sequence
            try:
                getattr(manager, call)(*plain, **named)
            except OutOfBlocks:  # recorded, unless nothing was to be allocated yet
                recorded = manager.next_sequence - sequence
                assert manager.digest() == before and recorded == (call != "preempt")
            except (CommandRejected, *WRONG_TYPE):
                assert manager.digest() == before and manager.next_sequence == sequence
            assert not check(manager.state)
        reader = LogReader(manager.name)
        replay = Replay(check_every=1)
        while records := reader.poll():
            replay.feed(records)
        reader.close()
        assert state_digest(replay.state) == manager.digest()


REFUSED: list[tuple[type[Exception], Callable[[CacheManager], object]]] = [
    (InvalidCommand, lambda m: m.admit(5, TOKENS)),
    (InvalidCommand, lambda m: m.admit(["x"], TOKENS)),
    (InvalidCommand, lambda m: m.admit("\ud800", TOKENS)),
    (CallTooLarge, lambda m: m.admit("k" * (1 << 20), TOKENS)),
    (CallTooLarge, lambda m: m.match("c", np.zeros(1 << 20, np.int32))),
    (OutOfBlocks, lambda m: m.admit("c", np.zeros(1 << 20, np.int32))),
    (InvalidTokens, lambda m: m.admit("c", None)),
    (InvalidTokens, lambda m: m.admit("c", "text")),
    (InvalidTokens, lambda m: m.admit("c", [2**31])),
    (InvalidTokens, lambda m: m.admit("c", [True, False])),
    (InvalidTokens, lambda m: m.admit("c", TOKENS, items=[5])),
    (InvalidTokens, lambda m: m.admit("c", TOKENS, items=5)),
    (InvalidCommand, lambda m: m.admit("c", TOKENS, namespace="text")),
    (InvalidCommand, lambda m: m.peek(TOKENS, namespace=bytearray())),
    (InvalidCommand, lambda m: m.admit("c", TOKENS, blocks=-1)),
    (InvalidCommand, lambda m: m.admit("c", TOKENS, blocks=2.0)),
    (InvalidCommand, lambda m: m.allocate([("a", 1)])),
    (InvalidCommand, lambda m: m.allocate({"a": 1.0})),
    (OutOfBlocks, lambda m: m.allocate({"a": 2**31})),
    (InvalidCommand, lambda m: m.allocate({"a": 2**40})),
    (UnknownRequest, lambda m: m.allocate({"a": 1, "z": 0})),
    (UnknownRequest, lambda m: m.ready("z")),
    (InvalidCommand, lambda m: m.ready({})),
    (InvalidCommand, lambda m: m.cache("a", "all")),
    (InvalidTokens, lambda m: m.cache("a", generated=[-1])),
    (InvalidCommand, lambda m: m.trim("a", None)),
    (InvalidCommand, lambda m: m.trim("a", -1)),
    (InvalidCommand, lambda m: m.reassign("a", "b", [2**40])),
    (InvalidCommand, lambda m: m.reassign("a", "b", 5)),
    (InvalidCommand, lambda m: m.reassign("a", "b", [0, 0])),
    (InvalidCommand, lambda m: m.release("a", 77)),
    (InvalidCommand, lambda m: m.release("a", final="yes")),
    (InvalidCommand, lambda m: m.wait("a", "soon")),
    (InvalidCommand, lambda m: m.clear(force=1)),
    (Busy, lambda m: m.clear()),
    (InvalidCommand, lambda m: m.resize("DISK", 5)),
    (InvalidCommand, lambda m: m.resize(Tier.DEVICE, 0)),
    (InvalidCommand, lambda m: m.resize(Tier.DEVICE, 2**40)),
    (Busy, lambda m: m.resize(Tier.DEVICE, 3)),
    (InvalidCommand, lambda m: m.step("one")),
    (InvalidCommand, lambda m: namespace_key(salt=5)),  # type: ignore[arg-type]
]


def test_wrong_calls_by_name(name: str) -> None:
    with open_with_requests(name) as manager:
        for number, (error, call) in enumerate(REFUSED):
            before = manager.digest()
            with pytest.raises((error, *WRONG_TYPE)):
                call(manager)
            assert manager.digest() == before, number
        manager.release("a")
        with pytest.raises(UnknownRequest, match="released"):
            manager.release("a")


def test_empty_and_shortest_prompts(name: str) -> None:
    with open_with_requests(name) as manager:
        for number, prompt in enumerate(([], np.empty(0, np.int32), [7], np.empty(0))):
            admission = manager.admit(f"short {number}", prompt)
            assert len(admission.block_table) == (1 if len(prompt) else 0)
            manager.cache(f"short {number}")
            manager.release(f"short {number}")


def test_a_request_in_transfer_can_be_released_and_a_match_survives_clearing(name: str) -> None:
    config = small(device_blocks=4, host_blocks=4, host_policy=HostPolicy.EXCLUSIVE, ranks=1)
    with CacheManager.create(name, config) as manager:
        manager.admit("a", TOKENS)
        manager.cache("a")
        manager.release("a")
        assert not manager.admit("b", TOKENS + 50).ready  # waits for "a" to be copied out
        with pytest.raises(RequestNotReady):
            manager.cache("b")
        manager.clear(force=True)
        manager.release("b")
        assert not check(manager.state)
        wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
        assert manager.available_blocks() == 4 and manager.peek(TOKENS, max_blocks=99) == (0, 0)


def test_more_blocks_than_one_transaction_holds_can_be_released_and_cleared(name: str) -> None:
    with CacheManager.create(name, CacheConfig(block_size=1, device_blocks=20_000, segment_bytes=64 << 10)) as manager:
        manager.admit("a", [1])
        for _ in range(6):
            manager.allocate({"a": 3000})
        manager.release("a")
        assert manager.available_blocks() == 20_000
        for number in range(100):
            manager.admit(str(number), np.arange(150, dtype=np.int32) + 200 * number)
            manager.cache(str(number))
            manager.release(str(number))
        manager.clear()
        assert not manager.state.nodes and len(manager.state.device.pool.free) == 20_000


@given(
    st.dictionaries(st.sampled_from([*CacheConfig.__dataclass_fields__]), ANY),
)
def test_any_configuration(settings: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        CacheConfig(**{"device_blocks": 8, **settings})


def test_wrong_names_and_configurations() -> None:
    for bad in (None, 5, "", "a/b", "../x", "a" * 65, "a\0"):
        with pytest.raises((InvalidName, *WRONG_TYPE)):
            CacheManager.create(bad, small())  # type: ignore[arg-type]
    with pytest.raises((ConfigError, *WRONG_TYPE)):
        CacheManager.create("x", {"device_blocks": 5})  # type: ignore[arg-type]


# Decoders


@given(st.integers(0, 300), st.integers(0, 2**64 - 1), st.binary(min_size=24, max_size=24), st.binary(max_size=200))
def test_any_record_decodes_to_an_event_or_not_at_all(kind: int, subject: int, args: bytes, payload: bytes) -> None:
    with contextlib.suppress(CodecError):
        event = decode(kind, subject, args, payload)
        assert type(event) is KINDS[kind]


@pytest.fixture(scope="module")
def history() -> tuple[list[Record], list[bytes]]:
    """Records of a busy ledger, and snapshots of it on the way."""
    ledger = f"history-{os.getpid()}"
    config = small(device_blocks=12, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE)
    states = []
    with CacheManager.create(ledger, config) as manager:
        for number in range(60):
            key = str(number)
            prompt = np.arange(24, dtype=np.int32) + 7 * (number % 5)
            manager.admit(key, prompt, namespace=b"n" * (number % 3), blocks=8)
            if number % 4 == 0:
                manager.trim(key, manager.cached_blocks(key))
            else:
                manager.cache(key, generated=[1, 2, 3, 4, 5] if number % 7 == 0 and not number % 2 else None)
            states.append(snapshot(manager.state))
            manager.release(key, final=number % 3 == 0)
            if number == 40:
                manager.clear()
                manager.resize(Tier.DEVICE, 10)
        manager.take_digest()
        reader = LogReader(ledger)
        records = reader.poll()
        reader.close()
    return records, states


@given(st.data())
@settings(max_examples=400)
def test_a_changed_event_is_refused_or_leaves_a_sound_state(
    history: tuple[list[Record], list[bytes]], data: st.DataObject
) -> None:
    """A log whose checksums are right and whose events are not: as its author could make it."""
    records, _ = history
    at = data.draw(st.integers(0, len(records) - 1))
    replay = Replay()
    replay.feed(records[:at])
    record = records[at]
    body = bytearray(record.args + record.payload)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    subject = data.draw(st.sampled_from([record.subject, 0, 1, record.subject + 1, 2**64 - 1]))
    kind = data.draw(st.sampled_from([record.kind] * 4 + [*KINDS]))
    changed = record._replace(kind=kind, subject=subject, args=bytes(body[:24]), payload=bytes(body[24:]))
    before = snapshot(replay.state) if at else b""
    try:
        replay.feed([changed])
    except (CodecError, InvariantViolation):
        if at:
            assert snapshot(replay.state) == before, "half applied"
        return
    state_digest(replay.state)
    with contextlib.suppress(CodecError, InvariantViolation):
        replay.feed(records[at + 1 :])


@given(EVENTS, st.data())
@settings(max_examples=400)
def test_any_event_is_refused_or_fits(
    history: tuple[list[Record], list[bytes]], event: Any, data: st.DataObject
) -> None:
    _, states = history
    state = restore(data.draw(st.sampled_from(states)), expect_sound=False)
    before = snapshot(state)
    kind, subject, args, payload = encode(event)
    record = Record(1, 0, kind, 3, 0, subject, args.ljust(24, b"\0"), payload)
    try:
        Replay(state).feed([record])
    except InvariantViolation:
        assert snapshot(state) == before, "half applied"


def test_pools_that_would_eat_the_memory_are_refused() -> None:
    for opened in (
        LedgerOpened(1, 2**32 - 1, 0, 0, 0, 0, "", ""),
        LedgerOpened(1, 1, 2**32 - 1, 2**32 - 1, 1, 0, "", ""),
        LedgerOpened(0, 1, 0, 0, 0, 0, "", ""),
        LedgerOpened(1, 1, 0, 0, 7, 0, "", ""),
    ):
        with pytest.raises(InvariantViolation):
            Replay().feed([_record(opened)])
    replay = Replay()
    replay.feed([_record(LedgerOpened(1, 4, 0, 0, 0, 0, "", ""))])
    with pytest.raises(InvariantViolation):
        replay.feed([_record(event_of(_record_of_kind(14, struct.pack("<BI", 0, 2**32 - 1))))])


def _record(event: Any) -> Record:
    kind, subject, args, payload = encode(event)
    return Record(1, 0, kind, 3, 0, subject, args.ljust(24, b"\0"), payload)


def _record_of_kind(kind: int, args: bytes) -> Record:
    return Record(1, 0, kind, 3, 0, 0, args.ljust(24, b"\0"), b"")


def signed(body: bytes) -> bytes:
    """A snapshot with the digest that belongs to it, as its author could make it."""
    return body + xxhash.xxh3_128_digest(body)


@given(st.data())
@settings(max_examples=500)
def test_a_changed_snapshot_is_refused_or_sound(history: tuple[list[Record], list[bytes]], data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(history[1]))[:-16])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 5))
        piece = data.draw(
            st.sampled_from([b"\0", b"\1", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f"])
        )
        body[at : at + len(piece)] = piece
    try:
        state = restore(signed(bytes(body)))
    except SnapshotError:
        return
    assert not check(state) and snapshot(state)[:-16] == bytes(body)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_snapshot(data: bytes) -> None:
    for body in (data, b"kvlstate1" + data):
        with pytest.raises(SnapshotError):
            restore(signed(body))
        with pytest.raises(SnapshotError):
            restore(body)


@given(st.binary(max_size=600), st.integers(0, 700), st.integers(0, 2**32 - 1))
def test_position_reads_any_bytes(data: bytes, stop: int, crc: int) -> None:
    position = Position(0, crc, 1)
    records, damaged = position.read(memoryview(data), stop, 1, 100)
    assert not records and (damaged == 0 or not stop)


def forge(path: Path, chunks: list[tuple[int, int, bytes]], base: int = 1, schema: int = codec.SCHEMA_HASH) -> None:
    """A .kvlog file with all its checksums right: ``(kind, claimed raw bytes, stored bytes)``."""
    header = struct.pack("<8sIIQQ", b"KVLOG\x00\x02\n", 2, 0, schema, base)
    out = (header + crc32c(header).to_bytes(4, "little")).ljust(64, b"\0")
    for kind, raw, stored in chunks:
        head = struct.pack("<IIIIQI", kind, raw, len(stored), 0, base, crc32c(stored))
        out += head + crc32c(head).to_bytes(4, "little") + stored
    path.write_bytes(out)


def test_forged_kvlog_files(tmp_path: Path) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(200 << 20))
    assert len(bomb) < 100_000
    for number, chunks in enumerate(
        [[(1, 200 << 20, bomb)], [(1, 100, b"")], [(1, 0, b"x" * 50)], [(9, 4, bomb)], [(1, 2**32 - 1, bomb[:50])]]
    ):
        path = tmp_path / f"{number}.kvlog"
        forge(path, chunks)
        reader = KvlogReader(path)
        assert reader.poll() == [] and reader.damage is not None
        reader.close()
        forge(path, [(2, *chunk[1:]) for chunk in chunks], base=7)
        with pytest.raises(LedgerError):
            KvlogReader(path)
    os.mkfifo(tmp_path / "pipe.kvlog")
    for strange in (tmp_path / "pipe.kvlog", tmp_path, Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(LedgerError, match="cannot read"):
            KvlogReader(strange)


@given(st.data())
@settings(max_examples=150)
def test_a_changed_kvlog_file_is_read_to_its_last_good_transaction(
    history: tuple[list[Record], list[bytes]], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / f"{len(os.listdir(tmp_path))}.kvlog"
    with KvlogWriter(path, schema_hash=codec.SCHEMA_HASH) as writer:
        for start in range(0, len(history[0]), 50):
            writer.write(history[0][start : start + 50])
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        reader = KvlogReader(path)
    except LedgerError:
        return
    found = reader.poll()
    assert found == history[0][: len(found)]
    reader.close()


@given(st.data())
@settings(max_examples=150)
def test_a_changed_segment_is_refused_or_read(data: st.DataObject) -> None:
    """Header, hints and records of a segment overwritten at random: a reader says what is wrong, and never hangs."""
    ledger = f"segment-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1, segment_bytes=64 << 10)
    try:
        for number in range(20):
            writer.append([(1, number, b"", bytes(40))])
        where = st.one_of(st.integers(0, 120), st.integers(256, 264), st.integers(320, 328), st.integers(4096, 6700))
        for _ in range(data.draw(st.integers(1, 4))):
            writer._buffer[data.draw(where)] = data.draw(st.integers(0, 255))
        with contextlib.suppress(LedgerError):
            reader = LogReader(ledger)
            try:
                for _ in range(3):
                    assert all(record.kind == 1 for record in reader.poll())
            finally:
                reader.close()
    finally:
        writer.close(unlink=True)


def test_a_segment_that_says_that_it_follows_itself(name: str) -> None:
    writer = LogWriter.create(name, schema_hash=1, segment_bytes=64 << 10)
    for index in (0, 2**32, 2**63):
        writer._words[NEXT] = index
        reader = LogReader(name)
        if index:
            with pytest.raises(LedgerError):
                reader.poll()
        else:
            assert reader.poll() == []
        reader.close()
    writer._words[NEXT] = 0
    writer._words[TAIL] = 2**40
    reader = LogReader(name)
    with pytest.raises(LedgerError):
        reader.poll()
    reader.close()
    writer.close(unlink=True)


@pytest.mark.parametrize("size", [1, 100, 4095, 4099, 8192])
def test_objects_of_the_wrong_size(name: str, size: int) -> None:
    """They carry no stamp of a ledger either, so none takes them for its own."""
    paths = [SHM / object_name for object_name in (f"{name}.control", f"{name}.1.0", f"{name}.snapshot.5")]
    try:
        for path in paths:
            path.write_bytes(b"\xff" * size)
            path.chmod(0o600)
        for call in (
            lambda: Control.open(name),
            lambda: segment.MappedSegment(name, 1, 0),
            lambda: snapshots.read(name, 5),
            lambda: LogReader(name),
        ):
            with pytest.raises(LedgerError):
                call()
        assert snapshots.newest(name) is None and segments_of(name) == []
        remove_objects(name)
        assert all(path.exists() for path in paths)
    finally:
        for path in paths:
            path.unlink()


@given(st.data())
@settings(max_examples=100)
def test_a_changed_control_segment(data: st.DataObject) -> None:
    ledger = f"control-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1, segment_bytes=64 << 10)
    try:
        for _ in range(data.draw(st.integers(1, 5))):
            word = data.draw(st.one_of(st.integers(0, 30), st.integers(512, 600)))
            writer._control.words[word] = data.draw(st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, os.getpid()]))
        with contextlib.suppress(LedgerError):
            reader = LogReader(ledger, worker=True)
            reader.writer_alive()
            reader._control.readers()
            reader.close()
        writer.listen()
        writer.backlogs()
    finally:
        writer.close()
        remove_objects(ledger)


FIELDS = ["timestamp", "tokens", "hash_ids", "input_length", "output_length", "images", "lora", "final", "output"]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=12,
)


@given(st.text(max_size=200), JSON)
def test_any_trace(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "trace.jsonl"
    good = '{"timestamp": 1, "tokens": [1, 2]}\n'
    for content in (text, json.dumps(value), good + json.dumps(value)):
        path.write_text(content, errors="surrogatepass")
        with contextlib.suppress(TraceError):
            traces.load(path)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"timestamp": 1e400, "tokens": [1]}',
        '{"timestamp": 1' + "0" * 400 + ', "tokens": [1]}',
        '{"timestamp": NaN, "tokens": [1]}',
        '{"timestamp": 0, "tokens": [1], "lora": "\\ud800"}',
        '{"timestamp": 0, "hash_ids": [1], "input_length": 1, "output_length": 1' + "0" * 300 + "}",
        '{"timestamp": 0, "tokens": [1], "images": [{"hash": "'
        + "00" * 16
        + '", "offset": 0, "length": 99999999999}]}',
    ],
)
def test_hostile_traces(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(TraceError, match="line 1"):
        traces.load(path)


@given(st.text(max_size=60) | st.sampled_from(["[" * 50_000, '{"ranks": 1e999}', '{"ranks": 1}', "5", "{}"]))
def test_any_layout(text: str) -> None:
    with contextlib.suppress(ValueError):
        PoolLayout.parse(text)


# A worker that writes nonsense into its own log


@given(st.integers(0, 60), st.integers(0, 2**64 - 1), st.binary(max_size=24), st.binary(max_size=60))
def test_any_acknowledgement(kind: int, subject: int, args: bytes, payload: bytes) -> None:
    with contextlib.suppress(ValueError):
        Acknowledgement.of(Record(1, 0, kind, 3, 0, subject, args.ljust(24, b"\0"), payload))


@pytest.mark.parametrize(
    "record",
    [
        (KIND + 7, 1, bytes(12), b""),
        (KIND, 1, struct.pack("<III", 0, 99, 0), b""),
        (KIND, 1, struct.pack("<III", 5, 0, 4), b""),
        (KIND, 1, struct.pack("<III", 0, 0, 2**31), b""),
        (KIND, 1, struct.pack("<III", 0, 0, 3), b""),
        (KIND, 1, struct.pack("<III", 0, 1, 4), b""),
        (KIND, 1, struct.pack("<III", 0, 1, 0), b"\xff\xfe"),
    ],
)
def test_a_worker_that_answers_nonsense_is_replaced(name: str, record: tuple[int, int, bytes, bytes]) -> None:
    """Whatever a worker writes, the engine's poll() goes on, and the transfer is done by the worker's successor."""
    config = small(device_blocks=4, host_blocks=4, host_policy=HostPolicy.EXCLUSIVE, ranks=1)
    with CacheManager.create(name, config) as manager:
        manager.admit("a", TOKENS)
        manager.cache("a")
        manager.release("a")
        assert manager._ranks is not None
        worker = manager._ranks.supervisor._workers[0]
        os.kill(worker.process.pid, 19)  # SIGSTOP: its true answer comes too late
        manager.admit("b", TOKENS + 50)
        assert [*manager.state.transfers] == [1] and worker.reader is not None
        worker.reader = _Forging(worker.reader, [_forged(record)])
        manager.wait("b", timeout=PATIENCE_S)
        assert manager.state.workers[0] == 2 and not check(manager.state)


class _Forging:
    """A reader of answers, with some of our own before the true ones."""

    def __init__(self, reader: LogReader, forged: list[Record]) -> None:
        self._reader, self._forged = reader, forged

    def poll(self) -> list[Record]:
        return [self._forged.pop()] if self._forged else self._reader.poll()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def _forged(record: tuple[int, int, bytes, bytes]) -> Record:
    kind, subject, args, payload = record
    return Record(1, 0, kind, 3, 0, subject, args.ljust(24, b"\0"), payload)


def test_a_good_acknowledgement_still_counts() -> None:
    good = Acknowledgement(3, 9, 4, Status.OK, "")
    assert Acknowledgement.of(_forged(good.record())) == good
