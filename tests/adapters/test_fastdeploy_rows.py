"""The behaviours that FastDeploy's own manager tests pin, row by row, through the drop-in's public names.

A row that edits the original's internals by hand is tested by what it is about. The rows' numbers are those of the
specification that the drop-in follows.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipc.names import SHM
from ipc.processes import start_time
from kvledger import OutOfBlocks
from kvledger.adapters.fastdeploy import (
    BlockNode,
    CacheStatus,
    EngineCacheQueue,
    IPCSignal,
    PrefixCacheManager,
    PrefixTreeStatus,
    main_process_metrics,
)
from kvledger.adapters.fastdeploy.launch import envs
from tests.adapters.fastdeploy_engine import config, finish, manager, port, request, serve
from tests.processes import alive
from tests.waiting import PATIENCE_S, wait_until
from workers import WorkerFailed


def launch(it: PrefixCacheManager, tp: int = 1, suffix: Any = None, create: bool = True) -> list[Any]:
    return it.launch_cache_manager(it.cache_config, tp, list(range(tp)), "127.0.0.1", suffix or port(), "", create)


def test_row_01_allocate_and_recycle_gpu_blocks_update_metrics() -> None:
    with manager(4) as it:
        assert it.allocate_gpu_blocks(2) == [0, 1]
        assert it.available_gpu_resource == pytest.approx(0.5)
        it.recycle_gpu_blocks([0, 1])
        assert len(it.gpu_free_block_list) == 4
        assert main_process_metrics.free_gpu_block_num.value == 4
        assert main_process_metrics.available_gpu_resource.value == pytest.approx(1.0)


def test_row_02_the_old_scheduler_has_the_prefill_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "ENABLE_V1_KVCACHE_SCHEDULER", 0, raising=False)
    with manager(8, prefill_kvcache_block_num=3) as it:
        assert it.num_gpu_blocks == 3 and len(it.gpu_free_block_list) == 3


def test_row_03_can_allocate_counts_what_prefix_caching_can_free() -> None:
    with manager(4) as it:
        serve(it, "a", list(range(8)))
        assert len(it.gpu_free_block_list) == 0
        assert it.can_allocate_gpu_blocks(1) and it.can_allocate_gpu_blocks(4) and not it.can_allocate_gpu_blocks(5)
        assert not it.can_allocate_gpu_blocks(1, try_free_gpu_blocks=False)
        assert len(it.allocate_gpu_blocks(1)) == 1


def test_row_04_check_validity_raises() -> None:
    with manager(4) as it:
        it.allocate_gpu_blocks(2)
        with pytest.raises(OutOfBlocks):
            it._check_validity("req-1", match_gpu_blocks_num=0, expected_block_num=3)
        it._check_validity("req-1", match_gpu_blocks_num=1, expected_block_num=3)


def mixed(it: PrefixCacheManager) -> None:
    """[1, 2] on the device, [3, 4] and [5, 6] behind it on the host."""
    serve(it, "first", [1, 2, 3, 4, 5, 6])
    it.free_block_ids(2)
    assert [node.cache_status.name for node in it.node_map.values()].count("CPU") == 2


def test_row_05_room_is_prepared_for_host_hits_and_for_the_rest() -> None:
    with manager(8, 4) as it:
        mixed(it)
        common, unique, _ = it.request_block_ids(request("b", [1, 2, 3, 4, 5, 6, 7, 8]), 2, 0)
        assert len(common) == 3 and len(unique) == 1  # one was there, two were received, one is extra


def test_row_06_request_block_ids_combines_device_host_and_new() -> None:
    with manager(8, 4) as it:
        serve(it, "first", [1, 2, 3, 4])
        it.free_block_ids(1)
        common, unique, hit = it.request_block_ids(request("req-2", [1, 2, 3, 4, 5]), 2, dec_token_num=2)
        assert len(common) == 2 and len(unique) == 2 and len({*common, *unique}) == 4
        assert (hit["gpu_cache_blocks"], hit["cpu_cache_blocks"]) == (1, 1)
        assert (hit["gpu_match_token_num"], hit["cpu_match_token_num"]) == (2, 2)
        assert it.req_leaf_map["req-2"].block_id == common[1]
        assert it.metrics.hit_req_count == 1
        it.release_block_ids(request("req-2", []))
        assert it.manager.available_blocks() == 8  # reserved decode blocks go with the request


def test_row_07_request_match_blocks_raises_when_host_hits_do_not_fit() -> None:
    with manager(4, 4) as it:
        serve(it, "a", [1, 2])
        it.free_block_ids(1)
        held = it.allocate_gpu_blocks(4)
        with pytest.raises(OutOfBlocks):
            it.request_match_blocks(request("b", [1, 2, 3]), 2)
        assert "b" not in it.req_leaf_map
        it.recycle_gpu_blocks(held)
        assert it.request_match_blocks(request("b", [1, 2, 3]), 2)[1] == 2


def test_row_08_numpy_prompt_list_output_and_the_reset_of_the_metrics() -> None:
    with manager() as it:
        it.metrics.req_count = 9999
        common, tokens, hit = it.request_match_blocks(request("a", np.array([1, 2, 3]), [4]), 2)
        assert (common, tokens, hit["gpu_cache_blocks"]) == ([], 0, 0)
        assert it.metrics.req_count == 0 and it.metrics.total_token_num == 0


def test_row_09_get_required_block_num_rounds_up() -> None:
    with manager() as it:
        assert [it.get_required_block_num(tokens, 4) for tokens in (0, 7, 8)] == [0, 2, 2]


def test_row_10_launch_starts_a_worker_per_rank_even_without_host_blocks() -> None:
    for tp in (1, 2):
        with PrefixCacheManager(config(), tp) as it:
            handles = launch(it, tp)
            processes = [(handle.pid, start_time(handle.pid)) for handle in handles]
            assert len(processes) == tp and all(alive(*process) for process in processes)
            assert all(handle.poll() is None for handle in handles)
        assert not any(alive(*process) for process in processes)


def test_row_11_a_split_instance_launches_its_pusher_once() -> None:
    calls = []

    class Split(PrefixCacheManager):
        def launch_cache_messager(self, *args: Any, **kwargs: Any) -> list[Any]:
            calls.append(args)
            return ["pusher"]

    with Split(config(), 1, "decode") as it:
        handles = launch(it)
        assert len(calls) == 1 and handles[0] == "pusher" and len(handles) == 2


def test_row_12_a_pusher_that_fails_fails_the_launch() -> None:
    class Split(PrefixCacheManager):
        def launch_cache_messager(self, *args: Any, **kwargs: Any) -> None:
            return None

    with Split(config(), 1, "decode") as it:
        with pytest.raises(RuntimeError, match="pusher"):
            launch(it)
        assert it.launched is None


def test_row_13_launch_waits_for_the_tensors_then_for_the_swap_space() -> None:
    suffix = port()
    ready = IPCSignal("cache_ready_signal", np.zeros(1), np.int32, suffix)  # the engine has made it
    seen = []
    try:
        with PrefixCacheManager(config(8, 2), 1) as it:

            def runner() -> None:
                wait_until("the launch makes its signals", (SHM / f"swap_space_ready_signal.{suffix}").exists)
                seen.append(it.launched)
                ready.value[0] = 1  # the model runner has made the KV tensors

            thread = threading.Thread(target=runner)
            thread.start()
            handles = launch(it, 1, suffix, create=False)
            thread.join()
            assert seen == [None] and len(handles) == 1
            assert it.swap_space_ready_signal.value.tolist() == [1] == it.cache_ready_signal.value.tolist()
            assert it.launched is not None and len(it.launched.threads) == 2
            assert all(thread.is_alive() for thread in it.launched.threads)
    finally:
        ready.clear()


def test_row_13_launch_gives_up_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    suffix = port()
    ready = IPCSignal("cache_ready_signal", np.array([1, 0]), np.int32, suffix)
    try:
        with PrefixCacheManager(config(8, 2), 2) as it:
            it.ready_timeout_s = 0.05
            with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
                launch(it, 2, suffix, create=False)
            it.ready_timeout_s = 60.0
            monkeypatch.setattr("workers.processes.programs.sys.executable", "/bin/false")
            with pytest.raises(WorkerFailed, match="exit status 1"):
                launch(it, 2, suffix)
            monkeypatch.undo()
            assert len(launch(it, 2, suffix)) == 2  # nothing is in the way of another try
    finally:
        ready.clear()


def launch_pusher(it: PrefixCacheManager, tp: int, suffix: str) -> list[Any] | None:
    shapes = it._get_kv_cache_shape(it.num_gpu_blocks)
    return it.launch_cache_messager(it.cache_config, tp, list(range(tp)), *shapes, "127.0.0.1", suffix, "")


def test_row_14_launch_cache_messager_waits_for_ready_signal() -> None:
    suffix = port()
    ready = IPCSignal("cache_ready_signal", np.zeros(2), np.int32, suffix)  # the engine has made it
    try:
        with PrefixCacheManager(config(), 2, "prefill") as it:
            handles = launch_pusher(it, 2, suffix)
            assert handles is not None and ready.value.tolist() == [1, 1] == it.cache_ready_signal.value.tolist()
            processes = [(handle.pid, start_time(handle.pid)) for handle in handles]
            assert len(processes) == 2 and all(alive(*process) for process in processes)
            all_of_them = launch(it, 2, suffix)  # goes on with the pools and the pushers that are there
            assert len(all_of_them) == 4 and [handle.pid for handle in all_of_them[:2]] == [pid for pid, _ in processes]
        assert not any(alive(*process) for process in processes)
    finally:
        ready.clear()


def test_row_15_launch_cache_messager_returns_none_when_process_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with PrefixCacheManager(config(), 1, "prefill") as it:
        monkeypatch.setattr("workers.handoff.pusher.PROGRAM", ("-c", "raise SystemExit(2)"))
        assert launch_pusher(it, 1, port()) is None
        assert "rank 0 did not start: exit status 2" in it.pusher_failure and it.pusher_failure in caplog.text
        with pytest.raises(RuntimeError, match=r"pusher did not start: .*exit status 2"):
            launch(it)
        monkeypatch.undo()
        assert len(launch(it)) == 2  # nothing is in the way of another try


def test_row_16_the_shapes_of_keys_and_values_reach_the_pools() -> None:
    class Backend:
        value: tuple[int, ...] | None = (1, 2, 3)

        def __init__(self, config: Any, **heads: int) -> None: ...

        def get_kv_cache_shape(self, max_num_blocks: int, kv_cache_quant_type: str | None) -> Any:
            return (max_num_blocks, 4), self.value

    settings = config(8, 2, bytes_per_layer_per_block=0)
    for value, items in (((1, 2, 3), 4 + 6), (None, 4)):  # MLA has no value cache
        Backend.value = value
        with PrefixCacheManager(settings, 1, attention_backend=Backend) as it:
            launch(it)
            layout = it.manager.pools[0].layout
            assert (layout.block_bytes, layout.layers) == (2 * items + -2 * items % 8, 2)


def test_row_17_update_cache_config_resizes_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    with manager(4, cpu=3, launch=False) as it:
        it.update_cache_config(SimpleNamespace(total_block_num=6, prefill_kvcache_block_num=2))
        assert it.num_gpu_blocks == 6 == len(it.gpu_free_block_list)
        monkeypatch.setattr(envs, "ENABLE_V1_KVCACHE_SCHEDULER", 0, raising=False)
        it.update_cache_config(SimpleNamespace(total_block_num=6, prefill_kvcache_block_num=2))
        assert it.num_gpu_blocks == 2 == len(it.gpu_free_block_list) and it.num_cpu_blocks == 3
        assert main_process_metrics.max_gpu_block_num.value == 2


def test_row_18_host_blocks_are_taken_and_given_back() -> None:
    with manager(4, 3) as it:
        before = len(it.cpu_free_block_list)
        serve(it, "a", [1, 2, 3, 4])
        it.free_block_ids(2)
        assert len(it.cpu_free_block_list) == before - 2
        assert it.free_cpu_block_ids(2) == 2 and len(it.cpu_free_block_list) == before


def stopped(it: PrefixCacheManager, signal: int) -> None:
    for handle in it.launched.workers(it.manager):  # type: ignore[union-attr]
        os.kill(handle.pid, signal)  # type: ignore[arg-type]


def test_row_19_issue_swap_task_waits_and_leaves_no_event() -> None:
    with manager(8, 4) as it:
        mixed(it)
        gpu, cpu, nodes, leaf, *_ = it.match_block("b", [1, 2, 3, 4, 5, 6], 2)
        it.issue_swap_task("b", nodes, gpu, cpu, CacheStatus.SWAP2GPU, True)
        assert it.task_swapping_event == {} and leaf.cache_status == CacheStatus.GPU


def test_row_20_a_host_hit_orders_one_swap_of_its_blocks() -> None:
    with manager(8, 4) as it, EngineCacheQueue(it.ledger) as queue:
        mixed(it)
        while queue.get_transfer_task()[0] is not None:
            pass
        task = request("b", [1, 2, 3, 4, 5, 6])
        common, *_ = it.request_match_blocks(task, 2)
        ordered, read = queue.get_transfer_task()
        assert read and ordered is not None
        nodes, gpu, cpu, kind, _ = ordered
        assert kind == CacheStatus.SWAP2GPU and gpu == common[1:] and len(cpu) == 2
        assert nodes == [it.req_leaf_map["b"].parent.node_id, it.req_leaf_map["b"].node_id]
        assert queue.empty()


def test_row_21_update_cache_blocks_refreshes_the_mappings() -> None:
    with manager() as it:
        task = request("a", [1, 2, 3, 4, 5, 6])
        it.request_match_blocks(task, 2)
        task.block_tables = it.allocate_gpu_blocks(3)
        before = it.req_leaf_map["a"]
        it.update_cache_blocks(task, 2, 4)
        leaf = it.req_leaf_map["a"]
        assert before.block_id == -1 and leaf.block_id == task.block_tables[1]
        assert it.leaf_req_map == {leaf: {"a"}} and it.cache_info["a"] == (leaf, 4) and task.cached_block_num == 2


def test_row_22_is_chunked_mm_input_detects_overlap() -> None:
    with manager() as it:
        inputs = {"mm_positions": [SimpleNamespace(offset=2, length=3)], "mm_hashes": ["x"]}
        assert it.is_chunked_mm_input(inputs, 3) == (True, 0)
        assert it.is_chunked_mm_input(inputs, 2) == (False, 0) == it.is_chunked_mm_input(None, 3)
        assert it.is_chunked_mm_input(inputs, 5) == (False, 0)


def test_row_23_a_swap_is_issued_now_and_waited_for_later() -> None:
    with manager(8, 4) as it:
        mixed(it)
        gpu, cpu, nodes, leaf, *_ = it.match_block("b", [1, 2, 3, 4, 5, 6], 2)
        it.issue_swap_task("b", nodes, gpu, cpu, CacheStatus.SWAP2GPU, is_sync=False)
        assert list(it.task_swapping_event) == ["b"]
        it.sync_swap_task("b")
        assert it.task_swapping_event == {} and leaf.has_in_gpu


def test_row_24_release_frees_the_blocks_of_a_request_that_cached_nothing() -> None:
    with manager() as it:
        it.request_block_ids(request("a", [1]), 2, dec_token_num=2)
        assert it.req_leaf_map["a"].node_id == it.radix_tree_root.node_id
        assert len(it.unfilled_req_block_map["a"]) == 2
        it.release_block_ids(request("a", [1]))
        assert it.unfilled_req_block_map == {} and len(it.gpu_free_block_list) == 8


def test_row_25_free_nodes_directly_frees_a_leaf() -> None:
    with manager() as it:
        it.request_block_ids(request("a", [1, 2]), 2, dec_token_num=4)
        leaf = it.req_leaf_map["a"]
        it.free_nodes_directly(leaf)
        assert len(it.node_map) == 1  # somebody uses it
        it.release_block_ids(request("a", [1, 2]))
        assert len(it.gpu_free_block_list) == 7  # the reserved blocks are free
        it.free_nodes_directly(leaf)
        assert len(it.gpu_free_block_list) == 8 and not it.node_map


def test_row_26_match_block_moves_host_nodes_to_swap() -> None:
    import signal

    with manager(8, 4) as it:
        mixed(it)
        stopped(it, signal.SIGSTOP)
        gpu, cpu, nodes, leaf, gpu_tokens, cpu_tokens = it.match_block("b", [1, 2, 3, 4, 5, 6, 7], 2)
        assert (len(gpu), len(cpu), len(nodes), gpu_tokens, cpu_tokens) == (1, 2, 2, 2, 4)
        assert nodes == [leaf.parent.node_id, leaf.node_id] and leaf.cache_status == CacheStatus.SWAP2GPU
        assert it.match_block("b", [1, 2, 3, 4, 5, 6, 7], 2)[:3] == (gpu, cpu, nodes)
        stopped(it, signal.SIGCONT)
        wait_until("the leaf is on the GPU", lambda: leaf.cache_status == CacheStatus.GPU)


def test_row_27_build_path_extends_the_tree() -> None:
    with manager() as it:
        *_, last, _, _ = it.match_block("a", [1, 2, 3], 2)
        blocks = it.allocate_gpu_blocks(2)
        leaf = it.build_path("a", 0.0, [1, 2, 3], [1, 2, 3], blocks, 2, last, 0)
        assert leaf.block_id == 0 and leaf.parent.node_id == last.node_id == -1
        assert it.unfilled_req_block_map["a"] == [1]


def test_row_28_without_host_blocks_freed_nodes_are_dropped() -> None:
    with manager() as it:
        serve(it, "a", [1, 2])
        it.free_block_ids_async(1)
        assert 0 in it.gpu_free_block_list and not it.node_map and it.gpu_free_task_future is None


def test_row_29_with_host_blocks_freed_nodes_are_swapped_out() -> None:
    with manager(8, 4) as it, EngineCacheQueue(it.ledger) as queue:
        serve(it, "a", [1, 2])
        it.free_block_ids_async(1)
        ordered, _ = queue.get_transfer_task()
        assert ordered is not None and ordered[1] == [0] and ordered[3] == CacheStatus.SWAP2CPU
        wait_until("all blocks are free", lambda: len(it.gpu_free_block_list) == 8)
        assert [node.cache_status for node in it.node_map.values()] == [CacheStatus.CPU]


def with_image(req_id: str, prompt: Any, name: str, offset: int, length: int) -> SimpleNamespace:
    positions = [SimpleNamespace(offset=offset, length=length)]
    return request(req_id, prompt, multimodal_inputs={"mm_positions": positions, "mm_hashes": [name]})


def test_row_30_mm_match_block_tells_images_apart() -> None:
    with manager(8, 4) as it:
        task = with_image("a", [1, 2, 9, 9], "img", 2, 2)
        it.request_match_blocks(task, 2)
        task.block_tables = it.allocate_gpu_blocks(2)
        it.update_cache_blocks(task, 2, 4)
        finish(it, task)
        it.free_block_ids(1)
        gpu, cpu, nodes, leaf, gpu_tokens, cpu_tokens = it.mm_match_block(with_image("b", [1, 2, 9, 9], "img", 2, 2), 2)
        assert (len(gpu), len(cpu), nodes, gpu_tokens, cpu_tokens) == (1, 1, [leaf.node_id], 2, 2)
        assert it.mm_match_block(with_image("c", [1, 2, 9, 9], "other", 2, 2), 2)[4:] == (2, 0)
        assert it.mm_match_block(request("d", [1, 2, 9, 9]), 2)[4:] == (2, 0)


def test_row_31_request_match_blocks_updates_metrics() -> None:
    with manager(8, 4) as it:
        serve(it, "a", [1, 2, 3, 4])
        it.free_block_ids(1)
        common, tokens, hit = it.request_match_blocks(request("b", [1, 2, 3, 4]), 2)
        assert common[0] == 0 and tokens == 4
        assert (hit["gpu_cache_blocks"], hit["cpu_cache_blocks"]) == (1, 1)
        assert it.metrics.hit_req_count == 1 and it.metrics.req_count == 2
        assert main_process_metrics.hit_req_rate.value == 0.5
        assert main_process_metrics.gpu_hit_token_rate.value == main_process_metrics.cpu_hit_token_rate.value == 0.25


def test_row_32_release_cleans_the_request_state() -> None:
    with manager() as it:
        task = serve(it, "a", [1, 2, 3, 4], release=False)
        assert "a" in it.req_leaf_map
        it.release_block_ids(task)
        assert "a" not in it.req_leaf_map and not it.leaf_req_map and not it.cache_info
        future = it.release_block_ids_async(serve(it, "b", [1, 2, 3, 4], release=False))
        assert future.result(timeout=PATIENCE_S) is None and "b" not in it.req_leaf_map


def test_row_33_free_cpu_block_ids_evicts_and_counts() -> None:
    with manager(8, 4) as it:
        assert it.free_cpu_block_ids(1) == 0
        mixed(it)
        assert it.free_cpu_block_ids(1) == 1 and len(it.node_map) == 2
        assert it.free_cpu_block_ids(5) == 1


def test_row_34_free_nodes_directly_recovers_a_chain() -> None:
    with manager() as it:
        first = serve(it, "a", [1, 2, 3, 4])
        serve(it, "b", [1, 2, 5, 6])
        serve(it, "c", [1, 2])  # the parent is a run of its own
        leaves = [node for node in it.node_map.values() if not node.children]
        assert len(leaves) == 2
        it.free_nodes_directly(leaves[0])
        assert len(it.node_map) == 2  # the parent leads somewhere else
        it.free_nodes_directly(leaves[1])
        assert first.block_tables[0] in it.gpu_free_block_list and not it.node_map


def test_row_35_while_blocks_are_being_freed_nothing_more_is_begun() -> None:
    import signal

    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        stopped(it, signal.SIGSTOP)
        it.free_block_ids_async(1)
        pending = it.gpu_free_task_future
        it.free_block_ids_async(2)
        assert pending is not None and it.gpu_free_task_future is pending and not pending.done()
        assert len(it.manager.state.transfers) == 1
        stopped(it, signal.SIGCONT)
        wait_until("what is pending is done", pending.done)


def test_row_36_a_finished_future_is_collected() -> None:
    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids_async(1)
        assert it.gpu_free_task_future is not None
        wait_until("blocks have been freed", it.gpu_free_task_future.done)
        it.free_block_ids_async(0)
        assert it.gpu_free_task_future is None and len(it.gpu_free_block_list) == 5


def test_row_37_a_block_with_an_image_is_not_the_plain_block() -> None:
    with manager(disable_chunked_mm_input=True) as it:
        serve(it, "a", [1, 2, 3, 4])
        assert it.mm_match_block(with_image("b", [1, 2, 3, 4], "img", 1, 3), 2)[0] == []


def test_row_38_mm_build_path_creates_new_nodes() -> None:
    with manager() as it:
        task = request("a", [1, 2, 3, 4], multimodal_inputs={"mm_positions": [], "mm_hashes": []})
        *_, last, _, _ = it.mm_match_block(task, 2)
        task.block_tables = it.allocate_gpu_blocks(2)
        leaf = it.mm_build_path(task, 4, 2, last, 0)
        assert leaf.node_id != it.radix_tree_root.node_id and leaf.depth == 2
        assert it.mm_build_path(task, 4, 2, leaf, 4) == leaf  # nothing to add


def test_row_39_the_status_follows_the_swaps() -> None:
    import signal

    with manager(8, 4) as it:
        serve(it, "a", [1, 2])
        (node,) = it.node_map.values()
        statuses = [node.cache_status]
        stopped(it, signal.SIGSTOP)
        it.free_block_ids_async(1)
        statuses.append(node.cache_status)
        stopped(it, signal.SIGCONT)
        wait_until("the node is on the CPU", lambda: node.cache_status == CacheStatus.CPU)
        stopped(it, signal.SIGSTOP)
        it.match_block("b", [1, 2, 3], 2)
        statuses.append(node.cache_status)
        stopped(it, signal.SIGCONT)
        wait_until("the node is on the GPU", lambda: node.cache_status == CacheStatus.GPU)
        assert [status.name for status in statuses] == ["GPU", "SWAP2CPU", "SWAP2GPU"]
        it.recycle_gpu_blocks([7, 99])  # free, and out of range
        assert it.dropped_recycles == 2 and len(it.gpu_free_block_list) == 7


def test_row_40_reset_clears_the_internal_state() -> None:
    with manager(8, 4) as it:
        mixed(it)
        serve(it, "b", [7, 8], release=False)
        it.allocate_gpu_blocks(2)
        it.free_block_ids_async(1)
        it.reset()
        assert not it.node_map and not it.req_leaf_map and it.gpu_free_task_future is None
        assert (
            len(it.gpu_free_block_list) == 8 and len(it.cpu_free_block_list) == 5
        )  # one of them for copies in transit
        assert it.request_match_blocks(request("c", [1, 2, 3, 4]), 2)[1] == 0


def test_row_41_the_receiver_hears_the_end_of_a_swap() -> None:
    with manager(8, 4) as it:
        mixed(it)
        gpu, cpu, nodes, *_ = it.match_block("b", [1, 2, 3, 4, 5, 6], 2)
        it.issue_swap_task("task", nodes, gpu, cpu, CacheStatus.SWAP2GPU, is_sync=False)
        assert it.task_swapping_event["task"].wait(PATIENCE_S)  # set by the thread that the launch started
        assert "task" in it.task_swapping_event
        it.sync_swap_task("task")


def test_row_42_clearing_follows_the_status_signal() -> None:
    with manager(8, 4) as it:
        serve(it, "a", [1, 2])
        status = it.prefix_tree_status_signal.value
        status[0] = PrefixTreeStatus.CLEARING
        wait_until("the tree is cleared", lambda: status[0] == PrefixTreeStatus.CLEARED)
        assert not it.node_map and len(it.gpu_free_block_list) == 8
        serve(it, "b", [1, 2])
        status[0] = PrefixTreeStatus.UPDATING
        wait_until("the tree is as usual", lambda: status[0] == PrefixTreeStatus.NORMAL)
        assert len(it.node_map) == 1


def test_row_43_a_match_that_would_end_in_an_image_ends_before_it() -> None:
    for disabled, tokens in ((False, 4), (True, 2)):
        with manager(disable_chunked_mm_input=disabled) as it:
            task = with_image("a", [1, 2, 9, 9, 9, 9], "img", 3, 3)
            it.request_match_blocks(task, 2)
            task.block_tables = it.allocate_gpu_blocks(3)
            it.update_cache_blocks(task, 2, 4)
            match = it.mm_match_block(with_image("b", [1, 2, 9, 9, 9, 9], "img", 3, 3), 2)
            assert match[4] == tokens == match[3].depth * 2


def test_row_44_get_kv_cache_shape_asks_the_attention_backend() -> None:
    made = {}

    class Backend:
        def __init__(self, config: Any, **arguments: int) -> None:
            made.update(arguments)

        def get_kv_cache_shape(self, max_num_blocks: int, kv_cache_quant_type: str) -> Any:
            return [max_num_blocks, 2], [3, kv_cache_quant_type]

    settings = config()
    settings.quant_config = SimpleNamespace(kv_cache_quant_type="int8")
    with PrefixCacheManager(settings, 1, attention_backend=Backend) as it:
        assert it._get_kv_cache_shape(5) == ([5, 2], [3, "int8"])
    expected = {"kv_num_heads", "num_heads", "head_dim", "encoder_block_shape_q", "decoder_block_shape_q"}
    assert set(made) == expected
    with PrefixCacheManager(settings, 1) as it:
        assert it._get_kv_cache_shape(5) == ([5, 2, 2, 4], [5, 2, 2, 4])


def test_every_row_has_its_test() -> None:
    rows = {int(number) for number in re.findall(r"def test_row_(\d\d)_", Path(__file__).read_text())}
    assert rows == set(range(1, 45))


def test_the_names_of_a_node() -> None:
    node = BlockNode(1, [1, 2], 0, 1, 5, 2, 7, 1.0, None, cache_status=CacheStatus.GPU)
    other = BlockNode(2, [1, 2], 0, 2, 6, 2, 7, 1.0, node)
    assert other < node and node.has_in_gpu and node.is_gpu_leaf_node and not node.is_cpu_leaf_node
    node.children[7] = other
    assert not node.is_gpu_leaf_node
    node.increment_shared_count()
    node.decrement_shared_count()
    assert node.shared_count == 1
    with manager() as it:
        serve(it, "a", [1, 2, 3, 4], release=False)
        leaf = it.req_leaf_map["a"]
        assert leaf.input_ids == [3, 4] and leaf.token_num == 2 and leaf.req_id_set == {"a"} and leaf.shared_count == 1
        (child,) = it.radix_tree_root.children.values()
        assert child == leaf.parent and next(iter(child.children.values())) == leaf
        assert it.node_map[leaf.node_id] == leaf and len(leaf.hash_value) == 16
        with pytest.raises(AttributeError):
            leaf.block_id = 3
