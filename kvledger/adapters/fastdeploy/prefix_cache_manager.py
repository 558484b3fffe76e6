"""FastDeploy's ``PrefixCacheManager`` over :class:`kvledger.CacheManager`.

The scheduler-facing methods keep their names, argument orders and return shapes. Behind them there is one ledger; every
method may be called from any thread, one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvledger.adapters.fastdeploy.cache_data import BlockNode
from kvledger.adapters.fastdeploy.content import item_around, items_of, tokens_of
from kvledger.adapters.fastdeploy.looked_at import LookedAt
from kvledger.adapters.fastdeploy.pool import Live, Match, own
from kvledger.adapters.fastdeploy.signals import PrefixTreeStatus
from kvledger.adapters.fastdeploy.views import leaf_view, root_view, run_of
from kvledger.manager.answers import Admission
from kvledger.manager.wait import loop
from kvledger.text import printable
from statemachine.content import InvalidTokens, Item
from statemachine.errors import InvalidCommand, OutOfBlocks
from statemachine.state.nodes import ALL, Request

_log = logging.getLogger(__name__)
_RESET_METRICS_EVERY = 10_000
_LOOK_S = 0.001
_LOOK_AT_STATUS_S = 0.01


class PrefixCacheManager(LookedAt):
    """Which block holds which tokens, asked the way FastDeploy's schedulers ask.

    Args:
        config: FastDeploy's configuration; of ``cache_config`` it reads ``total_block_num`` (or
            ``prefill_kvcache_block_num`` with the old scheduler), ``num_cpu_blocks``, ``block_size`` (default 64),
            ``bytes_per_layer_per_block``, ``model_cfg.num_hidden_layers``, ``enable_hierarchical_cache``,
            ``write_policy`` (``write_back``, ``write_through``, ``write_through_selective``),
            ``disable_chunked_mm_input``, and of kvledger's own ``kv_backend``, ``kv_tensors`` and ``kv_checksums``
            (``docs/pools.md``). With host blocks or a split role ``kv_backend`` has to say whose memory the KV is in.
        tensor_parallel_size, splitwise_role, local_data_parallel_id: as in the original.
        attention_backend: class with ``get_kv_cache_shape``, see :meth:`_get_kv_cache_shape`.
        gauges: where the gauges are set; default: FastDeploy's ``main_process_metrics`` where this process has loaded
            them, else :data:`main_process_metrics`, which
            :class:`kvledger.adapters.fastdeploy.collector.GaugesCollector` shows to Prometheus. Those that it has not
            are left out.

    Raises:
        kvledger.ConfigError: naming the setting.
    """

    # Matching

    def match_block(self, req_id: str, input_ids: Any, block_size: int) -> Match:
        """Begin a request: pin what is cached of its tokens, and order the swap-in of what is on the host.

        Asked again, it gives the same answer; ``release_block_ids`` undoes it.

        Raises:
            OutOfBlocks: there is no room for what would have to be swapped in; nothing is pinned.
        """
        return self._match(req_id, tokens_of(_Prompt(input_ids)), [], block_size)

    def mm_match_block(self, request: Any, block_size: int) -> Match:
        """As :meth:`match_block`, for a request with images."""
        return self._match(request.request_id, tokens_of(request), items_of(request), block_size)

    @own
    def _match(
        self, req_id: str, tokens: npt.NDArray[np.int32], items: list[Item], block_size: int, blocks: int | None = None
    ) -> Match:
        self._expect_block_size(block_size)
        live = self._live.get(req_id)
        if live is not None:
            return live.match
        manager, full = self._manager, len(tokens)
        if blocks is None and self._manager.config.host_blocks:
            # exactly what matches: all of it, or nothing
            blocks = sum(manager.peek(tokens, items=items, max_blocks=full))
        if blocks is None:
            admission = manager.match(req_id, tokens, items=items, max_blocks=full)
        else:
            admission = manager.admit(req_id, tokens, items=items, max_blocks=full, blocks=blocks)
        match = self._described(self._request(req_id), admission)
        self._live[req_id] = Live(match, full, 0)
        return match

    def _expect_block_size(self, block_size: int) -> None:
        if block_size != self._block_size:
            raise InvalidCommand(
                f"a block has {self._block_size} tokens, not {block_size}: set cache_config.block_size"
            )

    def _described(self, request: Request, admission: Admission) -> Match:
        leaf = leaf_view(self._manager.state, request.leaf)
        cpu: list[int] = []
        swapping: list[int] = []
        node = leaf
        for _ in range(admission.host_blocks):
            swapping.append(node.node_id)
            assert node.parent is not None
            node = node.parent
        if swapping:
            run = self._manager.state.nodes[run_of(swapping[0])[0]]
            if run.transfer is not None:
                cpu = run.transfer.sources.tolist()
        gpu: list[int] = admission.block_table[: admission.device_blocks].tolist()
        size = self._block_size
        return gpu, cpu, swapping[::-1], leaf, admission.device_blocks * size, admission.host_blocks * size

    @own
    def request_match_blocks(self, task: Any, block_size: int, *args: Any) -> tuple[list[int], int, dict[str, int]]:
        """Match a request and wait for its swap-in: ``(common block ids, matched tokens, hit information)``.

        A request that the ledger refuses for what it is (a token below 0 outside its images, an image that does not fit
        in its prompt) is told in the log and runs uncached: it matches nothing, and ``update_cache_blocks`` leaves it
        out. FastDeploy's schedulers would try it again for ever, and nothing behind it.

        Raises:
            OutOfBlocks: there is no room for what would have to be swapped in; nothing is pinned. After this and any
                other error ``task.cached_block_num`` is 0, so the scheduler can clean up and try again.
        """
        self._expect_block_size(block_size)
        task.cached_block_num = 0  # FastDeploy's clean-up after an error reads it, and a new request has none
        self._restart(task.request_id)
        try:
            tokens = tokens_of(task)
            match = self._match(task.request_id, tokens, items_of(task), block_size)
        except (InvalidTokens, InvalidCommand) as error:
            self._run_uncached(task.request_id, [], error)
            return [], 0, _hits(0, 0, block_size)
        common = self._settled(task.request_id)
        task.cached_block_num = len(common)
        gpu, cpu = self._count_hits(task.request_id, match, len(common), len(tokens))
        return common, gpu + cpu, _hits(gpu, cpu, block_size)

    @own
    def request_block_ids(
        self, task: Any, block_size: int, dec_token_num: int, *args: Any
    ) -> tuple[list[int], list[int], dict[str, int]]:
        """Match, allocate and cache in one call: ``(common block ids, own block ids, hit information)``.

        A request that the ledger refuses for what it is runs uncached, see :meth:`request_match_blocks`.

        Raises:
            OutOfBlocks: nothing is pinned.
        """
        self._expect_block_size(block_size)
        req_id = task.request_id
        self._restart(req_id)
        blocks = (len(task.prompt_token_ids) + block_size - 1 + dec_token_num) // block_size
        try:
            tokens = tokens_of(_Prompt(task.prompt_token_ids))
            match = self._match(req_id, tokens, [], block_size, blocks)
        except (InvalidTokens, InvalidCommand) as error:
            self._run_uncached(req_id, self._raw.allocate(blocks), error)
            self._set_gauges()
            return [], list(self._uncached[req_id]), _hits(0, 0, block_size)
        self._settled(req_id)
        common = self._manager.cached_blocks(req_id)
        if common < len(match[0]) + len(match[2]):  # a swap-in failed: what it should have brought is computed
            try:
                self._manager.allocate({req_id: blocks - len(self._request(req_id).table)})
            except OutOfBlocks:
                self._release(req_id)
                raise
            self._settled(req_id)
        table = self._settled(req_id)
        gpu, cpu = self._count_hits(req_id, match, common, len(tokens))
        self._cache(req_id, table, len(tokens) // block_size, tokens)
        self._set_gauges()
        return table[:common], table[common:], _hits(gpu, cpu, block_size)

    def _restart(self, req_id: str) -> None:
        if req_id in self._live:
            _log.warning("request %r matches again without having been released: it is released now", req_id)
            self._release(req_id)
        self._raw.recycle(self._uncached.pop(req_id, ()))

    def _run_uncached(self, req_id: str, blocks: list[int], error: Exception) -> None:
        """Let a request run whose content cannot be cached; ``blocks`` are freed when it is released."""
        text = printable(str(error))
        _log.error("request %r cannot be cached, and runs uncached: %s", req_id, text)
        self._uncached[req_id] = blocks
        self.metrics.req_count += 1

    def _settled(self, req_id: str) -> list[int]:
        """Wait for the transfers of a request; its block table. If they do not end, it holds nothing any more."""
        if not self._manager.ready(req_id):
            try:
                self._manager.wait(req_id)
            except TimeoutError:
                self._release(req_id)
                raise
        table: list[int] = self._manager.block_table(req_id).tolist()
        return table

    def _count_hits(self, req_id: str, match: Match, common: int, tokens: int) -> tuple[int, int]:
        """Tokens found on the device and on the host, also counted in the metrics."""
        gpu = min(match[4], common * self._block_size)
        cpu = min(match[5], common * self._block_size - gpu)
        self.metrics.req_count += 1
        if common:
            self.metrics.hit_req_count += 1
        self.metrics.calculate_hit_metrics(req_id, cpu, gpu, tokens)
        self.metrics.update_history_hit_metrics()
        if self.metrics.req_count % _RESET_METRICS_EVERY == 0:
            self.metrics.reset_metrics()
        return gpu, cpu

    def is_chunked_mm_input(self, mm_inputs: Any, matched_token_num: int) -> tuple[bool, int]:
        """Whether a prefix of so many tokens ends inside an image, and inside which."""
        return item_around(mm_inputs, matched_token_num)

    # Caching

    @own
    def update_cache_blocks(self, task: Any, block_size: int, num_computed_tokens: int) -> None:
        """Cache the full blocks that the step being scheduled will have computed.

        They can be matched at once. They are copied out only when a later call, or the release, has shown that the step
        has run. What follows a generated token that is none (below 0) is not cached; the log tells it.
        """
        try:
            self.mm_build_path(task, num_computed_tokens, block_size, None, 0)
        except InvalidTokens as error:
            _log.error("request %r caches nothing more: %s", task.request_id, printable(str(error)))
        if task.request_id not in self._uncached:
            task.cached_block_num = self._manager.cached_blocks(task.request_id)

    @own
    def mm_build_path(
        self, request: Any, num_computed_tokens: int, block_size: int, last_node: Any, num_cached_tokens: int
    ) -> BlockNode:
        """Cache the request's ``block_tables`` as far as so many tokens fill blocks; returns the last node.

        ``last_node`` and ``num_cached_tokens`` are known to the ledger.
        """
        self._expect_block_size(block_size)
        if request.request_id in self._uncached:
            return root_view(self._manager.state)
        blocks = num_computed_tokens // block_size
        known = self._live_request(request.request_id).tokens // block_size
        tokens = tokens_of(request) if blocks > known else None
        return self._cache(request.request_id, request.block_tables, blocks, tokens)

    @own
    def build_path(
        self,
        req_id: str,
        current_time: float,
        input_ids: Any,
        left_input_ids: Any,
        gpu_block_ids: Sequence[int],
        block_size: int,
        last_node: Any,
        reverved_dec_block_num: int,
    ) -> BlockNode:
        """Give a matched request ``gpu_block_ids`` and cache its full blocks; returns the last node."""
        self._expect_block_size(block_size)
        tokens = tokens_of(_Prompt(input_ids))
        table = self._request(req_id).table.tolist()
        table += [block for block in gpu_block_ids if block in self._raw]
        self._raw.move(req_id, table[len(self._request(req_id).table) :])
        return self._cache(req_id, table, len(tokens) // block_size, tokens)

    def _cache(self, req_id: str, table: Sequence[int], blocks: int, tokens: npt.NDArray[np.int32] | None) -> BlockNode:
        live = self._live_request(req_id)
        request = self._request(req_id)
        have = len(request.table)
        content = live.tokens if tokens is None else max(live.tokens, len(tokens))
        if blocks > content // self._block_size:
            raise InvalidCommand(f"request {req_id} has {content} tokens, which do not fill {blocks} blocks")
        if blocks > have:
            new = list(map(int, table[have:blocks]))
            if len(new) < blocks - have or not self._raw.has(new):
                wrong = [block for block in new if block not in self._raw]
                raise InvalidCommand(
                    f"{blocks} blocks of request {req_id} are to be cached: blocks {wrong[:8]} were not allocated, "
                    f"or its block table of {len(table)} is too short"
                )
            self._raw.move(req_id, new)
        elif blocks <= request.leaf.end and request.computed == ALL:
            return leaf_view(self._manager.state, request.leaf)  # it has cached nothing itself, and does not now
        generated = None
        if tokens is not None and len(tokens) > live.tokens:
            generated = tokens[live.tokens :]
        self._manager.cache(req_id, max(blocks, request.leaf.end), generated=generated, computed=live.scheduled)
        known = live.tokens if generated is None or tokens is None else len(tokens)
        self._live[req_id] = live._replace(tokens=known, scheduled=request.leaf.end)
        return leaf_view(self._manager.state, request.leaf)

    def _live_request(self, req_id: str) -> Live:
        live = self._live.get(req_id)
        if live is None:
            raise InvalidCommand(f"request {req_id} has not been matched, or was released")
        return live

    # Releasing and freeing

    @own
    def release_block_ids(self, task: Any) -> None:
        """End a request: what it cached stays until it is evicted. An unknown request is reported, nothing else."""
        if task.request_id in self._uncached:
            self._raw.recycle(self._uncached.pop(task.request_id))
            self._set_gauges()
            return
        if task.request_id not in self._live:
            _log.warning("request %r is released, but holds nothing", task.request_id)
            return
        self._release(task.request_id)
        self._set_gauges()

    def _release(self, req_id: str) -> None:
        self._manager.release(req_id)
        del self._live[req_id]

    def release_block_ids_async(self, task: Any) -> Future[None]:
        """As :meth:`release_block_ids`, in another thread."""
        return self.executor_pool.submit(self.release_block_ids, task)

    def recv_data_transfer_result(self) -> None:
        """Fold the workers' answers in, again and again, until :meth:`close`. Started as a thread by the launch."""
        while not self._stopped.wait(_LOOK_S):
            if self._manager.state.transfers or self.handing_over():
                self.poll()

    # The cache as a whole

    @own
    def reset(self) -> None:
        """Forget everything: every block is free afterwards, and what was live holds nothing any more."""
        loop(self._no_transfers, self._manager.config.transfer_timeout_s)
        for req_id in list(self._live):
            self._release(req_id)
        self._uncached.clear()
        self._raw.release_all()
        self._manager.clear(force=True)
        self.gpu_free_task_future = None
        self._notice_ends()
        self.metrics.reset_metrics()
        self._set_all_gauges()

    def _no_transfers(self) -> bool:
        self._manager.fold()
        return not self._manager.state.transfers

    def clear_prefix_cache(self) -> None:
        """Follow ``prefix_tree_status``: CLEARING → reset → CLEARED, UPDATING → NORMAL. Started as a thread."""
        while not self._stopped.wait(_LOOK_AT_STATUS_S):
            self.follow_status()

    def follow_status(self) -> None:
        """One look at ``prefix_tree_status``: the launch's signal, or one that the engine has assigned."""
        if self.prefix_tree_status_signal is None:
            return
        status = self.prefix_tree_status_signal.value
        if status[0] == PrefixTreeStatus.CLEARING:
            self.reset()
            status[0] = PrefixTreeStatus.CLEARED
        elif status[0] == PrefixTreeStatus.UPDATING:
            status[0] = PrefixTreeStatus.NORMAL

    # Processes

    def launch_cache_manager(
        self,
        cache_config: Any,
        tensor_parallel_size: int,
        device_ids: Sequence[int],
        pod_ip: str,
        engine_worker_queue_port: object,
        ipc_suffix: object,
        create_cache_tensor: bool,
    ) -> list[Any]:
        """Make the pools, start one transfer worker per rank, and wait until all of them are ready.

        Without ``cache_config.kv_backend`` nothing is copied, so there are no pools and no workers. Where the engine
        has made ``cache_ready_signal`` and ``create_cache_tensor`` is false, first waits for its model runners to make
        the KV tensors. Returns one handle per process.

        Raises:
            RuntimeError: requests are being served already, or the pusher of a split instance did not start.
            workers.WorkerFailed: with the rank and the reason.
            TimeoutError: the KV tensors are not there in time.
        """
        processes: list[Any] = []
        with self.request_release_lock:
            self._expect_unused()
            self._manager.adopt_thread()
            if self.enable_splitwise:
                shapes = self._get_kv_cache_shape(cache_config.total_block_num)
                pushers = self.launch_cache_messager(
                    cache_config,
                    tensor_parallel_size,
                    device_ids,
                    *shapes,
                    pod_ip,
                    engine_worker_queue_port,
                    ipc_suffix,
                )
                if pushers is None:
                    raise RuntimeError(f"the pusher did not start: {self.pusher_failure or 'see its log'}")
                processes += pushers
            launched = self._board(engine_worker_queue_port, tensor_parallel_size)
            try:
                launched.wait_for_tensors(create_cache_tensor, self.ready_timeout_s)
                self._open_pools(launched.layout(cache_config, self._block_bytes(cache_config)))
                launched.ready()
                self.launched = launched
                self.cache_ready_signal = launched.cache_ready_signal
                self.swap_space_ready_signal = launched.swap_space_ready_signal
                self.prefix_tree_status_signal = launched.prefix_tree_status_signal
                self.shm_cache_task_flag_broadcast = launched.shm_cache_task_flag_broadcast
            except BaseException:
                launched.close()
                self._signals = None
                self._reopen()
                raise
        for target in (self.recv_data_transfer_result, self.clear_prefix_cache):
            thread = threading.Thread(target=target, daemon=True)
            launched.threads.append(thread)
            thread.start()
        return processes + launched.workers(self._manager)


class _Prompt(NamedTuple):
    """A prompt without a request."""

    prompt_token_ids: Any


def _hits(gpu: int, cpu: int, block_size: int) -> dict[str, int]:
    return {
        "gpu_cache_blocks": gpu // block_size,
        "cpu_cache_blocks": cpu // block_size,
        "gpu_match_token_num": gpu,
        "cpu_match_token_num": cpu,
    }
