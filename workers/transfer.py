"""The transfer worker: one process per rank that copies blocks between the device and the host pool.

It follows the engine's log from its own cursor, executes each ``TransferStarted`` in log order (which is why a transfer
never overtakes those in its ``after``), and writes its answer into a log of its own. A new incarnation executes what
was still in flight when it joined; copies are idempotent and their sources are held, so doing one twice is harmless.
"""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType

from ipc import LogReader, LogWriter
from ipc.processes import own_identity
from ipc.signals import Signals
from statemachine import codec
from statemachine.events import (
    KIND_OF,
    Direction,
    EpochStarted,
    IntArray,
    TransferFinished,
    TransferStarted,
    WorkerJoined,
)
from workers import acknowledgements
from workers.acknowledgements import Acknowledgement, EpochSeen, Status
from workers.layout import PoolLayout
from workers.pools import Pools

READY, HEARTBEAT, PID, START = 0, 8, 16, 17
"""Words of the worker's signals, on cache lines of their own. ``PID`` and ``START`` say who it is."""
STARTING, IS_READY, HAS_FAILED = 0, 1, 2
ORPHAN_GRACE_S = 5.0
_PARK_S = 0.25
_ACK_SEGMENT_BYTES = 1 << 18
_KINDS = {KIND_OF[event]: event for event in (TransferStarted, TransferFinished, WorkerJoined, EpochStarted)}
_MASK = sum(1 << KIND_OF[event] for event in (TransferStarted, WorkerJoined, EpochStarted))


def copy_blocks(pools: Pools, direction: Direction, sources: IntArray, targets: IntArray) -> int:
    """Copy block ``sources[i]`` to ``targets[i]``; returns how many. Consecutive ids go in one piece."""
    device, host = pools.device, pools.host
    swap_in = direction == Direction.SWAP_IN
    count = len(sources)
    start = 0
    while start < count:
        source, target = sources[start], targets[start]
        stop = start + 1
        while stop < count and sources[stop] - source == stop - start == targets[stop] - target:
            stop += 1
        size = stop - start
        if swap_in:
            device[:, target : target + size] = host[source : source + size].swapaxes(0, 1)
        else:
            host[target : target + size] = device[:, source : source + size].swapaxes(0, 1)
        start = stop
    return count


class TransferWorker:
    """One incarnation of a rank's worker; :meth:`step` is the whole loop body.

    ``epoch`` is that of the engine that started it. A later engine adopts it if it has joined, else it has to leave.
    """

    def __init__(
        self, ledger: str, rank: int, incarnation: int, epoch: int, layout: PoolLayout, from_sequence: int
    ) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.epoch = epoch
        self.superseded = False
        """A later engine does not know of this worker: it has to leave."""
        self.pools = Pools(ledger, rank, layout)
        self.log = LogWriter.create(
            acknowledgements.log_name(ledger, rank, incarnation),
            schema_hash=acknowledgements.SCHEMA_HASH,
            segment_bytes=_ACK_SEGMENT_BYTES,
            retain_bytes=4 * _ACK_SEGMENT_BYTES,
        )
        self.reader = LogReader(
            ledger, from_sequence=from_sequence, name=f"transfer {rank}", worker=True, kind_mask=_MASK
        )
        if self.reader.schema_hash != codec.SCHEMA_HASH:
            raise codec.CodecError("the engine runs another version of kvledger")
        self._joined = False
        self._pending: dict[int, TransferStarted] = {}

    def step(self, timeout: float = 0.0) -> int:
        """Execute what has been ordered; waits up to ``timeout`` seconds for it. Returns the transfers executed."""
        executed = 0
        for record in self.reader.wait(timeout) if timeout else self.reader.poll():
            if record.kind not in _KINDS:
                continue
            event = codec.decode(record.kind, record.subject, record.args, record.payload)
            if isinstance(event, TransferStarted):
                self._pending[event.transfer] = event
            elif isinstance(event, TransferFinished):
                if not self._joined:  # over before this incarnation began: its blocks are somebody else's
                    self._pending.pop(event.transfer, None)
            elif isinstance(event, WorkerJoined) and (event.rank, event.incarnation) == (self.rank, self.incarnation):
                self._joined = True
            elif isinstance(event, EpochStarted) and event.epoch > self.epoch:
                if not self._joined:
                    self.superseded = True
                    break
                self._answer(EpochSeen(self.rank, event.epoch))
            if self._joined:
                for transfer in self._pending.values():
                    self._answer(self._execute(transfer))
                    executed += 1
                self._pending.clear()
        return executed

    def _execute(self, transfer: TransferStarted) -> Acknowledgement:
        try:
            valid = copy_blocks(self.pools, Direction(transfer.direction), transfer.sources, transfer.targets)
        except Exception as error:  # whatever a backend raises becomes the engine's answer
            reason = f"{type(error).__name__}: {error}"
            return Acknowledgement(self.rank, transfer.transfer, 0, Status.FAILED, reason[:1000])
        return Acknowledgement(self.rank, transfer.transfer, valid, Status.OK, "")

    def _answer(self, acknowledgement: Acknowledgement | EpochSeen) -> None:
        # append() fences between the copies before it and its commit word, so who sees the answer sees the bytes
        self.log.append([acknowledgement.record()])

    def close(self) -> None:
        """Leave; the answers stay until the engine has read them."""
        self.reader.close()
        self.log.close()


def main(arguments: list[str]) -> int:
    """``ledger rank incarnation epoch from_sequence layout``; runs until SIGTERM, or until the engine is gone."""
    ledger, rank, incarnation, epoch, from_sequence = arguments[0], *map(int, arguments[1:5])
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then stops its workers
    signals = Signals(acknowledgements.signals_name(ledger, rank, incarnation))
    pid, signals.words[START] = own_identity()
    signals.words[PID] = pid
    try:
        worker = TransferWorker(ledger, rank, incarnation, epoch, PoolLayout.parse(arguments[5]), from_sequence)
    except Exception as error:  # the reason travels to the engine, which raises it
        signals.text = f"{type(error).__name__}: {error}"
        signals.words[READY] = HAS_FAILED
        return 1
    signals.words[READY] = IS_READY
    try:
        orphan_since = 0.0
        while not stopping and not worker.superseded:
            if not worker.step(_PARK_S):
                if worker.reader.writer_alive():
                    orphan_since = 0.0
                else:
                    orphan_since = orphan_since or time.monotonic()
                    if time.monotonic() - orphan_since > ORPHAN_GRACE_S:
                        break
            signals.words[HEARTBEAT] = time.time_ns()
    except Exception as error:
        signals.text = f"{type(error).__name__}: {error}"
        signals.words[READY] = HAS_FAILED
        return 1
    finally:
        worker.close()
        signals.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
