"""How far an engine's rank has written the KV of its present step: one word in shared memory, one writer."""

from __future__ import annotations

from ipc.fence import make_fence
from ipc.signals import Signals
from workers.handoff.pushes import log_name

_LAYER_BITS = 16


class LayerProgress:
    """The progress of one rank. The rank's process writes it, its pusher reads it.

    Args:
        ledger: of the prefill instance; its :class:`kvledger.handoff.sender.Sender` has created the word.

    Raises:
        ipc.LedgerNotFound: there is no sender on this ledger.
    """

    def __init__(self, ledger: str, rank: int, *, create: bool = False) -> None:
        self._signals = Signals(f"/{log_name(ledger)}.progress.{rank}", create=create)
        self._release, self._acquire = make_fence()

    def wrote(self, step: int, layers: int) -> None:
        """Report that the first ``layers`` layers of step ``step`` are written, and all of the steps before it.

        Steps count from 1 and only grow. On a GPU: call it when the copies are known to be done, not when they are
        queued.
        """
        word = step << _LAYER_BITS | layers
        if word < self._signals.words[0] or not 0 <= layers < 1 << _LAYER_BITS or step < 1:
            raise ValueError(f"step {step}, {layers} layers: progress only grows, and steps count from 1")
        self._release()
        self._acquire()
        self._signals.words[0] = word

    def reached(self, step: int, layers: int) -> bool:
        """Whether so many layers of a step are written."""
        there: bool = self._signals.words[0] >= step << _LAYER_BITS | layers
        self._release()
        self._acquire()
        return there

    def close(self, *, remove: bool = False) -> None:
        """Unmap, and remove if asked to."""
        self._signals.close(remove=remove)
