"""A redacted recording replays like the original, and nothing of the prompts is in it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import KvlogReader, KvlogWriter, LedgerError, Record
from kvledger import CacheConfig, CacheManager, CommandRejected, HostPolicy, Item, Tier, namespace_key
from kvledger.recordings.redaction import KEY_BYTES, Pseudonyms, read_key, redact
from statemachine.errors import Diverged, InvariantViolation
from statemachine.events import BlocksCached, DigestTaken, RequestMatched
from statemachine.records import codec
from statemachine.records.replay import Replay, event_of
from statemachine.records.snapshot import restore, snapshot
from statemachine.records.upcast import EARLIER, digests_comparable, upcaster
from statemachine.state.nodes import Node
from statemachine.state.state import State
from tests.waiting import PATIENCE_S
from workers.followers.recorder import Recorder

KEY = bytes(range(KEY_BYTES))


def numbers(tokens: list[int], block_size: int) -> np.ndarray:
    """One block per token, of words that are found again: large, and different from block to block."""
    return np.array([10**8 + 1000 * token + i for token in tokens for i in range(block_size)], np.int32)


def record(path: Path, steps: list[tuple[Any, ...]], block_size: int, rotate: bool = False) -> list[Path]:
    """A recording of a busy ledger with tenants, images and a host tier."""
    config = CacheConfig(
        block_size=block_size, device_blocks=14, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE, segment_bytes=1 << 16
    )
    with CacheManager.create(f"redact-{os.getpid()}", config) as manager:
        recorder = Recorder(manager.name, path, rotate_bytes=1 if rotate else None)
        for number, (kind, tokens, salt, final) in enumerate(steps):
            key = f"request of Jane Doe {number}"
            try:
                items = [Item(b"a hash of 16 bytes", 0, 1)] if kind == "image" else []
                blocks = len(tokens) + 2
                space = namespace_key(salt=salt)
                manager.admit(key, numbers(tokens, block_size), items=items, namespace=space, blocks=blocks)
                if kind == "waiting":
                    continue  # what it brought along is in no run yet
                generated = numbers([77], block_size)[: block_size - (kind == "open")]
                manager.cache(key, generated=generated if kind in ("generate", "open") else None)
                if kind == "clear":
                    manager.clear(force=True)
                if kind != "open":
                    manager.release(key, final=final)
            except CommandRejected:
                pass
            if number % 5 == 4:
                manager.take_digest()
                if rotate:
                    recorder.step()
                    recorder._written_at = 0.0
                    recorder.step()
                for live in list(manager.state.numbers):
                    manager.release(live)
        manager.take_digest()
        while recorder.step():
            pass
        recorder.close()
        return recorder.files


def shape(state: State) -> Any:
    """Everything in a state but words, names and namespaces."""

    def of(node: Node | None) -> Any:
        return node and (
            *(node.id, node.start, node.size, node.pins, len(node.words), node.parent and node.parent.id),
            *(sorted(child.id for child in node.children.values()), node.transfer and node.transfer.id),
            *((list(copy.ids), copy.ready) if copy is not None else None for copy in node.copies),
            *((list(copy.ids), copy.ready) if copy is not None else None for copy in node.copies),
            *((list(copy.ids), copy.ready) if copy is not None else None for copy in node.copies),
            *((list(copy.ids), copy.ready) if copy is not None else None for copy in node.copies),
            *((list(copy.ids), copy.ready) if copy is not None else None for copy in node.copies),
        )

    requests = [
        (
            r.number,
            r.leaf.id,
            list(r.table),
            len(r.words),
            r.duplicate_ranges,
            r.waits_for,
            bool(r.namespace),
            bool(r.request_id),
        )
        for r in state.requests.values()
    ]
    orders = [[node.id for node in order] for order in (state.device.final, state.device.lru, state.host.lru)]
    pools = [list(state.device.pool.free), list(state.host.pool.free), state.device.pool.capacity]
    transfers = [(t.id, list(t.sources), list(t.targets), list(t.waiters)) for t in state.transfers.values()]
    nodes = [of(state.nodes[id]) for id in sorted(state.nodes)]
    return nodes, requests, orders, pools, transfers, state.counters.as_dict(), len(state.roots), len(state.retired)


def read(path: Path) -> tuple[bytes, list[Record]]:
    reader = KvlogReader(path)
    records = []
    while more := reader.poll():
        records += more
    assert reader.damage is None
    reader.close()
    return reader.snapshot, records


def replay_both(one: Path, other: Path) -> int:
    """Both files event by event: equal in everything but words and names. Returns the digests compared."""
    (first, records), (second, redacted) = read(one), read(other)
    assert len(records) == len(redacted) and bool(first) == bool(second)
    left, right = (Replay(restore(data) if data else None, check_every=1) for data in (first, second))
    for a, b in zip(records, redacted):
        assert a[:6] == b[:6]  # sequence, time, kind, flags, step, subject
        left.feed([a])
        right.feed([b])
        assert shape(left.state) == shape(right.state), a.sequence
    assert left.digests == right.digests
    assert right.digests or not any(isinstance(event_of(record), DigestTaken) for record in records)
    return right.digests


def everything_in(path: Path) -> bytes:
    """The whole content of a file: raw, and every chunk unpacked."""
    data = path.read_bytes()
    frames = data.split(b"\x28\xb5\x2f\xfd")[1:]
    unpacked = []
    for frame in frames:
        try:
            unpacked.append(zstandard.ZstdDecompressor().decompressobj().decompress(b"\x28\xb5\x2f\xfd" + frame))
        except zstandard.ZstdError:
            continue
    assert unpacked
    return data + b"".join(unpacked)


def secrets_of(path: Path) -> set[bytes]:
    """Every block of words, name and namespace in a recording; for long blocks, every two neighbouring words."""
    found: set[bytes] = set()
    begin, records = read(path)
    states = [restore(begin)] if begin else []
    words = [node.words for state in states for node in state.nodes.values()]
    words += [request.words for state in states for request in state.requests.values()]
    names = [request.request_id for state in states for request in state.requests.values()]
    for event in map(event_of, records):
        if isinstance(event, RequestMatched | BlocksCached):
            words.append(event.words)
        if isinstance(event, RequestMatched):
            names.append(event.key)
            found |= {event.namespace} if event.namespace else set()
    for piece in words:
        found |= {piece[start : start + 8] for start in range(0, len(piece) - 4, 4)}
    return found | {name.encode() for name in names} | {b"Jane Doe", b"tenant"}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["plain", "plain", "generate", "open", "waiting", "image", "clear"]),
        st.lists(st.integers(0, 3), min_size=1, max_size=6),
        st.sampled_from(["", "", "tenant one", "tenant two"]),
        st.booleans(),
    ),
    min_size=3,
    max_size=25,
)


@given(STEPS, st.sampled_from([1, 3, 4, 16]))
@settings(max_examples=60)
def test_structure_stays_and_no_word_does(tmp_path: Path, steps: list[tuple[Any, ...]], block_size: int) -> None:
    number = len(os.listdir(tmp_path))
    source, target = tmp_path / f"{number}.kvlog", tmp_path / f"{number}-redacted.kvlog"
    record(source, steps, block_size)
    done = redact(source, target, KEY)
    assert not done.damage and not done.broken and stat.S_IMODE(target.stat().st_mode) == 0o600
    assert replay_both(source, target) >= 1
    content = everything_in(target)
    assert not [secret for secret in secrets_of(source) if len(secret) >= 8 and secret in content]
    assert any(secret in everything_in(source) for secret in secrets_of(source)), "the search finds nothing at all"


STORY = [
    (kind, tokens, salt, number % 3 == 0)
    for number, (kind, tokens, salt) in enumerate(
        [("plain", [1, 2, 3, 4], ""), ("open", [1, 2, 3], "tenant one"), ("waiting", [1, 2, 5, 6], ""),
         ("image", [1, 2], "tenant two"), ("generate", [9, 8, 7], "")] * 8
    )
]  # fmt: skip


def test_a_file_that_begins_with_a_snapshot(tmp_path: Path) -> None:
    files = record(tmp_path / "x.kvlog", STORY, 4, rotate=True)
    assert len(files) > 4
    for source in files:
        target = source.with_name("redacted-" + source.name)
        done = redact(source, target, KEY)
        assert not done.broken
        replay_both(source, target)
        content = everything_in(target)
        assert not [secret for secret in secrets_of(source) if secret in content]
    assert read(files[2])[0]


def test_equal_prompts_stay_equal_with_the_same_key_and_only_then(tmp_path: Path) -> None:
    (source,) = record(tmp_path / "x.kvlog", STORY, 4)
    key = read_key(tmp_path / "key")
    assert key == read_key(tmp_path / "key") and stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    for name, used in (("a", key), ("b", key), ("c", KEY)):
        redact(source, tmp_path / f"{name}.kvlog", used)
    a, b, c = (read(tmp_path / f"{name}.kvlog")[1] for name in "abc")
    assert a == b and a != c
    names = Pseudonyms(KEY, 16)
    root = names.root(b"")
    chain, first = names.follow(root, b"x" * 32)
    assert names.follow(root, b"x" * 16)[1] == first[:16] != first[16:]  # the same block looks different further down
    assert names.follow(names.root(b"other"), b"x" * 32)[1] != first
    assert names.follow(names.follow(root, b"x" * 16)[0], b"x" * 16) == (chain, first[16:])
    signed = names.follow(root, np.array([-5, 5, -1, 0], "<i4").tobytes())[1]
    assert list(np.frombuffer(signed, "<i4") < 0) == [True, False, True, False]


def test_short_blocks_never_collide() -> None:
    names = Pseudonyms(KEY, 4)
    seen = {names.follow(b"", number.to_bytes(4, "little"))[1] for number in range(100_000)}
    assert len(seen) == 100_000


def rewrite(source: Path, target: Path, change: Any) -> None:
    _, records = read(source)
    with KvlogWriter(target, schema_hash=codec.SCHEMA_HASH) as writer:
        writer.write([change(record) for record in records])


def test_a_broken_recording_stays_broken_at_the_same_event(tmp_path: Path) -> None:
    """It is the broken ones that are handed on."""
    (source,) = record(tmp_path / "x.kvlog", STORY, 4)
    _, records = read(source)
    at = next(r.sequence for r in records[60:] if isinstance(event_of(r), RequestMatched))
    rewrite(source, tmp_path / "broken.kvlog", lambda r: r._replace(subject=r.subject + 1) if r.sequence == at else r)
    done = redact(tmp_path / "broken.kvlog", tmp_path / "out.kvlog", KEY)
    assert "is not the next new one" in done.broken
    replay = Replay()
    with pytest.raises(InvariantViolation, match="is not the next new one"):
        replay.feed(read(tmp_path / "out.kvlog")[1])
    assert replay.events == at - 1
    content = everything_in(tmp_path / "out.kvlog")
    assert not [secret for secret in secrets_of(source) if secret in content]


def test_a_digest_that_differs_still_differs(tmp_path: Path) -> None:
    (source,) = record(tmp_path / "x.kvlog", STORY, 4)
    at = next(r.sequence for r in read(source)[1] if isinstance(event_of(r), DigestTaken))
    wrong = lambda r: r._replace(payload=bytes(16)) if r.sequence == at else r  # noqa: E731
    rewrite(source, tmp_path / "wrong.kvlog", wrong)
    redact(tmp_path / "wrong.kvlog", tmp_path / "out.kvlog", KEY)
    with pytest.raises(Diverged, match=f"event {at}:"):
        Replay().feed(read(tmp_path / "out.kvlog")[1])


@pytest.mark.parametrize("table", EARLIER, ids="{:016x}".format)
def test_a_recording_of_an_earlier_event_table_becomes_one_of_todays(tmp_path: Path, table: int) -> None:
    for source in (Path(__file__).parents[1] / "data" / f"{table:016x}").glob("*.kvlog"):
        done = redact(source, tmp_path / source.name, KEY)
        assert not done.damage and not done.broken
        upcast = upcaster(table)
        old, new = read(source)[1], read(tmp_path / source.name)[1]
        left, right = Replay(compare=digests_comparable(table)), Replay()
        for a, b in zip(old, new, strict=True):
            assert a[:6] == b[:6]
            left.feed(upcast([a]))
            right.feed([b])
            assert shape(left.state) == shape(right.state), a.sequence
        assert right.digests > 3
        pairs = [(event_of(upcast([a])[0]), event_of(b)) for a, b in zip(old, new)]
        words = [
            (one.words, other.words)
            for one, other in pairs
            if isinstance(one, RequestMatched | BlocksCached) and isinstance(other, type(one)) and one.words
        ]
        assert len(words) > 3 and all(len(one) == len(other) and one != other for one, other in words)


def test_a_recording_of_an_unknown_event_table_is_refused(tmp_path: Path) -> None:
    KvlogWriter(tmp_path / "x.kvlog", schema_hash=7).close()
    with pytest.raises(LedgerError, match=r"event table 0000000000000007 is not known .* or a newer one"):
        redact(tmp_path / "x.kvlog", tmp_path / "y.kvlog", KEY)
    assert not (tmp_path / "y.kvlog").exists()


def test_a_cut_off_recording_is_redacted_as_far_as_it_goes(tmp_path: Path) -> None:
    (source,) = record(tmp_path / "x.kvlog", STORY, 4)
    _, records = read(source)
    half = tmp_path / "half.kvlog"
    with KvlogWriter(half, schema_hash=codec.SCHEMA_HASH) as writer:
        for record_ in records:
            writer.write([record_._replace(flags=3)])
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    done = redact(half, tmp_path / "out.kvlog", KEY)
    assert done.damage and 0 < done.events < len(records)
    assert len(read(tmp_path / "out.kvlog")[1]) == done.events


def test_wrong_input_leaves_nothing(tmp_path: Path) -> None:
    (source,) = record(tmp_path / "x.kvlog", STORY[:5], 4)
    (tmp_path / "text").write_text("hello")
    for bad_source, target in (
        (tmp_path / "text", "a"),
        (tmp_path / "absent", "b"),
        (source, "no/c"),
        (source, "text"),
    ):
        with pytest.raises(LedgerError):
            redact(bad_source, tmp_path / target, KEY)
    with KvlogWriter(tmp_path / "strange.kvlog", schema_hash=codec.SCHEMA_HASH) as writer:
        writer.write([Record(1, 0, 63, 3, 0, 0, bytes(24), b"")])
    with pytest.raises(LedgerError, match="event 1"):
        redact(tmp_path / "strange.kvlog", tmp_path / "d", KEY)
    with KvlogWriter(
        tmp_path / "snap.kvlog", schema_hash=codec.SCHEMA_HASH, base_sequence=5, snapshot=b"junk"
    ) as writer:
        pass
    with pytest.raises(LedgerError, match="snapshot"):
        redact(tmp_path / "snap.kvlog", tmp_path / "e", KEY)
    for bad_key in (tmp_path / "text", tmp_path, tmp_path / "no" / "key"):
        with pytest.raises(LedgerError, match="key"):
            read_key(bad_key)
    assert sorted(os.listdir(tmp_path)) == ["snap.kvlog", "strange.kvlog", "text", "x.kvlog"]


def test_the_command(tmp_path: Path) -> None:
    (source,) = record(tmp_path / "x.kvlog", STORY[:5], 4)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "kvledger.cli", "redact", str(source), *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE_S)

    done = command(str(tmp_path / "y.kvlog"), "--key-file", str(tmp_path / "key"))
    assert done.returncode == 0 and "events in" in done.stdout, done.stderr
    replay_both(source, tmp_path / "y.kvlog")
    done = command(str(tmp_path / "y.kvlog"))
    assert done.returncode == 2 and "exists" in done.stderr and "Traceback" not in done.stderr


def test_a_resized_and_cleared_state_is_redacted(tmp_path: Path) -> None:
    """Snapshots with retired trees and namespaces of their own."""
    with CacheManager.create(f"redact-{os.getpid()}", CacheConfig(block_size=4, device_blocks=30)) as manager:
        for number in range(3):
            space = namespace_key(salt=f"tenant {number % 2}")
            manager.admit(f"a{number}", numbers([1, 2, 3 + number], 4), namespace=space)
            manager.cache(f"a{number}")
        manager.clear(force=True)
        manager.admit("b", numbers([1, 2], 4), namespace=namespace_key(salt="tenant 0"))
        manager.cache("b")
        manager.resize(Tier.DEVICE, 20)
        data = snapshot(manager.state)
        begin = manager.next_sequence
    KvlogWriter(tmp_path / "x.kvlog", schema_hash=codec.SCHEMA_HASH, base_sequence=begin, snapshot=data).close()
    redact(tmp_path / "x.kvlog", tmp_path / "y.kvlog", KEY)
    assert len(restore(data).retired) == 2
    replay_both_snapshots(tmp_path / "x.kvlog", tmp_path / "y.kvlog")


def replay_both_snapshots(one: Path, other: Path) -> None:
    first, second = restore(read(one)[0]), restore(read(other)[0])
    assert shape(first) == shape(second)
    plain, hidden = ({root.words for root in state.all_roots()} - {b""} for state in (first, second))
    assert len(plain) == len(hidden) == 2 and not plain & hidden
