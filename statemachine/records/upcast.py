"""Logs of earlier event tables, read as if they had been written with today's.

Every table has a hash (:data:`statemachine.records.codec.SCHEMA_HASH`), which stands in each log. For a table that is
no more this module keeps the events that have changed since, as they were, and how each becomes today's. When an event
changes: move its old form here, under the hash the table had, and run ``python -m tests.data.generate`` so that a
small log of the new table joins the corpus that every later version must replay. Where the canonical encoding of a
state has changed (:data:`statemachine.records.snapshot.MAGIC`), digests of before say nothing: each table remembers
the encoding it was written with, and the same command adds digests in the new one to the corpus.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from statemachine.events import (
    U8,
    U32,
    U64,
    AllocationRefused,
    Blocks,
    BlocksCached,
    Event,
    LedgerOpened,
    RequestMatched,
    Text,
    TierLost,
    Words,
)
from statemachine.records import codec
from statemachine.records.snapshot import MAGIC


class UnknownSchema(ValueError):
    """A log was written with an event table that this version does not know."""


class _Changed(NamedTuple):
    """An event as it was, and how it becomes today's."""

    decode: Callable[[int, bytes, bytes], Any]
    today: Callable[[Any], Event]


class _AllocationRefused1(NamedTuple):
    """Until the first recordings: a refused admission did not say which path it was about."""

    request: U64
    wanted: U32
    available: U32
    key: Text


def _refused_1(old: _AllocationRefused1) -> AllocationRefused:
    return AllocationRefused(old.request, old.wanted, old.available, 0, 0, old.key)


def _changed(kind: int, old: Any, today: Callable[[Any], Event]) -> dict[int, _Changed]:
    return {kind: _Changed(codec.decoder_of(old), today)}


class _TierLost1(NamedTuple):
    """Until engines could be succeeded: a tier was lost and used again, its new pools had no names."""

    tier: U8
    reason: Text


def _lost_1(old: _TierLost1) -> TierLost:
    return TierLost(old.tier, old.reason, "unnamed")


class _LedgerOpened2(NamedTuple):
    """Until back-ups could wait for the second use: they began as soon as a block was cached."""

    block_size: U32
    device_blocks: U32
    host_blocks: U32
    host_staging_blocks: U32
    host_policy: U8
    ranks: U32
    layout: Text
    pools: Text


def _opened_2(old: _LedgerOpened2) -> LedgerOpened:
    return LedgerOpened(*old, backup_after=1)


class _LedgerOpened3(NamedTuple):
    """Until a restart remembered the weights in force, and whether the model can begin inside an item."""

    block_size: U32
    device_blocks: U32
    host_blocks: U32
    host_staging_blocks: U32
    host_policy: U8
    ranks: U32
    layout: Text
    pools: Text
    backup_after: U32


class _RequestMatched3(NamedTuple):
    """Until items counted in full: they were told apart by their words alone."""

    request: U64
    leaf: U64
    cut: U32
    upper: U64
    device_blocks: U32
    host_blocks: U32
    key: Text
    namespace: Words
    words: Words


class _BlocksCached3(NamedTuple):
    """Likewise."""

    request: U64
    leaf: U64
    cut: U32
    upper: U64
    node: U64
    duplicates: U32
    taken: U32
    blocks: Blocks
    words: Words


class _LedgerOpened4(NamedTuple):
    """Until there were layer groups beside group 0."""

    block_size: U32
    device_blocks: U32
    host_blocks: U32
    host_staging_blocks: U32
    host_policy: U8
    ranks: U32
    layout: Text
    pools: Text
    backup_after: U32
    chunked_multimodal: U8
    weights: Text


class _AllocationRefused4(NamedTuple):
    """Likewise: a refusal was always about group 0."""

    request: U64
    wanted: U32
    available: U32
    leaf: U64
    cut: U32
    key: Text


def _opened_4(old: _LedgerOpened4) -> LedgerOpened:
    return LedgerOpened(*old)


def _refused_4(old: _AllocationRefused4) -> AllocationRefused:
    return AllocationRefused(*old)


def _opened_3(old: _LedgerOpened3) -> LedgerOpened:
    return LedgerOpened(*old)


def _matched_3(old: _RequestMatched3) -> RequestMatched:
    return RequestMatched(*old[:-1], b"", old.words)


def _cached_3(old: _BlocksCached3) -> BlocksCached:
    return BlocksCached(*old[:-1], b"", old.words)


class Earlier(NamedTuple):
    """An earlier event table."""

    changed: dict[int, _Changed]
    """By kind: what has changed since."""
    encoding: bytes
    """What a digest of the state was made of then (:data:`statemachine.records.snapshot.MAGIC`)."""


_WITHOUT_ITEMS = _changed(2, _RequestMatched3, _matched_3) | _changed(5, _BlocksCached3, _cached_3)
_REFUSED = _changed(4, _AllocationRefused4, _refused_4)
_ONE_GROUP = _REFUSED | _changed(1, _LedgerOpened4, _opened_4)
_OPENED = _changed(1, _LedgerOpened2, _opened_2) | _REFUSED | _WITHOUT_ITEMS
EARLIER: dict[int, Earlier] = {
    0xC788335C0420067F: Earlier(
        _OPENED | _changed(4, _AllocationRefused1, _refused_1) | _changed(15, _TierLost1, _lost_1), b"kvlstate1"
    ),
    0x1B740F085A93AF3E: Earlier(_OPENED, b"kvlstate2"),
    0x6F1B228257DA6E57: Earlier(_WITHOUT_ITEMS | _REFUSED | _changed(1, _LedgerOpened3, _opened_3), b"kvlstate3"),
    # Until runs could take the copies of requests (CopiesReplaced): these stayed beside the runs' own.
    0x1711F24080C79FAD: Earlier(_ONE_GROUP, b"kvlstate4"),
    # Until what turned out bad could be distrusted (BlocksDistrusted).
    0x5693452048BD2A9E: Earlier(_ONE_GROUP, b"kvlstate4"),
    0x6BE329E41F4E077F: Earlier(_ONE_GROUP, b"kvlstate4"),
    # Until an engine's own manager could be recorded (BlocksChosen, EngineDeparted).
    0xCBA37E8E4E95850C: Earlier({}, b"kvlstate5"),
}
"""By hash of the table."""


def digests_comparable(schema_hash: int) -> bool:
    """Whether the digests in a log with that table can be compared with those of a replay."""
    return schema_hash == codec.SCHEMA_HASH or EARLIER[schema_hash].encoding == MAGIC


def upcaster(schema_hash: int) -> Callable[[list[Any]], list[Any]]:
    """How records of a log with that table become records of today's.

    Records are named tuples with the fields ``kind``, ``subject``, ``args`` and ``payload`` (:class:`ipc.Record`).

    Raises:
        UnknownSchema
    """
    if schema_hash == codec.SCHEMA_HASH:
        return lambda records: records
    earlier = EARLIER.get(schema_hash)
    if earlier is None:
        raise UnknownSchema(f"the event table {schema_hash:016x} is not known to this version")
    changed = earlier.changed
    return lambda records: [_upcast(record, changed) for record in records]


def _upcast(record: Any, changed: dict[int, _Changed]) -> Any:
    change = changed.get(record.kind)
    if change is None:
        return record
    event = change.today(change.decode(record.subject, record.args, record.payload))
    kind, subject, args, payload = codec.encode(event)
    return record._replace(kind=kind, subject=subject, args=args.ljust(codec.ARGS_BYTES, b"\0"), payload=payload)
