"""Items in the content of blocks: which image or sound begins where, exactly.

A block has one 31-bit word per position, and an item may have one position in it. So words alone cannot tell items
apart. The content of a block is therefore its words *and* the records of the items that begin in it: first position,
number of positions, and the SHA-256 of the whole hash. The later blocks of an item need no record of their own: they
stand below the block in which it begins. Where no item begins there is no record, and nothing to compare.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

_RECORD = struct.Struct("<II32s")
RECORD_BYTES: Final = _RECORD.size

BlockItems: TypeAlias = dict[int, bytes]
"""Position of a block in its path → the records of the items that begin in it; blocks without one are left out."""

NO_ITEMS: Final[BlockItems] = {}
"""Shared by everything without items; never written."""


class Item(NamedTuple):
    """A multimodal item (an image, a sound): ``length`` placeholder positions from ``offset`` on.

    ``hash`` identifies its content, any number of bytes, and all of them count: two items are the same exactly if their
    hashes and lengths are.
    """

    hash: bytes
    offset: int
    length: int


def item_records(items: Sequence[Item], start: int = 0) -> bytes:
    """The records of items in tokens of which the first one stands at position ``start``, by position."""
    return b"".join(
        _RECORD.pack(start + item.offset, item.length, hashlib.sha256(item.hash).digest())
        for item in sorted(items, key=lambda item: item.offset)
    )


def packed(offset: int, length: int, digest: bytes) -> bytes:
    """One record: an item of ``length`` positions that begins at position ``offset``."""
    return _RECORD.pack(offset, length, digest)


def each(records: bytes) -> Iterator[tuple[int, int, bytes]]:
    """``(first position, positions, digest)`` of every record.

    Raises:
        ValueError: these are no whole records.
    """
    if len(records) % RECORD_BYTES:
        raise ValueError(f"{len(records)} bytes are no whole records of items")
    return _RECORD.iter_unpack(records)


def by_block(records: bytes, block_size: int) -> BlockItems:
    """The records by the block in which their item begins.

    Raises:
        ValueError: these are no records of items that follow each other.
    """
    if not records:
        return NO_ITEMS
    found: BlockItems = {}
    end = at = 0
    for offset, length, _ in each(records):
        if offset < end or not length:
            raise ValueError(f"an item of {length} positions at {offset} does not follow one that ends at {end}")
        end = offset + length
        block = offset // block_size
        found[block] = found.get(block, b"") + records[at : at + RECORD_BYTES]
        at += RECORD_BYTES
    return found


def divided(records: bytes, position: int) -> tuple[bytes, bytes]:
    """The records of items that begin before a position, and those of the others."""
    before = sum(offset < position for offset, _, _ in each(records)) * RECORD_BYTES
    return records[:before], records[before:]


def all_records(items: BlockItems) -> bytes:
    """The records of all blocks, by position."""
    return b"".join([items[block] for block in sorted(items)])


def within(items: BlockItems, start: int, stop: int) -> BlockItems:
    """What begins in the blocks from ``start`` to ``stop``."""
    if not items:
        return NO_ITEMS
    return {block: records for block, records in items.items() if start <= block < stop} or NO_ITEMS


def extended(items: BlockItems, records: bytes, block_size: int) -> BlockItems:
    """Items, and records of those that follow them.

    Raises:
        ValueError: as :func:`by_block`.
    """
    return by_block(all_records(items) + records, block_size) if records else items


def agreement(run: BlockItems, items: BlockItems, start: int, stop: int) -> int:
    """The first block from ``start`` on in which not the same items begin; ``stop`` where there is none before."""
    return min(
        (block for block in (*run, *items) if start <= block < stop and run.get(block) != items.get(block)),
        default=stop,
    )


def uncut(items: BlockItems, blocks: int, block_size: int) -> int:
    """The most of ``blocks`` blocks that do not end inside an item."""
    end = blocks * block_size
    for block in sorted(items, reverse=True):
        for offset, length, _ in reversed([*each(items[block])]):
            if offset < end < offset + length:
                end = offset // block_size * block_size
    return end // block_size
