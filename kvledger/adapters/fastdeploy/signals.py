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
    "splitwise_complete_prefilled_step_{rank_id}": Signal(
        "1", "gpu id", "step whose layers are being computed, mod 100003"
    ),
    "splitwise_complete_prefilled_layer_{rank_id}": Signal("1", "gpu id", "last layer that is computed"),
    "worker_ready_signal": Signal("workers", "engine_worker_queue_port", "1 where a model worker is ready"),
}
"""The named signals by name; in two of them the rank's number stands for ``{rank_id}``."""


class SharedWords:
    """The shared-memory object of a signal, with what FastDeploy's code reads of ``SharedMemory``."""

    def __init__(self, name: str, buf: memoryview) -> None:
        self.name = name[1:]
        """Without the slash."""
        self.buf = buf
        """All of its bytes."""
        self.size = len(buf)

    def close(self) -> None:
        """Leave it: whoever has ``value`` or ``buf`` keeps it until both are dropped."""

    def unlink(self) -> None:
        """Remove the object; who has it attached keeps it."""
        unlink(f"/{self.name}")


class IPCSignal:
    """``value`` is the shared array; each word has one writer. ``shm`` is the object that holds it.

    Args:
        name, suffix: the object is ``<name>.<suffix>``.
        array, dtype: its shape, and its first content where it is created. Without either, ``value`` is ``None``, and
            the object has ``shm_size`` bytes.
        create: make it anew (an object of that name that was left over is replaced), or attach.

    Raises:
        ipc.LedgerNotFound: there is nothing to attach to.
        ipc.SharedMemoryFull
        ValueError: what is there is smaller than is asked for, or nothing says how large it is.
    """

    value: Any

    def __init__(
        self,
        name: str,
        array: npt.NDArray[Any] | None = None,
        dtype: npt.DTypeLike | None = None,
        suffix: object = None,
        create: bool = True,
        shm_size: int | None = None,
    ) -> None:
        plain = array is None or dtype is None
        words = np.zeros(0, np.uint8) if plain else np.ascontiguousarray(array, dtype)
        size = shm_size if plain else words.nbytes
        self.name = f"/{name}" if suffix is None else f"/{name}.{suffix}"
        if size is None or size < 1:
            raise ValueError(f"signal {self.name} has no size: give array and dtype, or shm_size")
        if create:
            if (SHM / self.name[1:]).exists():
                _log.warning("signal %s was left over: it is replaced", self.name)
                unlink(self.name)
            map = memory.create_plain(self.name, size)
        else:
            map = memory.attach_plain(self.name, write=True)
        if len(map) < size:
            raise ValueError(f"signal {self.name} has {len(map)} bytes, {size} are expected")
        self.shm = SharedWords(self.name, memoryview(map))
        self.value = None if plain else np.frombuffer(map, words.dtype, words.size).reshape(words.shape)
        if create and not plain:
            self.value[...] = words

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
