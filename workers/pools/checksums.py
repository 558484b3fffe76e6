"""A checksum per host block, where the layout asks for it: what a swap-in brings back is what a swap-out has written.

The table stands behind the host pool in the same object, so it outlives workers and engines as the blocks do: one xxh3
of 64 bits per block of a rank, all layers. The worker writes it when a copy out has ended, and looks before a copy in:
the blocks before the first that does not match are copied, the transfer is answered as corrupt, and the engine drops
the rest from the host tier with all that continues it.
"""

from __future__ import annotations

import xxhash

from statemachine.events import Direction, IntArray, TransferStarted
from workers.pools.interface import Copies, Ended
from workers.pools.memory import PoolMemory


class CheckedCopies:
    """The copies of a backend, with checksums around them. See :class:`workers.pools.interface.Copies`."""

    def __init__(self, memory: PoolMemory, copies: Copies) -> None:
        self._memory = memory
        self._copies = copies
        self._out: dict[int, IntArray] = {}
        """Transfer id of a copy out under way → the host blocks that it writes."""
        self._corrupt: dict[int, str] = {}
        """Transfer id of a copy in that was cut short → the reason."""
        self._ended: list[Ended] = []

    def _digest(self, block: int) -> int:
        return xxhash.xxh3_64_intdigest(self._memory.host[block])

    def start(self, transfer: TransferStarted) -> None:
        """Begin to copy; of a copy in only what is intact."""
        if transfer.direction != Direction.SWAP_IN:
            self._out[transfer.transfer] = transfer.targets
            self._copies.start(transfer)
            return
        blocks = self._memory.host.shape[0]
        for index, block in enumerate(transfer.sources):
            if 0 <= block < blocks and self._digest(block) != int(self._memory.checksums[block]):
                reason = f"host block {block} of rank {self._memory.rank} is not what was written"
                if not index:
                    self._ended.append(Ended(transfer.transfer, 0, reason, corrupt=True))
                    return
                self._corrupt[transfer.transfer] = reason
                transfer = transfer._replace(sources=transfer.sources[:index], targets=transfer.targets[:index])
                break
        self._copies.start(transfer)

    def ended(self) -> list[Ended]:
        """What has ended since the last call."""
        found, self._ended = self._ended, []
        for ended in self._copies.ended():
            written = self._out.pop(ended.transfer, None)
            reason = self._corrupt.pop(ended.transfer, "")
            if reason and not ended.error:
                ended = ended._replace(error=reason, corrupt=True)
            elif written is not None and not ended.error:
                for block in written:
                    self._memory.checksums[block] = self._digest(block)
            found.append(ended)
        return found

    def busy(self) -> bool:
        """Whether some copy has not ended."""
        return bool(self._ended) or self._copies.busy()

    def close(self) -> None:
        """Give back what is not memory of this process."""
        self._copies.close()
