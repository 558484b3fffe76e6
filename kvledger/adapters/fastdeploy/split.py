"""Split prefill and decode in the drop-in: pushers, and handing a request from one instance to the other.

FastDeploy's instances tell each other by queues which blocks go where (``cache_info``). Here that is one line of text,
the address that the decode instance reserves; the engines carry it over whatever connects them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ipc import LedgerError
from kvledger.adapters.fastdeploy.launch import Launched, PusherHandle
from kvledger.adapters.fastdeploy.pool import own
from kvledger.adapters.fastdeploy.shapes import CacheShapes
from kvledger.config import ConfigError
from kvledger.errors import HandoffError
from kvledger.handoff.peer import Handed, Received
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.text import printable
from workers.handoff.pushes import Address
from workers.processes.supervisor import WorkerFailed

_log = logging.getLogger(__name__)


class SplitInstance(CacheShapes):
    """What a prefill or a decode instance has beyond a device pool. See the subclass."""

    sender: Sender | None = None
    """Of a prefill instance, once its pushers were launched."""
    receiver: Receiver | None = None
    """Of a decode instance, once its pushers were launched."""
    pusher_failure = ""
    """Why the last :meth:`launch_cache_messager` returned ``None``."""

    @own
    def launch_cache_messager(
        self,
        cache_config: Any,
        tensor_parallel_size: int,
        device_ids: Sequence[int],
        key_cache_shape: Sequence[int],
        value_cache_shape: Sequence[int],
        pod_ip: str,
        engine_worker_queue_port: object,
        ipc_suffix: object,
    ) -> list[Any] | None:
        """Make the pools, say so by ``cache_ready_signal``, and start one pusher per rank.

        Returns one handle per process when all of them are ready. A decode instance has none: the pushers of the
        prefill instances write into its pools, and what it needs for that is ready when this returns. ``None``: they
        did not start; :attr:`pusher_failure`, which is also logged, says why.

        Raises:
            RuntimeError: requests are being served already.
        """
        self._expect_unused()
        self.pusher_failure = ""
        launched = self._board(engine_worker_queue_port, tensor_parallel_size)
        self.cache_ready_signal = launched.cache_ready_signal
        try:
            size = self._block_bytes(cache_config, (key_cache_shape, value_cache_shape))
            self._open_pools(launched.layout(cache_config, size))
            launched.cache_ready_signal.value[:] = 1
            if self.sender is None and self.receiver is None:  # else they were launched before the cache manager
                if self.splitwise_role == "decode":
                    self.receiver = Receiver(self._manager)
                else:
                    self.sender = Sender(self._manager)
        except (WorkerFailed, LedgerError, ConfigError) as error:
            launched.cache_ready_signal.value[:] = 0
            self._reopen()
            self.pusher_failure = str(error)
            _log.error("the pusher did not start: %s", printable(str(error)))
            return None
        return [PusherHandle(self.sender, rank) for rank in range(tensor_parallel_size)] if self.sender else []

    def _expect_unused(self) -> None:
        if self._live or len(self._raw) or self.launched is not None:
            raise RuntimeError("launch the cache manager once, before the first request")

    def _board(self, engine_worker_queue_port: object, ranks: int) -> Launched:
        """The signals of this launch, made by its first step."""
        if self._signals is None:
            self._signals = Launched(engine_worker_queue_port, ranks)
        return self._signals

    def _open_pools(self, layout: dict[str, Any]) -> None:
        """The ledger with pools and transfer workers, if there are to be any and it has none yet."""
        if layout["ranks"] and not self._manager.config.ranks:
            self._manager.close()
            self._open(self._ledger_config(**layout))

    def _reopen(self) -> None:
        """Back to a ledger without pools, after a launch that failed."""
        self.sender = self.receiver = None
        self._manager.close()
        self._open(self._ledger_config())

    @own
    def poll(self) -> None:
        """Fold the workers' and pushers' answers in."""
        super().poll()
        for side in (self.sender, self.receiver):
            if side is not None:
                side.fold()

    def handing_over(self) -> bool:
        """Whether requests are being sent or received."""
        return any(side is not None and side.busy() for side in (self.sender, self.receiver))

    @own
    def send_cache(self, task: Any, address: str, step: int = 0) -> None:
        """Push a request's blocks to where a decode instance wants them (:meth:`Sender.send`).

        Call it once all blocks are in ``task.block_tables`` and cached as far as they are full. They belong to the
        request from then on (``task.cached_block_num``), so release it and recycle nothing of it.

        Raises:
            HandoffError: this is no prefill instance, or the address does not fit.
            ValueError: it is no address.
        """
        if self.sender is None:
            raise HandoffError("only a prefill instance sends: launch its pushers first")
        parsed = Address.parse(address)
        have = len(self._manager.block_table(task.request_id))
        more = list(map(int, task.block_tables[have:]))
        if more and not self._raw.has(more):
            raise HandoffError(f"blocks {more[:8]} of request {task.request_id} were not allocated")
        if more:
            self._raw.move(task.request_id, more)
        task.cached_block_num = have + len(more)
        self.sender.send(task.request_id, parsed, step=step)

    @own
    def reserve_cache(self, req_id: str, blocks: int, peer: str) -> str:
        """Reserve blocks for what prefill instance ``peer`` (its :attr:`ledger`) sends; the address to give to it.

        The request has been matched. See :meth:`Receiver.reserve`.

        Raises:
            HandoffError: this is no decode instance, or the other one is not there.
            OutOfBlocks
        """
        if self.receiver is None:
            raise HandoffError("only a decode instance receives: launch its pushers first")
        return self.receiver.reserve(req_id, blocks, peer=peer).text()

    @own
    def get_finished_req(self) -> list[Handed | Received]:
        """The requests that were handed over, or were not, since the last call.

        A received request's ``block_table`` is its whole block table: all of it belongs to the request, so set
        ``cached_block_num`` to its length.
        """
        if self.sender is not None:
            return [*self.sender.poll()]
        return [*self.receiver.poll()] if self.receiver is not None else []
