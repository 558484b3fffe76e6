"""``EngineCacheQueue``: the transfers of a ledger, seen as FastDeploy's queue of tasks.

There is no queue. Every client follows the engine's log at its own cursor, so each sees every task once, in one order,
whoever ordered them; nothing has to be read by all before the next one can come.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import Self

from ipc import LogReader
from kvledger.adapters.fastdeploy.cache_data import CacheStatus
from kvledger.adapters.fastdeploy.views import node_id
from statemachine.events import KIND_OF, Direction, TransferFinished, TransferStarted
from statemachine.records import codec

Task = tuple[list[int], list[int], list[int], CacheStatus, str]
"""``(node ids, gpu block ids, cpu block ids, direction, task id)``."""
_KINDS = (KIND_OF[TransferStarted], KIND_OF[TransferFinished])


class OrderedByTheLedger(RuntimeError):
    """Only the engine orders transfers, and only a rank's worker ends its part; both do so in logs of their own."""


def task_of(event: TransferStarted) -> Task:
    """A transfer as a task."""
    nodes = []
    for index, (run, count) in enumerate(zip(event.nodes, event.counts, strict=True)):
        if event.upper and event.direction == Direction.BACKUP and index == len(event.nodes) - 1:
            run = event.upper
        nodes += [node_id(run, count - 1 - offset) for offset in range(count)]
    sources, targets = event.sources.tolist(), event.targets.tolist()
    if event.direction == Direction.SWAP_IN:
        return nodes, targets, sources, CacheStatus.SWAP2GPU, str(event.transfer)
    return nodes, sources, targets, CacheStatus.SWAP2CPU, str(event.transfer)


class EngineCacheQueue:
    """One client's view of the transfers from now on.

    Args:
        address: name of the ledger (:attr:`PrefixCacheManager.ledger`), where the original has a host and a port.
        authkey, is_server, num_client, client_id, local_data_parallel_size, local_data_parallel_id: as in the
            original; not needed here.

    Raises:
        ipc.LedgerNotFound
    """

    def __init__(
        self,
        address: str,
        authkey: bytes = b"cache_queue_service",
        is_server: bool = False,
        num_client: int = 1,
        client_id: int = -1,
        local_data_parallel_size: int = 1,
        local_data_parallel_id: int = 0,
    ) -> None:
        self.address = address
        self.client_id = client_id
        self._reader = LogReader(address, name=f"queue {client_id}")
        self._tasks: deque[Task] = deque()
        self._done: deque[Task] = deque()
        self._started: dict[int, Task] = {}

    def _follow(self) -> None:
        for record in self._reader.poll():
            if record.kind in _KINDS:
                event = codec.decode(record.kind, record.subject, record.args, record.payload)
                if isinstance(event, TransferStarted):
                    self._started[event.transfer] = task_of(event)
                    self._tasks.append(self._started[event.transfer])
                elif isinstance(event, TransferFinished):
                    self._done.append(self._started.pop(event.transfer))

    def get_transfer_task(self) -> tuple[Task | None, bool]:
        """``(next task or None, whether it has been read)``."""
        self._follow()
        return (self._tasks.popleft(), True) if self._tasks else (None, False)

    def get_transfer_done_signal(self) -> Task | None:
        """The next task that has ended on every rank."""
        self._follow()
        return self._done.popleft() if self._done else None

    def empty(self) -> bool:
        """Whether no task is waiting to be read."""
        self._follow()
        return not self._tasks

    def put_transfer_task(self, item: object) -> None:
        """Raises :class:`OrderedByTheLedger`."""
        raise OrderedByTheLedger("transfers are ordered by matching and evicting, and recorded in the engine's log")

    def put_transfer_done_signal(self, item: object) -> None:
        """Raises :class:`OrderedByTheLedger`."""
        raise OrderedByTheLedger("a transfer ends when every rank's worker has acknowledged it in its own log")

    def close(self) -> None:
        """Stop following."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
