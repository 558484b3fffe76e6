"""A recording may not ask for more memory than a file of its size can mean.

Pools cost four bytes a block as soon as a log opens or resizes them, whatever follows; everything else in a log is
about as large as its records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from ipc import LogCorrupt, Record
from statemachine.events import KIND_OF, LedgerOpened, PoolResized
from statemachine.records.codec import CodecError, decode

_FREE_BLOCKS = 8 << 20
"""So many blocks any file may have."""
_BLOCKS_PER_BYTE = 64
_POOLS = KIND_OF[LedgerOpened], KIND_OF[PoolResized]


def in_proportion(
    upcast: Callable[[list[Record]], list[Record]], path: Path, size: int
) -> Callable[[list[Record]], list[Record]]:
    """``upcast`` for the records of a file of ``size`` bytes, which refuses pools that are out of proportion to it.

    The function raises :class:`ipc.LogCorrupt` with the event and both numbers.
    """
    most = max(_FREE_BLOCKS, _BLOCKS_PER_BYTE * size)

    def checked(records: list[Record]) -> list[Record]:
        records = upcast(records)
        for record in records:
            if record.kind in _POOLS and (blocks := _blocks(record)) > most:
                why = f"event {record.sequence} wants pools of {blocks:,} blocks, a file of {size:,} bytes may have"
                raise LogCorrupt(str(path), 0, f"{why} {most:,}: it is damaged, or made to use up memory")
        return records

    return checked


def _blocks(record: Record) -> int:
    with contextlib.suppress(CodecError):  # whoever replays it says so
        event = decode(record.kind, record.subject, record.args, record.payload)
        if isinstance(event, LedgerOpened):
            return event.device_blocks + event.host_blocks + event.host_staging_blocks
        if isinstance(event, PoolResized):
            return event.blocks
    return 0
