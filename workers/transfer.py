"""The transfer worker: one process per rank that copies blocks between the device and the host pool.

It follows the engine's log from its own cursor, begins each ``TransferStarted`` in log order, and writes its answer
into a log of its own when the copies have ended; a transfer never overtakes those in its ``after``. A new incarnation
executes what was still in flight when it joined; copies are idempotent and their sources are held, so doing one twice
is harmless. Where a later one may have written into its sources, the engine gives the earlier one up before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from ipc import LogReader, LogWriter
from statemachine.events import KIND_OF, EpochStarted, TransferFinished, TransferStarted, WorkerJoined
from statemachine.records import codec
from workers.pools.backends import open_copies
from workers.pools.layout import PoolLayout
from workers.processes import acknowledgements
from workers.processes.acknowledgements import Acknowledgement, EpochSeen, Status, reader_name
from workers.processes.loop import run

_LOOK_AT_COPIES_S = 0.0002
_ACK_SEGMENT_BYTES = 1 << 18
_KINDS = {KIND_OF[event]: event for event in (TransferStarted, TransferFinished, WorkerJoined, EpochStarted)}
_MASK = sum(1 << KIND_OF[event] for event in (TransferStarted, WorkerJoined, EpochStarted))


class TransferWorker:
    """One incarnation of a rank's worker; :meth:`step` is the whole loop body.

    ``epoch`` is that of the engine that started it. A later engine adopts it if it has joined, else it has to leave.
    """

    def __init__(
        self,
        ledger: str,
        rank: int,
        incarnation: int,
        epoch: int,
        layout: PoolLayout,
        from_sequence: int,
        waiting: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.epoch = epoch
        self.superseded = False
        """A later engine does not know of this worker: it has to leave."""
        self.copies = open_copies(ledger, rank, layout, waiting)
        self.log = LogWriter.create(
            acknowledgements.log_name(ledger, rank, incarnation),
            schema_hash=acknowledgements.SCHEMA_HASH,
            segment_bytes=_ACK_SEGMENT_BYTES,
            retain_bytes=4 * _ACK_SEGMENT_BYTES,
        )
        self.reader = LogReader(
            ledger, from_sequence=from_sequence, name=reader_name(rank), worker=True, kind_mask=_MASK
        )
        if self.reader.schema_hash != codec.SCHEMA_HASH:
            raise codec.CodecError("the engine runs another version of kvledger")
        self._joined = False
        self._pending: dict[int, TransferStarted] = {}

    def step(self, timeout: float = 0.0) -> int:
        """Execute what has been ordered; waits up to ``timeout`` seconds for it. Returns the transfers that ended."""
        if self.copies.busy():
            timeout = min(timeout, _LOOK_AT_COPIES_S)
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
                while self.copies.busy():
                    executed += self._answer_ended()
                    time.sleep(_LOOK_AT_COPIES_S)
                self._answer(EpochSeen(self.rank, event.epoch))
            if self._joined:
                for transfer in self._pending.values():
                    self.copies.start(transfer)
                    executed += self._answer_ended()
                self._pending.clear()
        return executed + self._answer_ended()

    def _answer_ended(self) -> int:
        ended = self.copies.ended()
        for transfer, valid, error, corrupt in ended:
            status = Status.CORRUPT if corrupt else Status.FAILED if error else Status.OK
            self._answer(Acknowledgement(self.rank, transfer, valid, status, error[:1000]))
        return len(ended)

    def _answer(self, acknowledgement: Acknowledgement | EpochSeen) -> None:
        # append() fences between the copies before it and its commit word, so who sees the answer sees the bytes
        self.log.append([acknowledgement.record()])

    def close(self) -> None:
        """Leave; the answers stay until the engine has read them."""
        self.copies.close()
        self.reader.close()
        self.log.close()


def main(arguments: list[str]) -> int:
    """Run the transfer worker of a rank. See :func:`workers.processes.loop.run`."""
    return run(arguments, TransferWorker)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
