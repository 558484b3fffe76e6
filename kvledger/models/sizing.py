"""How many blocks fit in so much memory, and what a ledger takes beside them."""

from __future__ import annotations

from typing import NamedTuple

from kvledger.models.shape import ModelError, ModelShape
from statemachine.state.state import MOST_BLOCKS

SNAPSHOT_BYTES_PER_BLOCK = 20
SNAPSHOT_BYTES_PER_TOKEN = 4
"""Measured (docs/operations.md): with both tiers full of cached blocks."""
_SNAPSHOTS = 2
_SEGMENTS_AHEAD = 2
"""The one that is written, and the one that is reserved for after it."""


class Sizing(NamedTuple):
    """A cache in numbers. Bytes of pools are per rank; log and snapshots are one per ledger, in shared memory."""

    block_bytes: int
    """Of one block in all layers of one rank."""
    device_blocks: int
    host_blocks: int
    host_staging_blocks: int
    device_bytes: int
    host_bytes: int
    """Staging blocks included."""
    tokens: int
    """That fit on the device."""
    log_bytes: int
    """At most, while snapshots keep up."""
    snapshot_bytes: int
    """Of the two that are kept, with both tiers full."""

    def shared_bytes(self, ranks: int) -> int:
        """What all of it takes in ``/dev/shm`` with so many ranks on one host. Device pools are not there but with the
        backends ``numpy`` and ``paddle``."""
        return ranks * self.host_bytes + self.log_bytes + self.snapshot_bytes


def size(
    shape: ModelShape,
    *,
    block_size: int,
    memory: int,
    host_memory: int = 0,
    retain_bytes: int = 256 << 20,
    segment_bytes: int = 16 << 20,
) -> Sizing:
    """Blocks for so many bytes of device memory and of host memory, both per rank.

    Raises:
        ModelError: not even one block fits, or more than a pool may have.
    """
    block = shape.block_bytes
    device = memory // block
    if device < 1:
        raise ModelError(f"one block of {shape.model_type} takes {block:,} bytes per rank, there are {memory:,}")
    host = max(host_memory // block * 8 // 9 - 1, 0) if host_memory else 0  # an eighth comes on top, rounded up
    if device > MOST_BLOCKS or host > MOST_BLOCKS // 2:
        raise ModelError(f"{max(device, host):,} blocks are more than a pool may have: take a larger block_size")
    staging = -(-host // 8)
    snapshots = _SNAPSHOTS * (device + host) * (SNAPSHOT_BYTES_PER_BLOCK + SNAPSHOT_BYTES_PER_TOKEN * block_size)
    log = retain_bytes + _SEGMENTS_AHEAD * segment_bytes
    return Sizing(
        block, device, host, staging, device * block, (host + staging) * block, device * block_size, log, snapshots
    )
