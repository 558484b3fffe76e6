"""Starting the processes: waiting for the KV tensors, the layout of the pools, signals, handles."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from kvledger.adapters.fastdeploy.signals import SignalBoard
from kvledger.config import ConfigError
from kvledger.handoff.sender import Sender
from kvledger.manager.manager import CacheManager
from kvledger.manager.wait import loop
from workers.pools.layout import BACKENDS


class Environment:
    """FastDeploy's environment variables, read when asked; an attribute that was set wins."""

    def __getattr__(self, name: str) -> Any:
        if name == "ENABLE_V1_KVCACHE_SCHEDULER":
            return int(os.environ.get(name, "1"))
        if name == "FD_LOG_DIR":
            return os.environ.get(name, "log")
        raise AttributeError(name)


envs = Environment()


def expect_revision(cache_config: Any) -> None:
    """Refuse the configuration of a FastDeploy whose scheduler asks for calls that the drop-in does not have.

    Raises:
        ConfigError: saying which are served.
    """
    if hasattr(cache_config, "kvcache_storage_backend"):  # came with external storage, after the revision served here
        raise ConfigError(
            "this FastDeploy is later than 2025-12: cache_config has kvcache_storage_backend. Its scheduler calls "
            "allocate_gpu_blocks(n, req_id) and reads num_cached_blocks, which the drop-in does not have: use the "
            "release that has PrefixCacheManager.cal_block_hash (docs/fastdeploy.md)"
        )


def expect_memory(cache_config: Any, host: bool, role: str) -> None:
    """Refuse to copy KV where the configuration does not say in whose memory it is.

    FastDeploy's model runners compute in tensors of their own, or, in split mode, in those of ``cache_messager.py``.
    Workers that copied between pools of kvledger's own would report hits whose bytes the model has never seen.

    Raises:
        ConfigError: saying what to write.
    """
    backend = getattr(cache_config, "kv_backend", None)
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(f"cache_config.kv_backend must be one of {', '.join(BACKENDS)}, not {backend!r:.80}")
    if backend is not None or not (host or role != "mixed"):
        return
    if role != "mixed":
        what, without = f"splitwise_role {role!r} sends KV from one instance to another", "splitwise_role = 'mixed'"
    else:
        what = f"cache_config.num_cpu_blocks = {cache_config.num_cpu_blocks} moves KV between device and host"
        without = "num_cpu_blocks = 0 (no swap_space), which serves prefix hits on the device alone"
    raise ConfigError(
        f"{what}, but the KV tensors that FastDeploy's model runners make (key_caches_0_rank0.device0 and so on) are "
        "not in kvledger's pools, so other bytes would be moved than the model computes. Write cache_config.kv_backend "
        "= 'cuda' and let the runners publish their tensors to the pools, or 'numpy' or 'paddle' and let them compute "
        f"in the pools (docs/fastdeploy.md says how); or do without: {without}"
    )


class WorkerHandle:
    """A rank's transfer worker. It is replaced when it dies, so its process id may change."""

    def __init__(self, manager: CacheManager, rank: int) -> None:
        self._manager = manager
        self.rank = rank

    @property
    def pid(self) -> int | None:
        """Its process now."""
        return self._manager.worker_pid(self.rank)

    def poll(self) -> int | None:
        """``None`` while it runs or is being replaced."""
        return None

    def terminate(self) -> None:
        """Ask it to end (the manager will replace it)."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)


class PusherHandle:
    """A rank's pusher. It is replaced when it dies, so its process id may change."""

    def __init__(self, sender: Sender, rank: int) -> None:
        self._sender = sender
        self.rank = rank

    @property
    def pid(self) -> int | None:
        """Its process now."""
        return self._sender.pid(self.rank)

    def poll(self) -> int | None:
        """``None`` while it runs or is being replaced."""
        return None

    def terminate(self) -> None:
        """Ask it to end (the sender will replace it)."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)


class Launched:
    """What one launch has made."""

    def __init__(self, port: object, ranks: int) -> None:
        self._board = board = SignalBoard(port)
        self._ranks = ranks
        self.threads: list[threading.Thread] = []
        self.cache_ready_signal = board.signal("cache_ready_signal", ranks)
        self.swap_space_ready_signal = board.signal("swap_space_ready_signal", ranks)
        self.prefix_tree_status_signal = board.signal("prefix_tree_status", 1)
        self.shm_cache_task_flag_broadcast = board.signal("cache_task_broadcast_signal", 1)

    def wait_for_tensors(self, create_cache_tensor: bool, timeout: float) -> None:
        """Wait for the model runners, where they make the KV tensors. Raises ``TimeoutError``, naming the ranks."""
        signal = self.cache_ready_signal
        if create_cache_tensor or self._board.made(signal):
            return
        if not loop(lambda: int(signal.value.sum()) == self._ranks, timeout):
            missing = [rank for rank in range(self._ranks) if signal.value[rank] != 1]
            raise TimeoutError(f"the KV tensors of ranks {missing} are not there after {timeout:g} s")

    def layout(self, cache_config: Any, block_bytes: int) -> dict[str, Any]:
        """Layers and bytes of a block.

        ``kv_backend`` says whose memory the pools are, see :func:`expect_memory`; where nothing does, nothing is copied
        and there are no pools (``ranks`` is 0). With ``kv_tensors`` they are made of tensors, and with ``kv_checksums``
        host blocks have checksums, as :class:`kvledger.CacheConfig` has them.
        """
        backend = getattr(cache_config, "kv_backend", None)
        if backend is None:
            return {"ranks": 0}
        checked = {
            "ranks": self._ranks,
            "layers": int(cache_config.model_cfg.num_hidden_layers),
            "checksums": getattr(cache_config, "kv_checksums", False),
            "backend": backend,
        }
        tensors = getattr(cache_config, "kv_tensors", ())
        if tensors:
            return {**checked, "tensors": tensors}
        return {**checked, "block_bytes": block_bytes}

    def ready(self) -> None:
        """Pools and workers are there: first the tensors are said to be ready, then the swap space."""
        self.cache_ready_signal.value[:] = 1
        self.swap_space_ready_signal.value[:] = 1

    def workers(self, manager: CacheManager) -> list[WorkerHandle]:
        """One handle per rank; none where nothing is copied."""
        return [WorkerHandle(manager, rank) for rank in range(manager.config.ranks)]

    def close(self) -> None:
        """Remove the signals that were made here, and wait for the threads, which have been told to stop."""
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        self._board.clear()
