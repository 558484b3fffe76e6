"""What an engine may get wrong about the drop-in, and what its exporter shows."""

from __future__ import annotations

import os
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ipc.names import SHM
from kvledger import ConfigError, InvalidCommand, OutOfBlocks
from kvledger.adapters.fastdeploy import SIGNALS, EngineCacheQueue, IPCSignal, PrefixCacheManager, PrefixTreeStatus
from kvledger.adapters.fastdeploy.collector import GaugesCollector
from kvledger.adapters.fastdeploy.metrics import GAUGES, MainProcessMetrics
from tests.adapters.fastdeploy_engine import config, finish, manager, port, request, serve
from tests.waiting import wait_until


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ({"total_block_num": None}, "cache_config.total_block_num must be a whole number, not None"),
        ({"total_block_num": "8"}, "cache_config.total_block_num must be a whole number, not '8'"),
        ({"total_block_num": 0}, "device_blocks must be a whole number from 1"),
        ({"num_cpu_blocks": 2.5}, "cache_config.num_cpu_blocks must be a whole number, not 2.5"),
        ({"num_cpu_blocks": 4, "write_policy": "write-back"}, "write_policy must be one of write_back, .*'write-back'"),
        ({"block_size": 0}, "block_size must be a whole number from 1"),
        (
            {"kvcache_storage_backend": None},
            "this FastDeploy is later than 2025-12: .*cal_block_hash",
        ),
        ({"kv_backend": "torch"}, "cache_config.kv_backend must be one of numpy, .*, not 'torch'"),
    ],
)
def test_a_wrong_setting_is_named(cache: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        PrefixCacheManager(config(**cache))


def stock(**cache: Any) -> SimpleNamespace:
    """As FastDeploy writes it: nothing says that the KV is in kvledger's pools."""
    settings = config(**cache)
    del settings.cache_config.kv_backend
    return settings


def test_a_missing_setting_and_a_wrong_role_are_named() -> None:
    with pytest.raises(ConfigError, match="total_block_num"):
        PrefixCacheManager(SimpleNamespace(cache_config=SimpleNamespace()))
    with pytest.raises(ConfigError, match="splitwise_role must be one of mixed, prefill, decode, not 'prefil'"):
        PrefixCacheManager(config(), 1, "prefil")


@pytest.mark.parametrize(
    ("role", "cache", "says"),
    [
        ("mixed", {"num_cpu_blocks": 4}, "num_cpu_blocks = 4 moves KV .*kv_backend = 'cuda'.*num_cpu_blocks = 0"),
        ("mixed", {"num_cpu_blocks": 4, "write_policy": "write_through"}, "num_cpu_blocks = 4 moves KV"),
        ("prefill", {}, "splitwise_role 'prefill' sends KV .*kv_backend = 'cuda'.*splitwise_role = 'mixed'"),
        ("decode", {}, "splitwise_role 'decode' sends KV"),
    ],
)
def test_kv_that_is_not_in_the_pools_is_not_moved(role: str, cache: dict[str, Any], says: str) -> None:
    """A stock configuration: its runners make the tensors. Workers would copy other bytes than the model's."""
    before = {path.name for path in SHM.glob(f"fastdeploy-{os.getpid()}-*")}
    with pytest.raises(ConfigError, match=says):
        PrefixCacheManager(stock(**cache), 1, role)
    assert {path.name for path in SHM.glob(f"fastdeploy-{os.getpid()}-*")} == before


def test_a_stock_configuration_without_host_blocks_is_served_without_pools_and_workers() -> None:
    suffix = port()
    ready = IPCSignal("cache_ready_signal", np.zeros(1, np.int32), np.int32, suffix)  # the engine's
    settings = stock(num_cpu_blocks=4, enable_hierarchical_cache=False)
    try:
        ready.value[0] = 1  # and its runner's tensors are there
        with PrefixCacheManager(settings) as it:
            assert it.launch_cache_manager(settings.cache_config, 1, [0], "127.0.0.1", suffix, "", False) == []
            assert not it.manager.pools and it.swap_space_ready_signal.value.tolist() == [1]
            serve(it, "a", list(range(4)))
            assert serve(it, "b", list(range(4))).matched == 4
            it.prefix_tree_status_signal.value[0] = PrefixTreeStatus.CLEARING
            wait_until("the thread of the launch clears the cache", lambda: not it.node_map)
    finally:
        ready.clear()


def test_counts_may_be_numpy_integers() -> None:
    """A scheduler reads them from signals, as ``need_block_num_signal.value[slot]``."""
    wanted = np.array([3], np.int32)[0]
    with manager(8, 4) as it:
        assert it.can_allocate_gpu_blocks(wanted) and not it.can_allocate_gpu_blocks(np.int64(9))
        blocks = it.allocate_gpu_blocks(wanted)
        assert len(blocks) == 3
        it.recycle_gpu_blocks(np.array(blocks, np.int32))
        it.free_block_ids(wanted)
        assert it.free_cpu_block_ids(wanted) == 0 and len(it.gpu_free_block_list) == 8
        with pytest.raises(InvalidCommand, match=r"whole number, not 1\.5"):
            it.allocate_gpu_blocks(1.5)


def test_every_call_knows_the_size_of_a_block() -> None:
    with manager(8) as it:
        task = serve(it, "a", list(range(4)), release=False)
        for size in (0, 4):
            with pytest.raises(ValueError, match="a block has 2 tokens"):
                it.update_cache_blocks(task, size, 4)
            with pytest.raises(ValueError, match="a block has 2 tokens"):
                it.build_path("a", 0.0, [1, 2], [], [], size, None, 0)
        finish(it, task)


def test_a_request_that_finds_no_room_does_not_count_as_one_without_hits() -> None:
    with manager(4, 4) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(4)  # all of it is on the host now
        blocks = it.allocate_gpu_blocks(2)
        for _ in range(5):
            with pytest.raises(OutOfBlocks):
                it.request_match_blocks(request("b", list(range(8))), 2)
        it.recycle_gpu_blocks(blocks)
        task = request("b", list(range(8)))
        assert it.request_match_blocks(task, 2)[1] == 8
        assert it.metrics.req_count == 2 and it.metrics.hit_req_ratio == 0.5
        it.release_block_ids(task)


def test_the_queue_takes_the_arguments_of_the_original() -> None:
    with manager(8) as it, EngineCacheQueue(it.ledger, b"cache_queue_service", False, 1, 0, 1, 0) as queue:
        assert queue.empty() and queue.client_id == 0


def test_the_gauges_have_fastdeploys_names() -> None:
    own = MainProcessMetrics()
    with PrefixCacheManager(config(8), gauges=own) as it:
        registry = CollectorRegistry()
        registry.register(GaugesCollector(own))
        serve(it, "a", list(range(4)))
        finish(it, serve(it, "b", list(range(4)), release=False))
        shown = dict(line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if line[0] != "#")
        assert set(shown) == {f"fastdeploy:{name}" for name in GAUGES}
        assert float(shown["fastdeploy:max_gpu_block_num"]) == 8 and float(shown["fastdeploy:free_gpu_block_num"]) == 6
        assert float(shown["fastdeploy:hit_req_rate"]) == 0.5 and float(shown["fastdeploy:gpu_hit_token_rate"]) == 0.5
        with pytest.raises(AttributeError):
            own.no_such_gauge.set(1)


class Original:
    """As FastDeploy has it: attributes with ``set``, made by its exporter."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(set=self.seen.setdefault(name, []).append)


def test_the_gauges_of_an_engine_are_set() -> None:
    theirs = Original()
    with PrefixCacheManager(config(8), gauges=theirs) as it:
        serve(it, "a", list(range(4)))
    assert set(theirs.seen) == set(GAUGES) and theirs.seen["free_gpu_block_num"][-1] == 6


def test_fastdeploys_own_gauges_are_set_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """FastDeploy constructs the manager with four positional arguments, none of which says where the gauges are."""
    theirs = Original()
    monkeypatch.setitem(sys.modules, "fastdeploy.metrics.metrics", SimpleNamespace(main_process_metrics=theirs))
    with PrefixCacheManager(config(8), 1, "mixed", 0) as it:
        serve(it, "a", list(range(4)))
        assert set(theirs.seen) == set(GAUGES) and theirs.seen["free_gpu_block_num"][-1] == 6
        it.metrics.hit_req_count = it.metrics.req_count
        it.metrics._update_history_hit_metrics()
        assert theirs.seen["hit_req_rate"][-1] == 1.0


def test_a_gauge_that_a_revision_does_not_have_is_left_out() -> None:
    """FastDeploy of 2025-12 has no ``max_cpu_block_num``."""
    theirs = MainProcessMetrics()
    del theirs.max_cpu_block_num
    with PrefixCacheManager(config(8), gauges=theirs) as it:
        serve(it, "a", list(range(4)))
    assert theirs.free_gpu_block_num.value == 6 and theirs.max_gpu_block_num.value == 8
    with pytest.raises(ConfigError, match="gauges has none of max_gpu_block_num, "):
        PrefixCacheManager(config(8), gauges=object())  # type: ignore[arg-type]


def test_gauges_that_fail_leave_no_ledger_behind() -> None:
    theirs = MainProcessMetrics()

    def full(value: float) -> None:
        raise OSError("no space left where the gauges are")

    theirs.free_gpu_block_num.set = full  # type: ignore[method-assign]
    before = {path.name for path in SHM.glob(f"fastdeploy-{os.getpid()}-*")}
    with pytest.raises(OSError, match="no space left"):
        PrefixCacheManager(config(8), gauges=theirs)
    assert {path.name for path in SHM.glob(f"fastdeploy-{os.getpid()}-*")} == before


def test_every_signal_is_what_python_s_own_shared_memory_sees() -> None:
    suffix = port()
    for name in (name.format(rank_id=0) for name in SIGNALS):
        signal = IPCSignal(name, np.array([7, -2], np.int32), np.int32, suffix)
        other = IPCSignal(name=name, array=np.zeros(2, np.int32), dtype=np.int32, suffix=suffix, create=False)
        theirs = SharedMemory(f"{name}.{suffix}")
        assert theirs.size == 8 and bytes(theirs.buf) == np.array([7, -2], np.int32).tobytes()
        theirs.buf[:4] = (11).to_bytes(4, "little")
        assert signal.value.tolist() == other.value.tolist() == [11, -2]
        theirs.close()
        theirs.unlink()  # which also takes it from the resource tracker of this process


def test_a_launch_makes_the_signals_that_are_missing_with_their_shapes() -> None:
    suffix, ranks = port(), 2
    kept = IPCSignal("prefix_tree_status", np.zeros(1, np.int32), np.int32, suffix)  # the engine's own
    with manager(8, 4, ranks, launch=False) as it:
        it.launch_cache_manager(it.cache_config, ranks, [0, 1], "127.0.0.1", suffix, "", True)
        made = {path.name.removesuffix(f".{suffix}"): path.stat() for path in Path("/dev/shm").glob(f"*.{suffix}")}
        words = {name: 4 * (ranks if SIGNALS[name].shape == "tp" else 1) for name in list(SIGNALS)[:4]}
        assert {name: stat.st_size for name, stat in made.items()} == words
        assert all(stat.st_mode & 0o777 == 0o600 for stat in made.values())
    assert [path.name for path in Path("/dev/shm").glob(f"*.{suffix}")] == [f"prefix_tree_status.{suffix}"]
    kept.clear()
