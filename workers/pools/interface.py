"""What an engine and a transfer worker need of a backend's pools; every backend keeps to it, and imports only this."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ipc import LedgerError
from statemachine.events import TransferStarted
from workers.pools.layout import PoolLayout

Bytes = npt.NDArray[np.uint8]


class PoolMismatch(LedgerError):
    """A pool in shared memory does not have the layout that was expected."""


class Pools(Protocol):
    """The pools of one rank as its engine sees them."""

    rank: int
    layout: PoolLayout
    id: str
    """Random name of their memory."""
    host: Bytes
    """``uint8[blocks, layers, block_bytes]``."""

    def tensor(self, layer: int, name: str) -> Any:
        """A device tensor, ``[blocks, *shape]``, as the backend's framework has it. Raises ``KeyError``."""


class Ended(NamedTuple):
    """A transfer's copies have ended on this rank: the first ``valid`` blocks are there."""

    transfer: int
    valid: int
    error: str = ""
    corrupt: bool = False
    """It ended before a host block that is not what was written; ``error`` says which."""


class Copies(Protocol):
    """What a transfer worker does with the pools of its rank."""

    def start(self, transfer: TransferStarted) -> None:
        """Begin to copy block ``sources[i]`` to ``targets[i]``, not before the transfers in ``after`` have ended."""

    def ended(self) -> list[Ended]:
        """What has ended since the last call, in the order in which it did.

        Raises:
            Exception: nothing can be copied any more; the worker has to begin again as a new process.
        """

    def busy(self) -> bool:
        """Whether some copy has not ended."""

    def close(self) -> None:
        """Give back what is not memory of this process."""
