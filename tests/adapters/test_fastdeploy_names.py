"""What engines and their tests call, read or assign beyond a scheduler's calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipc.names import SHM
from kvledger import InvalidCommand
from kvledger.adapters.fastdeploy import SIGNALS, IPCSignal, PrefixCacheManager, PrefixTreeStatus
from tests.adapters.fastdeploy_engine import config, manager, port, request, serve
from tests.waiting import PATIENCE_S, wait_until


def test_a_status_signal_that_the_engine_assigns_is_followed() -> None:
    with manager(8) as it:
        serve(it, "a", [1, 2])
        it.follow_status()  # there is none yet
        it.prefix_tree_status_signal = SimpleNamespace(value=np.array([PrefixTreeStatus.CLEARING], np.int32))
        it.follow_status()
        assert it.prefix_tree_status_signal.value[0] == PrefixTreeStatus.CLEARED and not it.node_map
    with manager(8, launch=True) as it:
        serve(it, "a", [1, 2])
        it.prefix_tree_status_signal = SimpleNamespace(value=np.array([PrefixTreeStatus.CLEARING], np.int32))
        wait_until("the thread of the launch clears the cache", lambda: not it.node_map)


class Latent:
    """An attention backend that keeps keys and values in one, in twelve items per token."""

    def __init__(self, config: Any, **heads: int) -> None: ...

    def get_kv_cache_shape(self, max_num_blocks: int, kv_cache_quant_type: str | None) -> Any:
        return [max_num_blocks, 1, 2, 6 if kv_cache_quant_type == "int4_zp" else 12], []


@pytest.mark.parametrize(
    ("quant", "size"),
    [
        (None, 1 * 2 * 12 * 2),
        ("int8", 1 * 2 * 12),
        ("int4_zp", 16),  # 12, made a multiple of 8
        ("block_wise_fp8", 1 * 2 * 12 + 1 * 2 * 2 + 4),  # with a scale of two bytes per head and token
    ],
)
def test_fastdeploys_attention_backend_says_how_large_a_block_is(
    quant: str | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``bytes_per_layer_per_block`` reckons with paged attention in 16 bits, whatever the backend is."""
    monkeypatch.setitem(sys.modules, "fastdeploy", SimpleNamespace())
    layers = SimpleNamespace(get_attention_backend=lambda: Latent)
    monkeypatch.setitem(sys.modules, "fastdeploy.model_executor.layers.attention", layers)
    settings = config(8, 2)
    settings.quant_config = SimpleNamespace(kv_cache_quant_type=quant)
    with PrefixCacheManager(settings) as it:
        assert it._get_kv_cache_shape(5)[1] == []
        it.launch_cache_manager(settings.cache_config, 1, [0], "127.0.0.1", port(), "", True)
        assert it.manager.pools[0].layout.block_bytes == size


def test_a_fastdeploy_without_layers_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastdeploy", SimpleNamespace())
    with manager(8, launch=True) as it:
        assert it._get_kv_cache_shape(5) == ([5, 2, 2, 4], [5, 2, 2, 4])
        assert it.manager.pools[0].layout.block_bytes == 64


def test_the_hash_of_a_block_finds_it_in_the_tree() -> None:
    with manager(8) as it:
        serve(it, "a", [1, 2, 3, 4])
        first = it.radix_tree_root.children[it.cal_block_hash([1, 2])]
        assert first.children[it.cal_block_hash(np.array([3, 4]))].depth == 2
        assert it.cal_block_hash((1, 3)) not in it.radix_tree_root.children


def test_equal_content_of_any_type_has_equal_names() -> None:
    with manager(8) as it:
        name = it.hash_block_features([1, 2], ["img"])
        assert name == it.hash_block_features(np.array([1, 2], np.int64), ("img",)) != it.hash_block_features([1, 2])
        assert it.hash_block_features([1, 2], ["a", "b"]) != it.hash_block_features([1, 2], ["ab"])


def test_the_items_of_a_block() -> None:
    positions = [SimpleNamespace(offset=1, length=3), SimpleNamespace(offset=6, length=4)]
    task = request("a", [0] * 12, multimodal_inputs={"mm_positions": positions, "mm_hashes": ["cat", "dog"]})
    with manager(8) as it:
        found, index = [], 0
        for start in range(0, 12, 2):
            index, keys = it.get_block_hash_extra_keys(task, start, start + 2, index)
            found.append(keys)
        assert found == [["cat"], ["cat"], [], ["dog"], ["dog"], []]
        assert it.get_block_hash_extra_keys(request("b", [1, 2]), 0, 2, 0) == (0, [])
        with pytest.raises(InvalidCommand, match="no block from 2 to 2"):
            it.get_block_hash_extra_keys(task, 2, 2, 0)


def test_a_match_is_taken_back_to_before_an_item() -> None:
    """There, block ids were looked for among the node ids, and a block that began before the item stayed."""
    with manager(8, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(1)  # the last is on the host
        gpu, cpu, swapping, leaf, *tokens = it.match_block("b", list(range(8)), 2)
        nodes = [leaf]
        while nodes[0].depth > 1:
            nodes.insert(0, nodes[0].parent)
        ids, swapped = [node.node_id for node in nodes], list(swapping)
        assert (len(gpu), len(cpu), len(swapped)) == (3, 1, 1)
        task = request("b", [], multimodal_inputs={"mm_positions": [SimpleNamespace(offset=3, length=9)]})
        left = it._revert_match_blocks(task, 8, 2, 0, ids, nodes, gpu, cpu, *tokens, swapped)
        assert (left[:2], left[2].depth) == ((2, 0), 1)
        assert (len(ids), len(nodes), len(gpu), cpu, swapped) == (1, 1, 1, [], [])
        task.multimodal_inputs["mm_positions"][0].offset = 0
        left = it._revert_match_blocks(task, 2, 2, 0, ids, nodes, gpu, cpu, 2, 0, swapped)
        assert (left[:2], left[2].node_id, gpu) == ((0, 0), -1, [])


def test_host_blocks_are_handed_out_to_nobody() -> None:
    with manager(8, 4) as it:
        free = it.cpu_free_block_list[:]
        assert it.allocate_cpu_blocks(0) == []
        with pytest.raises(InvalidCommand, match="free_block_ids"):
            it.allocate_cpu_blocks(1)
        it.recycle_cpu_blocks([0, 9])
        it.recycle_cpu_blocks(1)
        assert it.dropped_recycles == 3 and it.cpu_free_block_list[:] == free


def test_a_signal_of_so_many_bytes() -> None:
    name, suffix = "worker_words", port()
    with pytest.raises(ValueError, match="give array and dtype, or shm_size"):
        IPCSignal(name, suffix=suffix)
    one = IPCSignal(name, suffix=suffix, shm_size=100)
    try:
        assert one.value is None and one.shm.name == f"{name}.{suffix}" and one.shm.size == len(one.shm.buf) == 100
        one.shm.buf[3] = 7
        other = IPCSignal(name=name, suffix=suffix, create=False, shm_size=100)
        assert other.shm.buf[3] == 7
        words = IPCSignal(name, np.zeros(25, np.int32), np.int32, suffix, create=False)
        assert words.value[0] == 7 << 24 and words.shm.buf[3] == 7
        with pytest.raises(ValueError, match="100 bytes, 101 are expected"):
            IPCSignal(name, suffix=suffix, create=False, shm_size=101)
        other.shm.close()
        assert (SHM / f"{name}.{suffix}").exists()
    finally:
        one.shm.unlink()
    assert not (SHM / f"{name}.{suffix}").exists()


def test_the_signals_of_the_layers_have_the_rank_in_their_names() -> None:
    """FastDeploy's kernels open ``splitwise_complete_prefilled_layer_<rank>.<gpu>``."""
    split = [name for name in SIGNALS if name.startswith("splitwise_complete_prefilled_")]
    suffix = port()
    assert [name.format(rank_id=3) for name in split] == [
        "splitwise_complete_prefilled_step_3",
        "splitwise_complete_prefilled_layer_3",
    ]
    made = IPCSignal(split[1].format(rank_id=3), np.array([5], np.int32), np.int32, suffix)
    theirs = SharedMemory(f"splitwise_complete_prefilled_layer_3.{suffix}")
    assert bytes(theirs.buf[:4]) == (5).to_bytes(4, "little")
    theirs.close()
    theirs.unlink()
    made.clear()


ENGINE = """
import os, signal, sys, time
from tests.adapters.fastdeploy_engine import config, port
from kvledger.adapters.fastdeploy import PrefixCacheManager
os.setsid()
settings = config(8, 4)
it = PrefixCacheManager(settings, 2, sys.argv[1])
handles = it.launch_cache_manager(settings.cache_config, 2, [0, 1], "127.0.0.1", port(), "", True)
groups = {os.getpgid(handle.pid) for handle in handles}
assert os.getpgid(0) not in groups and len(handles) == int(sys.argv[2]), (groups, handles)
for handle in handles:  # as engine.py does it at its shutdown
    try:
        os.killpg(os.getpgid(handle.pid), signal.SIGTERM)
    except (TypeError, ProcessLookupError):
        pass  # it is being replaced; theirs logs it
it.close()
print("alive", it.ledger, flush=True)
"""


@pytest.mark.parametrize(("role", "handles"), [("mixed", 2), ("prefill", 4), ("decode", 2)])
def test_the_shutdown_of_fastdeploys_engine_kills_the_workers_and_not_the_engine(role: str, handles: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, role, str(handles)], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode != -signal.SIGTERM and done.returncode == 0, done.stderr
    said, ledger = done.stdout.split()
    assert said == "alive" and not [name for name in os.listdir(SHM) if name.startswith(ledger)]
