"""The pusher: one process per rank of a prefill instance that pushes KV blocks to decode instances.

It follows the log of pushes, sends each push layer by layer as the engine's rank gets them written, and answers in a
log of its own when all layers have arrived or something is in the way. What it has sent counts only when the engine
has folded the answers of all ranks into one ``PushFinished``, so it may be killed and started again at any time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from ipc import LogReader, LogWriter
from ipc.signals import Signals
from workers.handoff.progress import LayerProgress
from workers.handoff.pushes import SCHEMA_HASH, STARTED_KIND, PushFinished, PushStarted, fact_of
from workers.handoff.shared_memory import SharedMemory
from workers.handoff.transport import Destination, Refused, Transport
from workers.pools.layout import PoolLayout
from workers.pools.numpy import NumpyPools
from workers.processes import acknowledgements
from workers.processes.acknowledgements import Acknowledgement, Status
from workers.processes.loop import run

PROGRAM = ("-m", "workers.handoff.pusher")
_LOOK_AT_PROGRESS_S = 0.0005
_ACK_SEGMENT_BYTES = 1 << 18


class _Push:
    """A push, with the layers of it that have arrived."""

    def __init__(self, order: PushStarted, destination: Destination) -> None:
        self.order = order
        self.destination = destination
        self.layers = 0
        """Layers that have arrived."""


class Pusher:
    """One incarnation of a rank's pusher; :meth:`step` is the whole loop body.

    Args:
        log: of the pushes, :func:`workers.handoff.pushes.log_name`.
    """

    def __init__(
        self,
        log: str,
        rank: int,
        incarnation: int,
        epoch: int,
        layout: PoolLayout,
        from_sequence: int,
        waiting: Callable[[str], None] = lambda reason: None,
    ) -> None:
        ledger = log.rpartition(".")[0]
        self.rank = rank
        self.superseded = False
        self._layers = layout.layers
        self._signals = Signals(acknowledgements.signals_name(log, rank, incarnation))
        self._progress = LayerProgress(ledger, rank)
        self._transport: Transport = SharedMemory(rank, NumpyPools(ledger, rank, layout), self._signals)
        self._destinations: dict[tuple[str, int, str], Destination] = {}
        """By ledger, board and pools of the instance."""
        self._pushes: dict[int, _Push] = {}
        self.log = LogWriter.create(
            acknowledgements.log_name(log, rank, incarnation),
            schema_hash=acknowledgements.SCHEMA_HASH,
            segment_bytes=_ACK_SEGMENT_BYTES,
            retain_bytes=4 * _ACK_SEGMENT_BYTES,
        )
        self.reader = LogReader(
            log, from_sequence=from_sequence, name=f"pusher {rank}", worker=True, kind_mask=1 << STARTED_KIND
        )
        if self.reader.schema_hash != SCHEMA_HASH:
            raise ValueError("the engine runs another version of kvledger")

    def step(self, timeout: float = 0.0) -> int:
        """Send what is written; waits up to ``timeout`` seconds for it. Returns the layers sent and pushes answered."""
        if self._pushes:
            timeout = min(timeout, _LOOK_AT_PROGRESS_S)
        elif self._destinations:
            self._forget_the_dead()
        started: list[PushStarted] = []
        for record in self.reader.wait(timeout) if timeout and not self._ready() else self.reader.poll():
            fact = fact_of(record)
            if isinstance(fact, PushStarted):
                started.append(fact)
            elif isinstance(fact, PushFinished):  # over, before all of it has arrived
                self._pushes.pop(fact.push, None)
                started = [order for order in started if order.push != fact.push]
        done = 0
        for order in started:
            done += self._begin(order)
        for push in list(self._pushes.values()):  # one layer of each, then look at the log again
            done += self._advance(push)
        return done

    def _ready(self) -> bool:
        return any(self._may_send(push) for push in self._pushes.values())

    def _may_send(self, push: _Push) -> bool:
        return not push.order.step or self._progress.reached(push.order.step, push.layers + 1)

    def _begin(self, order: PushStarted) -> int:
        key = order.peer, order.board, order.pools
        try:
            if key not in self._destinations:
                self._forget_the_dead()
                self._destinations[key] = self._transport.attach(order)
        except Refused as refused:
            self._answer(order, 0, str(refused))
            return 1
        self._pushes[order.push] = _Push(order, self._destinations[key])
        return 0

    def _advance(self, push: _Push) -> int:
        if not self._may_send(push):
            return 0
        try:
            push.destination.send(push.order, push.layers)
        except Refused as refused:
            del self._pushes[push.order.push]
            self._answer(push.order, 0, str(refused))
            return 1
        push.layers += 1
        if push.layers == self._layers:
            del self._pushes[push.order.push]
            self._answer(push.order, len(push.order.targets), "")
        return 1

    def _answer(self, order: PushStarted, valid: int, error: str) -> None:
        # append() fences between the copies before it and its commit word, so who sees the answer sees the bytes
        status = Status.FAILED if error else Status.OK
        self.log.append([Acknowledgement(self.rank, order.push, valid, status, error[:1000]).record()])

    def _forget_the_dead(self) -> None:
        """Detach from instances that are gone, so that their memory can go."""
        for key, destination in list(self._destinations.items()):
            used = any(push.destination is destination for push in self._pushes.values())
            if not used and not destination.alive():
                self._destinations.pop(key).close()

    def close(self) -> None:
        """Leave; the answers stay until the engine has read them."""
        for destination in self._destinations.values():
            destination.close()
        self.reader.close()
        self.log.close()
        self._progress.close()
        self._signals.close()


if __name__ == "__main__":
    # it serves one engine: nobody can tell it anything once that is gone
    sys.exit(run(sys.argv[1:], Pusher, orphan_grace_s=0.0))
