"""A recording without users' data: every structure is kept, no prompt, request name or namespace is.

The words of a block become words that a keyed hash of the whole prefix makes (namespace, all blocks before it, the
block itself). So equal prefixes stay equal and different ones different, which is all that the cache ever compares;
equal blocks in different places do not even look equal any more. The sign bit of a word is kept: it tells tokens from
multimodal items. Request names and namespaces become hashes with the same key. Who has the key can test guesses; nobody
else can.

What stays: sizes, block ids, times, step numbers, worker ids, and the reasons why workers or tiers were lost.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ipc import KvlogReader, KvlogWriter, LedgerError, LogCorrupt, Record
from kvledger.recordings.proportion import in_proportion
from statemachine.errors import InvariantViolation
from statemachine.events import BlocksCached, DigestScope, DigestTaken, Event, LedgerOpened, Meaning, RequestMatched
from statemachine.fields import FIELDS
from statemachine.items import NO_ITEMS, BlockItems, all_records, by_block, each, packed
from statemachine.records import codec
from statemachine.records.codec import CodecError
from statemachine.records.replay import event_of, step
from statemachine.records.snapshot import SnapshotError, counters_digest, restore, snapshot, state_digest
from statemachine.records.upcast import UnknownSchema, digests_comparable, upcaster
from statemachine.state import tree
from statemachine.state.nodes import NO_CHILDREN, Node
from statemachine.state.state import State

KEY_BYTES = 32
_SURELY_UNIQUE_BYTES = 16
_SIGN = np.uint32(1 << 31)
_CHAIN_BYTES = 16


class Redacted(NamedTuple):
    """What a redaction has written, and where it had to stop."""

    events: int
    damage: str
    """Why the recording ends early; empty if it does not."""
    broken: str
    """The first event that does not fit its state; events from there on are redacted one by one. Empty: all fit."""


def read_key(path: Path) -> bytes:
    """The key in a file; made at random, mode 0600, where there is no such file.

    Raises:
        LedgerError: it cannot be read or written, or holds no key.
    """
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            key = path.read_bytes() if path.is_file() else b""
        else:
            key = secrets.token_bytes(KEY_BYTES)
            with os.fdopen(handle, "wb") as file:
                file.write(key)
    except OSError as error:
        raise LedgerError(f"key file {path}: {error.strerror}") from error
    if len(key) != KEY_BYTES:
        raise LedgerError(
            f"{path} is no key: it must hold {KEY_BYTES} random bytes; name a file that does not exist yet"
        )
    return key


class Pseudonyms:
    """The keyed hashes. Equal input gives equal output, for this key."""

    def __init__(self, key: bytes, block_bytes: int) -> None:
        self._key = key
        self._block_bytes = block_bytes
        self.block_size = block_bytes // 4
        self._given: dict[tuple[bytes, bytes], bytes] = {}
        """Short blocks could collide below one parent: by chain and pseudonym, whose it is."""

    def _hash(self, use: bytes, data: bytes) -> bytes:
        return hmac.digest(self._key, use + data, hashlib.sha256)[:_CHAIN_BYTES]

    def name(self, key: str) -> str:
        """The pseudonym of a request's name."""
        return self._hash(b"request", key.encode()).hex() if key else ""

    def namespace(self, namespace: bytes) -> bytes:
        """The pseudonym of a namespace; the empty one stays empty."""
        return self._hash(b"namespace", namespace) if namespace else b""

    def root(self, namespace: bytes) -> bytes:
        """Where the chain of a namespace's blocks begins."""
        return self._hash(b"root", namespace)

    def items(self, items: BlockItems) -> BlockItems:
        """For images and sounds: where they stand and how long they are stays."""
        return {
            block: b"".join(
                packed(offset, length, hmac.digest(self._key, b"item" + digest, hashlib.sha256))
                for offset, length, digest in each(records)
            )
            for block, records in items.items()
        } or NO_ITEMS

    def follow(self, chain: bytes, words: bytes, items: BlockItems = NO_ITEMS, first: int = 0) -> tuple[bytes, bytes]:
        """The chain after these blocks, and what is written instead of them; ``first``: position of the first one."""
        out = []
        size = self._block_bytes
        for position, start in enumerate(range(0, len(words), size), first):
            block = words[start : start + size]
            below = self._hash(b"block", chain + block + items.get(position, b""))
            out.append(self._block(chain, below, block))
            chain = below
        return chain, b"".join(out)

    def _block(self, above: bytes, chain: bytes, block: bytes) -> bytes:
        count = len(block) // 4
        signs = np.frombuffer(block, "<u4", count) & _SIGN
        attempt = 0
        while True:
            noise = hashlib.shake_256(self._key + chain + attempt.to_bytes(4, "little")).digest(len(block))
            words = (np.frombuffer(noise, "<u4", count) & ~_SIGN | signs).astype("<u4").tobytes() + noise[4 * count :]
            if len(block) >= _SURELY_UNIQUE_BYTES or self._given.setdefault((above, words), chain) == chain:
                return words
            attempt += 1


class Redactor:
    """Turns events into redacted ones, with the state of both sides at hand.

    Args:
        comparable: whether the digests in the recording mean what they mean today. If not, nobody can say whether they
            agree; those of the redacted events do.
    """

    def __init__(self, key: bytes, *, comparable: bool = True) -> None:
        self._key = key
        self._comparable = comparable
        self.original: State | None = None
        self.redacted: State | None = None
        self.broken = ""
        self._names: Pseudonyms | None = None

    def begin(self, data: bytes) -> bytes:
        """The redacted form of the snapshot that a recording begins with.

        Raises:
            SnapshotError
        """
        self.original, self.redacted = (restore(data, expect_sound=False) for _ in range(2))
        self._names = Pseudonyms(self._key, self.original.block_bytes)
        _redact_state(self.redacted, self._names)
        return snapshot(self.redacted)

    def event(self, sequence: int, event: Event) -> Event:
        """The redacted event, which has this number; both states are brought up to date."""
        if self.original is None or self.redacted is None:
            self.original, self.redacted = step(None, event), step(None, event)
            assert isinstance(event, LedgerOpened)
            self._names = Pseudonyms(self._key, self.original.block_bytes)
            return event
        if self.broken:
            return self._rewritten(event, None)
        try:
            changed = self._rewritten(event, self.original)
            step(self.original, event)
        except InvariantViolation as error:
            self.broken = f"event {sequence}: {str(error).splitlines()[0]}"
            return self._rewritten(event, None)
        step(self.redacted, changed)
        if isinstance(event, DigestTaken):
            take = state_digest if event.scope == DigestScope.STATE else counters_digest
            digest = take(self.redacted)
            if self._comparable and event.digest != take(self.original):
                digest = bytes(byte ^ 0xFF for byte in digest)  # it did not agree, and shall not
            changed = event._replace(digest=digest)
        return changed

    def _rewritten(self, event: Event, state: State | None) -> Event:
        """The event with pseudonyms in all its private fields; the table of events says which these are."""
        names = self._names
        assert names is not None
        changed: dict[str, Any] = {}
        for field in FIELDS[type(event)]:
            value: Any = event[field.at]
            if field.meaning == Meaning.REQUEST_NAME:
                changed[field.name] = names.name(value)
            elif field.meaning == Meaning.NAMESPACE:
                changed[field.name] = names.namespace(value)
            elif field.meaning == Meaning.ITEMS and value:
                changed[field.name] = all_records(names.items(_items(value, names.block_size)))
            elif field.meaning == Meaning.CONTENT and value:
                chain, items, first = self._before(names, event, state)
                changed[field.name] = names.follow(chain, value, items, first)[1]
        return event._replace(**changed) if changed else event

    def _before(self, names: Pseudonyms, event: Event, state: State | None) -> tuple[bytes, BlockItems, int]:
        """The chain that the content words of an event follow, the items in them, and the position of their block."""
        match event:
            case RequestMatched():
                items, first = _items(event.items, names.block_size), event.device_blocks + event.host_blocks
                if state is None or event.leaf not in state.nodes:
                    return names.root(event.namespace), items, first
                leaf = state.nodes[event.leaf]
                return self._chain(names, state, leaf, event.cut if event.upper else leaf.size), items, first
            case BlocksCached():
                chain, first = (b"", 0) if state is None else self._end_of(names, state, event.request)
                return chain, _items(event.items, names.block_size), first
            case _:
                raise TypeError(f"nobody says what the content words of {type(event).__name__} follow")

    def _chain(self, names: Pseudonyms, state: State, leaf: Node, cut: int) -> bytes:
        """The chain after the first ``cut`` blocks of a run."""
        path = state.path(leaf)
        root = path[0].parent if path else leaf
        assert root is not None
        words = b"".join(node.words for node in path[:-1])
        if path:
            words += leaf.words[: cut * state.block_bytes]
        return names.follow(names.root(root.words), words, tree.items_of(path))[0]

    def _end_of(self, names: Pseudonyms, state: State, id: int) -> tuple[bytes, int]:
        """The chain after everything that is known of a request, and how many blocks that are."""
        request = state.requests.get(id)
        if request is None:
            return b"", 0
        end = request.leaf.end
        chain = self._chain(names, state, request.leaf, request.leaf.size)
        chain = names.follow(chain, request.words, request.items, end)[0]
        return chain, end + len(request.words) // state.block_bytes


def _items(records: bytes, block_size: int) -> BlockItems:
    """The items of an event; of one that is damaged, none."""
    try:
        return by_block(records, block_size)
    except ValueError:
        return NO_ITEMS


def _redact_state(state: State, names: Pseudonyms) -> None:
    ends: dict[int, bytes] = {}
    """By identity of a run or root: the chain at its end."""
    for request in state.requests.values():  # while the tree still has the words that their chains follow from
        leaf = request.leaf
        path = state.path(leaf)
        root = path[0].parent if path else leaf
        assert root is not None
        content = b"".join(node.words for node in path)
        chain = names.follow(names.root(root.words), content, request.items)[0]
        request.words = names.follow(chain, request.words, request.items, leaf.end)[1]
        request.items = names.items(request.items)
        request.namespace = names.namespace(request.namespace)
        request.request_id = names.name(request.request_id)
    state.numbers = {request.request_id: request.number for request in state.requests.values()}
    for root in state.all_roots():
        ends[id(root)] = names.root(root.words)
        root.words = names.namespace(root.words)
        stack = [root]
        while stack:
            node = stack.pop()
            children = list(node.children.values())
            for child in children:
                ends[id(child)], child.words = names.follow(ends[id(node)], child.words, child.items, child.start)
                child.items = names.items(child.items)
            if children:
                node.children = {child.key(state.block_bytes): child for child in children}
            assert children or node.children is NO_CHILDREN or not node.children
            stack.extend(children)
    state.roots = {root.words: root for root in state.roots.values()}


def redact(source: Path, target: Path, key: bytes) -> Redacted:
    """Write the redacted form of a recording to a new file; one of an earlier event table becomes one of today's.

    Raises:
        LedgerError: a file cannot be read or written, or is no recording; nothing is left behind.
    """
    reader = KvlogReader(source)
    try:
        try:
            upcast = in_proportion(upcaster(reader.schema_hash), source, source.stat().st_size)
            redactor = Redactor(key, comparable=digests_comparable(reader.schema_hash))
            begin = redactor.begin(reader.snapshot) if reader.snapshot else b""
        except (UnknownSchema, SnapshotError) as error:
            program = f"kvledger {reader.program}" if reader.program else "the kvledger that wrote it"
            raise LogCorrupt(str(source), 0, f"{error}: redact it with {program}, or a newer one") from error
        writer = KvlogWriter(target, schema_hash=codec.SCHEMA_HASH, base_sequence=reader.base_sequence, snapshot=begin)
        try:
            with writer:
                events = _rewrite(reader, upcast, writer, redactor)
                writer.ended = reader.ended and reader.damage is None
        except BaseException as error:
            target.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise LedgerError(f"cannot write {target}: {error.strerror}") from error
            raise
        return Redacted(events, str(reader.damage or ""), redactor.broken)
    finally:
        reader.close()


def _rewrite(
    reader: KvlogReader,
    upcast: Callable[[list[Record]], list[Record]],
    writer: KvlogWriter,
    redactor: Redactor,
) -> int:
    events = 0
    while records := reader.poll(1):
        changed: list[Record] = []
        for record in records:
            try:
                event = redactor.event(record.sequence, event_of(upcast([record])[0]))
            except (CodecError, InvariantViolation) as error:
                raise LogCorrupt(
                    str(reader.path), 0, f"event {record.sequence}: {str(error).splitlines()[0]}"
                ) from error
            kind, subject, args, payload = codec.encode(event)
            args = args.ljust(codec.ARGS_BYTES, b"\0")
            changed.append(record._replace(kind=kind, subject=subject, args=args, payload=payload))
        writer.write(changed)
        events += len(changed)
    return events
