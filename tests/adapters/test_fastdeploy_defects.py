"""Each defect that was reproduced on FastDeploy's own manager, tried on the drop-in: it is not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvledger import Busy, CacheConfig, CacheManager, HostPolicy, OutOfBlocks
from kvledger.adapters.fastdeploy import BlockNode, CacheStatus, EngineCacheQueue, IPCSignal
from kvledger.adapters.fastdeploy.transfer_queue import OrderedByTheLedger
from statemachine.check import check
from tests.adapters.fastdeploy_engine import finish, manager, port, request, serve
from tests.waiting import PATIENCE_S, wait_until


def sound(it: Any) -> bool:
    """Every block has one owner, every order and pin is right."""
    return not check(it.manager.state)


def cached(it: Any, prompt: Any) -> int:
    """Tokens that would be found."""
    return 2 * sum(it.manager.peek(np.array(prompt, np.int32), max_blocks=len(prompt)))


def test_b1_host_hits_that_do_not_fit_are_refused_at_once() -> None:
    """The original waited for a lock that it held itself."""
    with manager(4, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(4)
        held = it.allocate_gpu_blocks(2)
        with pytest.raises(OutOfBlocks):
            it.request_match_blocks(request("b", list(range(8))), 2)
        it.recycle_gpu_blocks(held)
        assert it.request_match_blocks(request("b", list(range(8))), 2)[1] == 8 and sound(it)


def test_b1b_b4_a_refused_match_pins_nothing_and_can_be_cleaned_up() -> None:
    """There, four nodes kept a reference for ever, and the scheduler's clean-up raised KeyError."""
    with manager(8, 8) as it:
        serve(it, "a", list(range(16)))
        it.free_block_ids(4)
        held = it.allocate_gpu_blocks(4)
        before = it.manager.digest()
        task = request("b", list(range(16)))
        with pytest.raises(OutOfBlocks):
            it.request_match_blocks(task, 2)
        finish(it, task)
        assert len(it.req_leaf_map) == 0 and all(node.shared_count == 0 for node in it.node_map.values())
        assert {node.cache_status for node in it.node_map.values()} == {CacheStatus.GPU, CacheStatus.CPU}
        assert it.manager.digest() == before
        it.recycle_gpu_blocks(held)
        it.free_block_ids(8)
        assert len(it.gpu_free_block_list) == 8 and sound(it)


def test_b2_no_host_block_is_freed_twice() -> None:
    """There, dropping a device node marked it as a host node, and evicting its children freed it again."""
    with manager(8, 4) as it:
        serve(it, "a", list(range(12)))
        it.free_block_ids(2)
        it.free_block_ids(6)  # more than the host has room for: some are dropped
        it.free_cpu_block_ids(8)
        free = it.cpu_free_block_list[:]
        assert sorted(free) == sorted(set(free)) and len(it.gpu_free_block_list) == 8 and sound(it)


def test_b3_two_chunked_prefills_of_one_prefix_lose_nothing() -> None:
    """There, the second overwrote the first in the tree: half of the copy that was kept could not be found."""
    with manager(20) as it:
        prompt = list(range(16))
        tasks = [request(name, prompt) for name in "ab"]
        for task in tasks:
            it.request_match_blocks(task, 2)
        for chunk in range(1, 5):
            for task in tasks:
                task.block_tables += it.allocate_gpu_blocks(2)
                it.update_cache_blocks(task, 2, 4 * chunk)
                assert sound(it)
        assert len(it.node_map) == 8
        for task in tasks:
            finish(it, task)
        assert len(it.gpu_free_block_list) == 12 and cached(it, prompt) == 16
        it.free_block_ids(4)
        assert cached(it, prompt) == 8 and len(it.node_map) == 4 and sound(it)


def test_b5_freeing_a_node_keeps_the_order_of_the_others() -> None:
    with manager(8) as it:
        for number in range(6):
            serve(it, str(number), [10 * number, 1])
        nodes = sorted(it.node_map.values(), key=lambda node: node.input_ids)
        it.free_nodes_directly(nodes[2])
        gone = []
        while it.node_map:
            left = {node.input_ids[0] for node in it.node_map.values()}
            it.free_block_ids(1)
            gone += left - {node.input_ids[0] for node in it.node_map.values()}
        assert gone == [0, 10, 30, 40, 50] and sound(it)


def test_b6_nodes_do_not_share_their_reserved_blocks() -> None:
    first, second = (BlockNode(i, [], 0, 1, i, 2, 0, 0.0) for i in range(2))
    first.reverved_dec_block_ids.append(9)
    assert second.reverved_dec_block_ids == []


def test_b7_superseded_leaves_are_forgotten() -> None:
    """There, each chunk of a prefill left an empty set behind that kept its node and the prompt alive."""
    with manager(40) as it:
        task = request("a", list(range(64)))
        it.request_match_blocks(task, 2)
        for chunk in range(1, 33):
            task.block_tables += it.allocate_gpu_blocks(1)
            it.update_cache_blocks(task, 2, 2 * chunk)
            assert len(it.leaf_req_map) == 1
        finish(it, task)
        assert len(it.leaf_req_map) == 0
        # runs that one request cached chunk by chunk become one again
        assert len(it.manager.state.nodes) == 1


def test_b8_a_release_after_a_reset_is_harmless() -> None:
    with manager(8) as it:
        task = serve(it, "a", list(range(9)), release=False)
        it.reset()
        other = serve(it, "b", list(range(8)), release=False)
        finish(it, task)
        assert it.dropped_recycles == 1 and "b" in it.req_leaf_map and sound(it)
        finish(it, other)
        assert it.manager.available_blocks() == 8


def test_b9_swaps_go_on_after_a_node_is_gone() -> None:
    """There, an answer for a node that was dropped meanwhile ended the receiver: all later swaps hung."""
    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        (pid,) = [handle.pid for handle in it.launched.workers(it.manager)]
        os.kill(pid, signal.SIGSTOP)
        it.free_block_ids_async(4)
        it.manager.adopt_thread()
        it.manager.clear(force=True)
        os.kill(pid, signal.SIGCONT)
        wait_until("all blocks can be allocated", lambda: it.can_allocate_gpu_blocks(8))
        serve(it, "b", list(range(100, 116)))
        it.free_block_ids(8)
        assert it.request_match_blocks(request("c", list(range(100, 116))), 2)[1] == 16 and sound(it)


def test_b10_equal_content_is_equal_whatever_carries_it() -> None:
    """There, the key depended on object identity and on the type of the integers."""
    with manager(16) as it:
        prompt = [1, 2, 3, 4, 1, 2]
        serve(it, "a", prompt)
        carriers: list[Any] = [
            tuple(prompt),
            [np.int64(token) for token in prompt],
            np.array(prompt, np.int32),
            np.array(prompt, np.uint16),
            array("q", prompt),
        ]
        for number, carrier in enumerate(carriers):
            assert serve(it, str(number), carrier).matched == 6
        name = "same"
        tasks = []
        for req_id, names in (("x", [name, name]), ("y", ["".join("same"), "".join(["s", "ame"])])):
            positions = [SimpleNamespace(offset=0, length=2), SimpleNamespace(offset=2, length=2)]
            tasks.append(request(req_id, [9] * 4, multimodal_inputs={"mm_positions": positions, "mm_hashes": names}))
        it.request_match_blocks(tasks[0], 2)
        tasks[0].block_tables = it.allocate_gpu_blocks(2)
        it.update_cache_blocks(tasks[0], 2, 4)
        assert it.request_match_blocks(tasks[1], 2)[1] == 4


def test_b11_with_two_producers_every_rank_gets_every_task_once_and_in_order() -> None:
    with manager(16, 16, tp=2) as it:
        queues = [EngineCacheQueue(it.ledger, num_client=2, client_id=rank) for rank in range(2)]
        for number in range(4):
            serve(it, f"a{number}", list(range(8 * number, 8 * number + 8)))

        def evict() -> None:
            for _ in range(8):
                it.free_block_ids(2)

        thread = threading.Thread(target=evict)
        thread.start()
        for number in range(8):
            task = request(f"b{number}", list(range(8 * (number % 4), 8 * (number % 4) + 8)))
            it.request_match_blocks(task, 2)
            it.release_block_ids(task)
        thread.join()
        seen: list[list[str]] = []
        for queue in queues:
            seen.append([])
            while not queue.empty():
                task, read = queue.get_transfer_task()
                assert read
                seen[-1].append(task[4])
            with pytest.raises(OrderedByTheLedger):
                queue.put_transfer_task(())
            queue.close()
        assert seen[0] == seen[1] and seen[0] == sorted(set(seen[0]), key=int) and len(seen[0]) > 4 and sound(it)


def test_w1_a_copy_that_fails_is_told_and_nobody_waits_for_ever() -> None:
    """There, the engine was blocked for ever while the worker lived."""
    program = """
import sys
from workers import transfer
from workers.pools import numpy as numpy_pools
def broken(pools, direction, sources, targets):
    raise RuntimeError("the device is gone")
numpy_pools.copy_blocks = broken
sys.exit(transfer.main(sys.argv[1:]))
"""
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        return real([command[0], "-c", program, *command[command.index("-m") + 2 :]], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.processes.supervisor.subprocess.Popen", popen)
        with manager(8, 8) as it, EngineCacheQueue(it.ledger) as queue:
            serve(it, "a", list(range(8)))
            it.free_block_ids(4)
            assert queue.get_transfer_done_signal() is not None
            assert len(it.gpu_free_block_list) == 8 and not it.node_map and sound(it)
            assert it.manager.stats()["failed_transfers"] == 1


def test_w2_a_process_that_attached_takes_no_signal_away_when_it_exits() -> None:
    suffix = port()
    one = IPCSignal("prefix_tree_status", np.zeros(1), np.int32, suffix)
    try:
        program = (
            "import sys, numpy as np\n"
            "from kvledger.adapters.fastdeploy import IPCSignal\n"
            "s = IPCSignal('prefix_tree_status', np.zeros(1), np.int32, sys.argv[1], create=False)\n"
            "s.value[0] = -1\n"
        )
        subprocess.run([sys.executable, "-c", program, suffix], check=True, timeout=PATIENCE_S)
        again = IPCSignal("prefix_tree_status", np.zeros(1), np.int32, suffix, create=False)
        assert one.value[0] == again.value[0] == -1
        replaced = IPCSignal("prefix_tree_status", np.zeros(1), np.int32, suffix)
        assert replaced.value[0] == 0
        with pytest.raises(ValueError, match="4 bytes"):
            IPCSignal("prefix_tree_status", np.zeros(64), np.int32, suffix, create=False)
    finally:
        one.clear()


def test_v1a_the_end_of_a_chain_is_evicted_first() -> None:
    """There, the head went first, and what was left could not be found."""
    with manager(8) as it:
        serve(it, "a", list(range(16)))
        for left in range(7, -1, -1):
            it.free_block_ids(1)
            assert cached(it, list(range(16))) == 2 * left == 2 * len(it.node_map)


@pytest.mark.parametrize("policy", ["write_back", "write_through", "write_through_selective"])
def test_v1b_a_block_table_is_in_token_order_wherever_its_blocks_were(policy: str) -> None:
    """There, device blocks came before host blocks, whatever the tokens."""
    with manager(8, 16, write_policy=policy) as it:
        prompt = list(range(12))
        for number in range(2):
            task = serve(it, f"a{number}", prompt, release=False)
            for index, block in enumerate(task.block_tables):
                it.manager.pools[0].device[:, block] = index
            finish(it, task)
        wait_until("what is backed up is there", lambda: not it.manager.state.transfers)
        it.free_block_ids(3)
        serve(it, "other", [100, 101, 102, 103])
        task = request("b", prompt)
        common, tokens, hit = it.request_match_blocks(task, 2)
        assert tokens == 12 and hit["cpu_cache_blocks"] == 3
        assert [int(it.manager.pools[0].device[0, block, 0]) for block in common] == list(range(6))


def test_v1c_a_short_host_gets_part_of_the_backup() -> None:
    """There, 36 candidates for 4 host blocks meant no back-up at all, at every step again."""
    config = CacheConfig(
        block_size=2,
        device_blocks=40,
        host_blocks=4,
        host_staging_blocks=0,
        host_policy=HostPolicy.WRITE_THROUGH,
        backup_after=2,
    )
    with CacheManager.create(f"v1c-{os.getpid()}", config) as it:
        prompt = np.arange(72, dtype=np.int32)
        for number in range(2):
            it.admit(str(number), prompt, max_blocks=36)
            it.cache(str(number))
            it.release(str(number))
        assert it.stats()["backed_up_blocks"] == 4 and not check(it.state)


def test_scheduled_is_not_computed() -> None:
    """``update_cache_blocks`` comes before the step: what it caches can be matched, but nothing copies it yet."""
    with manager(8, 8, write_policy="write_through") as it:
        task = request("a", list(range(12)))
        it.request_match_blocks(task, 2)
        task.block_tables = it.allocate_gpu_blocks(6)
        it.update_cache_blocks(task, 2, 4)
        assert cached(it, list(range(12))) == 4 and it.manager.stats()["backed_up_blocks"] == 0
        other = serve(it, "b", list(range(4)), release=False)  # in the same step
        assert other.matched == 4 and it.manager.stats()["backed_up_blocks"] == 0
        it.update_cache_blocks(task, 2, 8)
        assert it.manager.stats()["backed_up_blocks"] == 2
        it.update_cache_blocks(task, 2, 8)  # nothing new to insert: no block is mixed up
        assert it.manager.stats()["backed_up_blocks"] == 4 and sound(it)
        finish(it, task)
        assert not any(node.uncomputed for node in it.manager.state.nodes.values()) or "b" in it.req_leaf_map
        finish(it, other)
        assert not any(node.uncomputed for node in it.manager.state.nodes.values()) and sound(it)


def test_bad_recycles_are_dropped_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with manager(8) as it:
        task = serve(it, "a", list(range(5)), release=False)
        blocks = it.allocate_gpu_blocks(2)
        it.recycle_gpu_blocks([*blocks, blocks[0], 99, -1, task.block_tables[0]])
        assert it.dropped_recycles == 4 and "dropped" in caplog.text
        it.recycle_gpu_blocks(np.int64(blocks[1]))
        assert it.dropped_recycles == 5 and sound(it)
        owners = Counter([*it.gpu_free_block_list[:], *task.block_tables])
        assert set(owners.values()) == {1}


def test_an_update_with_blocks_of_somebody_else_is_refused() -> None:
    with manager(8) as it:
        serve(it, "a", list(range(4)), release=False)
        task = request("b", [9, 9, 9, 9])
        it.request_match_blocks(task, 2)
        for wrong in ([0, 1], [7], []):
            task.block_tables = wrong
            with pytest.raises(ValueError, match="not allocated"):
                it.update_cache_blocks(task, 2, 4)
        task.block_tables = it.allocate_gpu_blocks(3)
        with pytest.raises(ValueError, match="4 tokens"):
            it.update_cache_blocks(task, 2, 6)
        with pytest.raises(ValueError, match="not been matched"):
            it.update_cache_blocks(request("c", [1, 2]), 2, 2)
        with pytest.raises(ValueError, match="a block has 2 tokens"):
            it.request_match_blocks(request("c", [1, 2]), 4)
        it.recycle_gpu_blocks(task.block_tables)
        assert it.dropped_recycles == 0 and sound(it)


def test_a_copy_in_that_never_comes_lets_the_request_go() -> None:
    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(4)
        object.__setattr__(it.manager.config, "transfer_timeout_s", 0.2)
        (pid,) = [handle.pid for handle in it.launched.workers(it.manager)]
        os.kill(pid, signal.SIGSTOP)
        task = request("b", list(range(8)))
        common, tokens, _ = it.request_match_blocks(task, 2)  # nothing arrived: everything is computed
        assert (common, tokens) == ([], 0)
        os.kill(pid, signal.SIGCONT)
        wait_until("the quarantine ends", lambda: not it.manager.state.transfers)
        assert serve(it, "c", list(range(8))).matched == 8 and sound(it)


def test_threads_may_call_at_once() -> None:
    """The original's free lists were safe only thanks to the interpreter lock."""
    with manager(64, 32) as it:
        failed: list[BaseException] = []

        def client(first: int) -> None:
            try:
                for number in range(first, first + 40):
                    serve(it, str(number), list(range(8 * (number % 5), 8 * (number % 5) + 7)))
                    it.recycle_gpu_blocks(it.allocate_gpu_blocks(3))
                    it.free_block_ids(1)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=client, args=(100 * index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed and it.dropped_recycles == 0 and sound(it) and it.metrics.req_count == 160


def test_neither_fastdeploy_nor_paddle_is_imported() -> None:
    program = (
        "import sys, kvledger.adapters.fastdeploy\n"
        "assert not {name.partition('.')[0] for name in sys.modules} & {'fastdeploy', 'paddle'}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE_S)


def test_without_a_close_nothing_is_left_behind() -> None:
    """A drop-in is not closed by code that does not know that it has to be."""
    program = (
        "from types import SimpleNamespace as N\n"
        "from kvledger.adapters.fastdeploy import PrefixCacheManager\n"
        "cache = N(total_block_num=8, num_cpu_blocks=0, block_size=2, bytes_per_layer_per_block=8,"
        " model_cfg=N(num_hidden_layers=1), kv_backend='numpy')\n"
        "it = PrefixCacheManager(N(cache_config=cache))\n"
        f"it.launch_cache_manager(cache, 1, [0], '', '{port()}', '', True)\n"
        "print(it.ledger)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=PATIENCE_S, capture_output=True, text=True
    )
    name = done.stdout.strip()
    assert name and not [left for left in os.listdir("/dev/shm") if left.startswith(name)]


def test_a_match_of_what_is_on_its_way_has_no_holes() -> None:
    """There, nodes that were being swapped in were walked over, and stood in no list."""
    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(3)
        (pid,) = [handle.pid for handle in it.launched.workers(it.manager)]
        os.kill(pid, signal.SIGSTOP)
        first = it.match_block("b", list(range(8)), 2)
        second = it.match_block("c", list(range(8)), 2)
        assert (len(first[0]), len(first[2])) == (1, 3)
        assert (len(second[0]), second[2]) == (4, []) and len(it.manager.state.transfers) == 1
        os.kill(pid, signal.SIGCONT)
        common, tokens, _ = it.request_match_blocks(request("d", list(range(8))), 2)
        assert common == second[0] and tokens == 8
        assert it.manager.block_table("b").tolist() == common and sound(it)


def test_a_reset_with_an_empty_tree_frees_what_is_out() -> None:
    """There, it returned at once."""
    with manager(8) as it:
        blocks = it.allocate_gpu_blocks(5)
        it.reset()
        assert len(it.gpu_free_block_list) == 8
        it.recycle_gpu_blocks(blocks)
        assert it.dropped_recycles == 5 and sound(it)


def test_a_pool_does_not_shrink_under_its_users() -> None:
    """There, a new configuration renewed the lists under a live tree."""
    with manager(8, launch=False) as it:
        task = serve(it, "a", list(range(16)), release=False)
        smaller = SimpleNamespace(total_block_num=4, prefill_kvcache_block_num=4)
        with pytest.raises(Busy):
            it.update_cache_config(smaller)
        assert it.num_gpu_blocks == 8 and it.cache_config is not smaller
        finish(it, task)
        it.update_cache_config(smaller)
        assert it.num_gpu_blocks == len(it.gpu_free_block_list) + len(it.node_map) == 4 and sound(it)
