"""FastDeploy's shared-memory signals: small int32 arrays that any process of the engine can read by name.

The bytes are those of the array and nothing else, so processes that use FastDeploy's own ``IPCSignal`` see the same.
Unlike there, a process that only attached takes nothing away when it exits.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ipc import memory
from ipc.errors import LedgerNotFound
from ipc.names import SHM
from ipc.ownership import unlink

_log = logging.getLogger(__name__)


class PrefixTreeStatus:
    """Values of ``prefix_tree_status``."""

    NORMAL = 0
    UPDATING = 1
    CLEARING = -1
    CLEARED = -2


class KVCacheStatus(PrefixTreeStatus):
    """Values of ``kv_cache_status``."""


class ModelWeightsStatus(PrefixTreeStatus):
    """Values of ``model_weights_status``."""


class ExistTaskStatus:
    """Values of the ``exist_*task_signal``."""

    EMPTY = 0
    EXIST = 1
    REFUSE = 2


class Signal(NamedTuple):
    """What a named signal is."""

    shape: str
    """One word, or one per …"""
    suffix: str
    meaning: str


SIGNALS: dict[str, Signal] = {
    "cache_ready_signal": Signal("tp", "engine_worker_queue_port", "1 where a rank's KV tensors exist"),
    "swap_space_ready_signal": Signal("tp", "engine_worker_queue_port", "1 where a rank's transfer worker is ready"),
    "cache_task_broadcast_signal": Signal("1", "engine_worker_queue_port", "1 while transfers are in flight"),
    "prefix_tree_status": Signal("1", "engine_worker_queue_port", "see PrefixTreeStatus: clearing the cache"),
    "kv_cache_status": Signal("1", "engine_worker_queue_port", "see KVCacheStatus: clearing the KV tensors"),
    "model_weights_status": Signal("1", "engine_worker_queue_port", "see ModelWeightsStatus: loading weights"),
    "worker_healthy_live_signal": Signal("min(8, tp)", "engine_worker_queue_port", "unix seconds of a sign of life"),
    "exist_task_signal": Signal("1", "engine_worker_queue_port", "see ExistTaskStatus"),
    "exist_swapped_task_signal": Signal("1", "engine_worker_queue_port", "see ExistTaskStatus"),
    "exist_prefill_task_signal": Signal("1", "engine_worker_queue_port", "see ExistTaskStatus"),
    "need_block_num_signal": Signal("max_num_seqs", "local_data_parallel_id", "blocks that the model asks for"),
    "launched_cache_manager_signal": Signal("1", "engine_worker_queue_port", "1 once the cache manager was launched"),
    "loaded_model_signal": Signal("1", "engine_worker_queue_port", "1 once the model is loaded"),
    "get_profile_block_num": Signal("1 or workers", "engine_worker_queue_port", "blocks that profiling found room for"),
    "splitwise_complete_prefilled_step": Signal("1", "gpu id", "step whose layers are being computed, mod 100003"),
    "splitwise_complete_prefilled_layer": Signal("1", "gpu id", "last layer that is computed"),
    "worker_ready_signal": Signal("workers", "engine_worker_queue_port", "1 where a model worker is ready"),
}
"""The named signals by name."""


class IPCSignal:
    """``value`` is the shared array; each word has one writer.

    Args:
        name, suffix: the object is ``<name>.<suffix>``.
        array: its shape, and its first content where it is created.
        create: make it anew (an object of that name that was left over is replaced), or attach.

    Raises:
        ipc.LedgerNotFound: there is nothing to attach to.
        ipc.SharedMemoryFull
        ValueError: what is there is smaller than ``array``.
    """

    def __init__(
        self,
        name: str,
        array: npt.NDArray[Any],
        dtype: npt.DTypeLike,
        suffix: object = None,
        create: bool = True,
    ) -> None:
        array = np.ascontiguousarray(array, dtype)
        self.name = f"/{name}" if suffix is None else f"/{name}.{suffix}"
        if create:
            if (SHM / self.name[1:]).exists():
                _log.warning("signal %s was left over: it is replaced", self.name)
                unlink(self.name)
            map = memory.create_plain(self.name, array.nbytes)
        else:
            map = memory.attach_plain(self.name, write=True)
        if len(map) < array.nbytes:
            raise ValueError(f"signal {self.name} has {len(map)} bytes, {array.nbytes} are expected")
        self.value: npt.NDArray[Any] = np.frombuffer(map, array.dtype, array.size).reshape(array.shape)
        if create:
            self.value[...] = array

    def clear(self) -> None:
        """Remove the object; who has it attached keeps it."""
        unlink(self.name)


class SignalBoard:
    """The signals of one launch: those that the engine made already are attached, the others made and removed."""

    def __init__(self, suffix: object) -> None:
        self._suffix = suffix
        self._own: list[IPCSignal] = []

    def signal(self, name: str, words: int) -> IPCSignal:
        """The signal of that name with so many words."""
        array = np.zeros(words, np.int32)
        with contextlib.suppress(LedgerNotFound):
            return IPCSignal(name, array, np.int32, self._suffix, create=False)
        signal = IPCSignal(name, array, np.int32, self._suffix)
        self._own.append(signal)
        return signal

    def made(self, signal: IPCSignal) -> bool:
        """Whether it was made here."""
        return signal in self._own

    def clear(self) -> None:
        """Remove what was made here."""
        for signal in self._own:
            signal.clear()
        self._own.clear()
