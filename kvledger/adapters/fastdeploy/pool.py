"""The device pool of the drop-in: blocks without a request, freeing, swapping, and the ledger behind it."""

from __future__ import annotations

import atexit
import functools
import itertools
import operator
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import numpy as np

from kvledger.adapters.fastdeploy.cache_data import BlockNode, CacheStatus
from kvledger.adapters.fastdeploy.launch import Launched, envs, expect_memory, expect_revision
from kvledger.adapters.fastdeploy.metrics import CacheMetrics, Gauges, KnownGauges, exported_gauges
from kvledger.adapters.fastdeploy.raw_blocks import RawBlocks
from kvledger.adapters.fastdeploy.views import FreeList, run_of
from kvledger.config import CacheConfig, ConfigError
from kvledger.manager.manager import CacheManager
from kvledger.manager.wait import loop
from statemachine.errors import InvalidCommand, OutOfBlocks
from statemachine.events import AllocationRefused, Direction, HostPolicy, Tier
from statemachine.state.nodes import Request

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="DevicePool")

_numbers = itertools.count()
_ROLES = ("mixed", "prefill", "decode")
_WRITE_POLICIES = {
    "write_back": (HostPolicy.EXCLUSIVE, 1),
    "write_through": (HostPolicy.WRITE_THROUGH, 1),
    "write_through_selective": (HostPolicy.WRITE_THROUGH, 2),
}
"""By FastDeploy's name: the policy of the host tier, and at which use a block is backed up."""

Match = tuple[list[int], list[int], list[int], BlockNode, int, int]
"""``(gpu block ids, cpu block ids, ids of the nodes to swap in, last node, gpu tokens, cpu tokens)``."""


class Live(NamedTuple):
    """A request that has matched."""

    match: Match
    tokens: int
    """Tokens whose content the ledger knows."""
    scheduled: int
    """Blocks cached by its last ``update_cache_blocks``; 0 before the first: the next one finds them computed."""


class _Freeing:
    """The future of :meth:`DevicePool.free_block_ids_async`: copies that have to end."""

    def __init__(self, manager: DevicePool, transfers: set[int]) -> None:
        self._manager = manager
        self._transfers = transfers

    def done(self) -> bool:
        """Whether all the blocks are free."""
        self._manager.poll()
        return self._manager.ended(self._transfers)

    def result(self) -> None:
        """Nothing."""


def own(
    method: Callable[Concatenate[S, P], R],
) -> Callable[Concatenate[S, P], R]:
    """Let one thread at a time in, as the ledger's owner."""

    @functools.wraps(method)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.request_release_lock:
            self._manager.adopt_thread()
            return method(self, *args, **kwargs)

    return call


class DevicePool:
    """Construction, blocks that belong to nobody, freeing, and the ledger behind it all. See the subclass."""

    prefix_tree_status_signal: Any = None
    """The launch's, or one that the engine assigns: followed from then on, see :class:`IPCSignal`."""
    shm_cache_task_flag_broadcast: Any = None
    """As above: 1 while transfers are in flight."""
    ready_timeout_s = 60.0
    """The KV tensors and the transfer workers have this long to get ready."""

    def __init__(
        self,
        config: Any,
        tensor_parallel_size: int = 1,
        splitwise_role: str = "mixed",
        local_data_parallel_id: int = 0,
        *,
        attention_backend: Callable[..., Any] | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        if splitwise_role not in _ROLES:
            raise ConfigError(f"splitwise_role must be one of {', '.join(_ROLES)}, not {splitwise_role!r:.80}")
        expect_revision(config.cache_config)
        self.config = config
        self.cache_config = config.cache_config
        self._gauges = KnownGauges(exported_gauges() if gauges is None else gauges)
        self.speculative_config = getattr(config, "speculative_config", None)
        self.tensor_parallel_size = tensor_parallel_size
        self.splitwise_role = splitwise_role
        self.enable_splitwise = int(splitwise_role != "mixed")
        self.local_data_parallel_id = local_data_parallel_id
        self.attention_backend = attention_backend
        self.metrics = CacheMetrics(self._gauges)
        self.num_gpu_blocks = self._wanted_gpu_blocks()
        self.num_cpu_blocks = _blocks_of(self.cache_config, "num_cpu_blocks")
        self.request_release_lock = threading.RLock()
        self.task_swapping_event: dict[str, threading.Event] = {}
        self.gpu_free_task_future: _Freeing | None = None
        self.executor_pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvledger-release")
        self.launched: Launched | None = None
        self._signals: Launched | None = None
        """Those of the launch, also while it has only made the pushers."""
        self.ledger = f"fastdeploy-{os.getpid()}-dp{local_data_parallel_id}-{next(_numbers)}"
        """Name of the ledger."""
        self._live: dict[str, Live] = {}
        self._uncached: dict[str, list[int]] = {}
        """Requests whose content the ledger refuses, and the blocks that are freed with them: they run uncached."""
        self._swapping: dict[str, set[int]] = {}
        """By task of :meth:`issue_swap_task`: the transfers it stands for."""
        self._stopped = threading.Event()
        self._open(self._ledger_config())
        self._pid = os.getpid()
        atexit.register(self.close)

    def _wanted_gpu_blocks(self) -> int:
        new = envs.ENABLE_V1_KVCACHE_SCHEDULER
        return _blocks_of(self.cache_config, "total_block_num" if new else "prefill_kvcache_block_num")

    def _ledger_config(self, **more: Any) -> CacheConfig:
        cache = self.cache_config
        policy, backup_after = HostPolicy.OFF, 1
        if self.num_cpu_blocks and getattr(cache, "enable_hierarchical_cache", True):
            written = getattr(cache, "write_policy", "write_back")
            if written not in _WRITE_POLICIES:
                known = ", ".join(_WRITE_POLICIES)
                raise ConfigError(f"cache_config.write_policy must be one of {known}, not {written!r:.80}")
            policy, backup_after = _WRITE_POLICIES[written]
        expect_memory(cache, bool(policy), self.splitwise_role)
        return CacheConfig(
            block_size=getattr(cache, "block_size", 64),
            device_blocks=self.num_gpu_blocks,
            host_blocks=self.num_cpu_blocks if policy else 0,
            host_policy=policy,
            backup_after=backup_after,
            chunked_multimodal=not getattr(cache, "disable_chunked_mm_input", False),
            ready_timeout_s=self.ready_timeout_s,
            **more,
        )

    def _open(self, config: CacheConfig) -> None:
        self._manager = CacheManager.create(self.ledger, config)
        try:
            self._block_size = config.block_size
            self._raw = RawBlocks(self._manager)
            self.gpu_free_block_list = FreeList(self._manager.state.device.pool)
            self.cpu_free_block_list = FreeList(self._manager.state.host.pool)
            self._set_all_gauges()
        except BaseException:  # a gauge of the engine's may raise what it likes
            self._manager.close()
            raise

    @property
    def manager(self) -> CacheManager:
        """The ledger behind it; call :meth:`CacheManager.adopt_thread` before changing anything through it."""
        return self._manager

    def _request(self, req_id: str) -> Request:
        state = self._manager.state
        return state.requests[state.numbers[req_id]]

    # Blocks without a request

    @property
    def available_gpu_resource(self) -> float:
        """Share of the blocks that are free."""
        return len(self.gpu_free_block_list) / self.num_gpu_blocks if self.num_gpu_blocks else 0.0

    @property
    def dropped_recycles(self) -> int:
        """Ids that were recycled although they were free already, or never handed out."""
        return self._raw.dropped

    @own
    def can_allocate_gpu_blocks(self, num_blocks: int, try_free_gpu_blocks: bool = True) -> bool:
        """Whether so many blocks could be allocated now, with what can be evicted; nothing is evicted yet."""
        if not try_free_gpu_blocks:
            return num_blocks <= len(self.gpu_free_block_list)
        return self._manager.can_allocate(_count(num_blocks))

    @own
    def allocate_gpu_blocks(self, num_blocks: int) -> list[int]:
        """So many blocks, that belong to nobody yet. Waits where a block is still being copied out.

        Raises:
            OutOfBlocks
        """
        blocks = self._raw.allocate(_count(num_blocks))
        self._set_gauges()
        return blocks

    @own
    def recycle_gpu_blocks(self, gpu_block_ids: Sequence[int] | int) -> None:
        """Free blocks. Ids that are free or somebody else's are dropped, counted and logged."""
        blocks = [gpu_block_ids] if isinstance(gpu_block_ids, int | np.integer) else gpu_block_ids
        self._raw.recycle(map(int, blocks))
        self._set_gauges()

    def allocate_cpu_blocks(self, num_blocks: int) -> list[int]:
        """Refuse: host blocks are the ledger's alone, which takes them when it evicts or backs up.

        Raises:
            InvalidCommand: more than none are asked for.
        """
        if _count(num_blocks):
            raise InvalidCommand("host blocks are taken by evicting (free_block_ids), and are handed out to nobody")
        return []

    def recycle_cpu_blocks(self, cpu_block_ids: Sequence[int] | int) -> None:
        """Drop the ids, count and log them: nobody can have been handed a host block."""
        blocks = [cpu_block_ids] if isinstance(cpu_block_ids, int | np.integer) else cpu_block_ids
        self._raw.drop(list(map(int, blocks)))

    def get_required_block_num(self, input_token_num: int, block_size: int) -> int:
        """Blocks for so many tokens."""
        return -(-input_token_num // block_size)

    def _check_validity(self, req_id: str, match_gpu_blocks_num: int, expected_block_num: int) -> None:
        missing = expected_block_num - match_gpu_blocks_num
        if not self.can_allocate_gpu_blocks(missing):
            raise OutOfBlocks(AllocationRefused(0, missing, self._manager.available_blocks(), 0, 0, req_id), 0)

    def free_block_ids(self, need_block_num: int) -> None:
        """Make so many more blocks free: move them to the host, or drop them. Returns when they are free.

        Raises:
            TimeoutError: the copies do not end.
        """
        self.free_block_ids_async(need_block_num)
        future = self.gpu_free_task_future
        if future is not None:
            self._until(future.done)
            self.gpu_free_task_future = None
            self._set_gauges()

    @own
    def free_block_ids_async(self, need_block_num: int) -> None:
        """Begin to make so many more blocks free; while an earlier call is not done, nothing is begun."""
        if self.gpu_free_task_future is not None:
            if not self.gpu_free_task_future.done():
                return
            self.gpu_free_task_future.result()
            self.gpu_free_task_future = None
        before = set(self._manager.state.transfers)
        self._manager.make_room(_count(need_block_num))
        started = set(self._manager.state.transfers) - before
        if started:
            self.gpu_free_task_future = _Freeing(self, started)
        self._set_gauges()

    @own
    def free_cpu_block_ids(self, need_block_num: int) -> int:
        """Drop so many unused blocks from the host; returns how many went."""
        return self._manager.evict(Tier.HOST, _count(need_block_num))

    @own
    def free_nodes_directly(self, node: BlockNode) -> None:
        """Drop a node that nobody uses and nothing continues, and those above it that lead nowhere else then."""
        if node.node_id >= 0 and not node.children:
            self._manager.forget(run_of(node.node_id)[0])
            self._set_gauges()

    # Swapping: the ledger orders it when it matches or evicts

    @own
    def issue_swap_task(
        self,
        transfer_task_id: str,
        swap_node_ids: Sequence[int],
        gpu_block_ids: Sequence[int],
        cpu_block_ids: Sequence[int],
        event_type: CacheStatus,
        is_sync: bool = True,
    ) -> None:
        """Follow the transfers that move these nodes, and wait for their end, or leave that to ``sync_swap_task``."""
        state = self._manager.state
        runs = [state.nodes.get(run_of(id)[0]) for id in swap_node_ids]
        wanted = (Direction.SWAP_IN,) if event_type == CacheStatus.SWAP2GPU else (Direction.SWAP_OUT, Direction.BACKUP)
        self._swapping[transfer_task_id] = {
            run.transfer.id
            for run in runs
            if run is not None and run.transfer is not None and run.transfer.direction in wanted
        }
        self.task_swapping_event[transfer_task_id] = threading.Event()
        self._notice_ends()
        if is_sync:
            self.sync_swap_task(transfer_task_id)

    def sync_swap_task(self, transfer_task_id: str) -> None:
        """Wait for a task of ``issue_swap_task``.

        Raises:
            TimeoutError: it does not end; its blocks stay in quarantine until it does.
        """
        event = self.task_swapping_event[transfer_task_id]
        try:
            self._until(lambda: self.poll() or event.is_set())
        finally:
            self._swapping.pop(transfer_task_id, None)
            self.task_swapping_event.pop(transfer_task_id, None)

    def _until(self, done: Callable[[], object]) -> None:
        limit = self._manager.config.transfer_timeout_s * 2
        if not loop(done, limit):
            raise TimeoutError(f"transfers {[*self._manager.state.transfers]} do not end within {limit:g} s")

    @own
    def poll(self) -> None:
        """Fold the workers' answers in; what there is to report of requests stays for whoever polls the manager."""
        self._manager.fold()
        if self.shm_cache_task_flag_broadcast is not None:
            self.shm_cache_task_flag_broadcast.value[0] = bool(self._manager.state.transfers)
        self._notice_ends()

    def ended(self, transfers: set[int]) -> bool:
        """Whether all these transfers have ended."""
        return transfers.isdisjoint(self._manager.state.transfers)

    def _notice_ends(self) -> None:
        for task, transfers in list(self._swapping.items()):
            event = self.task_swapping_event.get(task)
            if event is not None and self.ended(transfers):
                event.set()

    @own
    def update_cache_config(self, cache_config: Any) -> None:
        """The pool has another size, as profiling found.

        Raises:
            Busy: somebody uses a block that would go.
        """
        before, self.cache_config = self.cache_config, cache_config
        try:
            wanted = self._wanted_gpu_blocks()
            self._manager.resize(Tier.DEVICE, wanted)
        except BaseException:
            self.cache_config = before
            raise
        self.num_gpu_blocks = wanted
        self._set_all_gauges()

    def close(self) -> None:
        """Stop threads and workers, and remove everything from shared memory. Also done when the process ends."""
        if self._stopped.is_set() or os.getpid() != self._pid:  # the exit of a fork is not its parent's
            return
        self._stopped.set()
        atexit.unregister(self.close)
        self.executor_pool.shutdown()
        if self._signals is not None:
            self._signals.close()
        with self.request_release_lock:
            self._manager.adopt_thread()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _set_gauges(self) -> None:
        free = len(self.gpu_free_block_list)
        self._gauges.set("free_gpu_block_num", free)
        self._gauges.set("available_gpu_resource", free / self.num_gpu_blocks)

    def _set_all_gauges(self) -> None:
        self._gauges.set("max_gpu_block_num", self.num_gpu_blocks)
        self._gauges.set("max_cpu_block_num", self.num_cpu_blocks)
        self._gauges.set("available_gpu_block_num", self.num_gpu_blocks)
        self._set_gauges()


def _count(blocks: Any) -> int:
    """A number of blocks as schedulers pass it, often read from a signal and so of a NumPy type."""
    try:
        return operator.index(blocks)
    except TypeError:
        raise InvalidCommand(f"a number of blocks is a whole number, not {blocks!r:.80}") from None


def _blocks_of(cache_config: Any, name: str) -> int:
    """A number of blocks that the configuration gives."""
    value = getattr(cache_config, name, None)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"cache_config.{name} must be a whole number, not {value!r:.80}") from None
