"""A transfer worker that fails at a chosen moment: ``python -m tests.workers.dying_worker MOMENT ...``.

Everything but the failure is the real worker.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

from ipc import LogReader, LogWriter
from statemachine.events import KIND_OF, Direction, IntArray, WorkerLost
from tests.campaigns.dying import Moment, die_in_append
from tests.waiting import wait_until
from workers import transfer
from workers.pools import numpy as numpy_pools
from workers.pools.numpy import NumpyPools
from workers.processes.acknowledgements import Acknowledgement, EpochSeen

FATAL_COPY = 3
BEHIND = "after its acknowledgement, the other rank being behind"
"""Rank 0 begins with the copy after which rank 1 dies only when the log says that rank 1 is lost."""


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def wait_for_the_loss_of_the_other_rank(ledger: str) -> None:
    reader = LogReader(ledger)
    wait_until("rank 1 is lost", lambda: any(record.kind == KIND_OF[WorkerLost] for record in reader.poll()))
    reader.close()


def main(moment: str, arguments: list[str]) -> int:
    rank, incarnation = int(arguments[1]), int(arguments[2])
    copies = 0
    copy, answer = numpy_pools.copy_blocks, transfer.TransferWorker._answer

    def copying(pools: NumpyPools, direction: Direction, sources: IntArray, targets: IntArray) -> int:
        nonlocal copies
        copies += 1
        if copies == FATAL_COPY and moment == "before the copy":
            die()
        if copies == FATAL_COPY and moment == "during the copy":
            half = max(len(sources) // 2, 1)
            copy(pools, direction, sources[:half], targets[:half])
            die()
        if copies == FATAL_COPY and moment == BEHIND and rank == 0:
            wait_for_the_loss_of_the_other_rank(arguments[0])
        if moment == "every copy raises":
            raise OSError("the device has fallen off the bus")
        return copy(pools, direction, sources, targets)

    def answering(self: transfer.TransferWorker, what: Acknowledgement | EpochSeen) -> None:
        if copies == FATAL_COPY and moment == "before its acknowledgement":
            die()
        if copies == FATAL_COPY and moment in ("in its acknowledgement", "between acknowledgement and hint"):
            at = Moment.BEFORE_COMMIT if moment == "in its acknowledgement" else Moment.BEFORE_HINT

            def append(writer: LogWriter) -> None:
                answer(self, what)

            die_in_append(self.log, at, append, really=True)
        answer(self, what)
        if copies == FATAL_COPY and moment in ("after its acknowledgement", BEHIND) and rank == 1:
            die()

    if moment == "no memory":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
    elif moment == "successors cannot start" and incarnation > 1 and rank == 1:
        return 3
    elif (rank == 1 or moment == BEHIND) and (incarnation == 1 or moment == "every copy raises"):
        numpy_pools.copy_blocks = copying
        transfer.TransferWorker._answer = answering  # type: ignore[method-assign]
    return transfer.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
