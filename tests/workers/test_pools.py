"""Layouts, and pools of several tensors per layer in shared memory: NumPy's and Paddle's, with real workers."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from ipc import LedgerNotFound, TooManyFiles
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy
from statemachine.events import Direction, TransferStarted
from workers import KVTensor, PoolLayout, PoolMismatch
from workers.pools import memory as pool_memory
from workers.pools.backends import create_pools, open_pools
from workers.pools.layout import key_value, key_value_8bit, latent
from workers.pools.memory import pool_names, pool_sizes
from workers.pools.numpy import NumpyCopies, NumpyPools

LAYOUTS = {
    "bf16": key_value(2, 4, 8),
    "8-bit with scales": key_value_8bit(2, 4, 8),
    "fp8 with float32 scales": key_value_8bit(2, 4, 8, "float8_e4m3fn", "float32"),
    "latent": latent(4, 32, 8),
    "values wider than keys": (KVTensor("key", (2, 4, 8), "float16"), KVTensor("value", (2, 4, 16), "float16")),
}


def config(tensors: tuple[KVTensor, ...], backend: str = "numpy") -> CacheConfig:
    return CacheConfig(
        block_size=4,
        device_blocks=8,
        host_blocks=16,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=2,
        layers=3,
        tensors=tensors,
        backend=backend,
    )


def test_sizes_follow_from_the_tensors() -> None:
    bf16, scaled = config(LAYOUTS["bf16"]), config(LAYOUTS["8-bit with scales"])
    assert bf16.block_bytes == 2 * 2 * 4 * 8 * 2
    assert scaled.block_bytes == 2 * 2 * 4 * 8 + 2 * 2 * 4 * 2
    assert [piece.tensor.name for piece in config(LAYOUTS["latent"]).layout.pieces] == ["key"] * 3
    assert [piece.offset for piece in scaled.layout.pieces[:5]] == [0, 64, 128, 144, 160]
    for each in (bf16, scaled):
        assert PoolLayout.parse(each.layout.text()) == each.layout
    layouts = [config(tensors, backend).layout for tensors in LAYOUTS.values() for backend in ("numpy", "paddle")]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ((KVTensor("", (8,), "uint8"),), "needs a name"),
        ((KVTensor(7, (8,), "int8"),), "needs a name, not 7"),  # type: ignore[arg-type]
        ((KVTensor("key", (8,), ["int8"]),), "key: dtype must be"),  # type: ignore[arg-type]
        ((KVTensor("key", 8, "int8"),), "key: the shape"),  # type: ignore[arg-type]
        ((KVTensor("key", (8,), "int4"),), "key: dtype must be one of bfloat16, .*, not 'int4'"),
        ((KVTensor("key", (), "uint8"),), "key: the shape"),
        ((KVTensor("key", (8, 0), "uint8"),), "key: the shape"),
        ((KVTensor("key", (8, True), "uint8"),), "key: the shape"),
        ((KVTensor("key", (3,), "uint8"),), "key: 3 bytes per block are not a multiple of 8"),
        ((KVTensor("key", (8,), "uint8"), KVTensor("key", (16,), "uint8")), "same name"),
    ],
)
def test_impossible_tensors_are_refused(tensors: tuple[KVTensor, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=f"tensors: .*{text}"):
        config(tensors)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_bytes 64 contradicts tensors, which have 256"):
        CacheConfig(device_blocks=8, tensors=LAYOUTS["bf16"], block_bytes=64)
    with pytest.raises(ConfigError, match="backend must be one of numpy, paddle, paddle-gpu, cuda, not 'torch'"):
        CacheConfig(device_blocks=8, backend="torch")
    for tensors in ([KVTensor("key", (8,), "int8")], True, ("key",)):
        with pytest.raises(ConfigError, match="tensors must be a tuple of KVTensor"):
            config(tensors)  # type: ignore[arg-type]
    good = config(LAYOUTS["bf16"]).layout.text()
    broken = [good.replace(*change) for change in (("bfloat16", "int4"), ("numpy", "torch"), ("2", '"'))]
    for bad in ("", "[]", "{}", *broken):
        with pytest.raises(ValueError, match="not a pool layout"):
            PoolLayout.parse(bad)


@pytest.fixture
def ledger() -> Iterator[str]:
    name = f"pools-{os.getpid()}"
    yield name
    remove_objects(name)


def test_another_layout_of_the_same_size_is_a_mismatch(ledger: str) -> None:
    layout = PoolLayout(1, 2, 256, 4, 4, LAYOUTS["bf16"])
    create_pools(ledger, layout)
    with pytest.raises(PoolMismatch, match="does not have the layout"):
        open_pools(ledger, 0, layout._replace(tensors=key_value(2, 4, 8, "float16")))


def test_who_waits_for_the_pools_never_sees_half_of_one(ledger: str) -> None:
    """The process of a rank asks again and again while the manager makes them (tests/workers/test_cuda.py)."""
    layout = PoolLayout(2, 2, 256, 4, 4, LAYOUTS["bf16"])
    device, host = pool_names(ledger, 1)
    waited: list[str] = []

    def look(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_code is not pool_memory.create.__code__:
            return None
        if event == "line":
            try:
                open_pools(ledger, 1, layout)
            except LedgerNotFound as error:
                waited.append(str(error))
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        pool_memory.create(host, pool_sizes(layout)[1], layout)
        pool_memory.create(device, pool_sizes(layout)[0], layout)
    finally:
        sys.settrace(before)
    assert any(f"there is no shared memory {device}" in each for each in waited)
    assert open_pools(ledger, 1, layout).id


def test_pools_that_cannot_be_looked_at_are_not_taken_for_replaced(
    ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else tensors would be published, and their owner told that they are not."""
    layout = PoolLayout(1, 2, 256, 4, 4, LAYOUTS["bf16"])
    create_pools(ledger, layout)
    found = pool_memory.PoolMemory(ledger, 0, layout)

    def refused(*arguments: object) -> None:
        raise TooManyFiles("as many files are open as may be")

    with monkeypatch.context() as patch:
        patch.setattr(pool_memory, "attach", refused)
        assert found.is_current()
    assert found.is_current()
    remove_objects(ledger)
    assert not found.is_current()
    create_pools(ledger, layout)
    assert not found.is_current()


def test_a_copy_that_raises_is_an_answer(ledger: str) -> None:
    layout = PoolLayout(1, 2, 256, 4, 4, LAYOUTS["bf16"])
    create_pools(ledger, layout)
    copies = NumpyCopies(ledger, 0, layout)
    nothing = array("I")
    ids = array("i", [2]), array("i", [9])
    copies.start(TransferStarted(7, Direction.SWAP_OUT, 0, 0, array("Q"), nothing, array("Q"), nothing, *ids))
    assert copies.busy()
    (ended,) = copies.ended()
    assert (ended.transfer, ended.valid) == (7, 0) and ended.error == "IndexError: block ids 9 to 9 in a pool of 4"
    assert not copies.busy()


def fill(manager: CacheManager, table: np.ndarray, seed: int) -> None:
    """Random bytes into all tensors of some blocks, different for each rank and tensor."""
    for pool in manager.pools:
        assert isinstance(pool, NumpyPools)
        rng = np.random.default_rng([seed, pool.rank])
        for piece in pool.pieces:
            piece[table] = rng.integers(0, 256, (len(table), piece.shape[1]), np.uint8)


def there_and_back(manager: CacheManager) -> None:
    """Fill a prompt's blocks, push them out to the host with another prompt's, and bring them back."""
    prompts = [np.arange(32, dtype=np.int32) + 100 * i for i in range(2)]
    for i in (0, 1):
        manager.admit(str(i), prompts[i])
        manager.wait(str(i))
        fill(manager, manager.block_table(str(i)), i)
        manager.cache(str(i))
        manager.release(str(i))
    back = manager.admit("back", prompts[0])
    assert back.host_blocks == 7
    manager.wait("back")
    table = manager.block_table("back")
    for pool in manager.pools:  # the eighth block is computed again, and these bytes are not compared
        assert isinstance(pool, NumpyPools)
        rng = np.random.default_rng([0, pool.rank])
        for piece in pool.pieces:
            wanted = rng.integers(0, 256, (8, piece.shape[1]), np.uint8)
            assert np.array_equal(piece[table[:7]], wanted[:7])


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_survives_the_way_to_the_host_and_back(name: str) -> None:
    with CacheManager.create(f"pools-{os.getpid()}", config(LAYOUTS[name])) as manager:
        there_and_back(manager)


def test_paddle_tensors_are_the_pool() -> None:
    pytest.importorskip("paddle")
    for name, tensors in LAYOUTS.items():
        with CacheManager.create(f"pools-{os.getpid()}", config(tensors, "paddle")) as manager:
            there_and_back(manager)
            assert manager._ranks is not None
            maps = Path(f"/proc/{manager._ranks.supervisor.pid(1)}/maps").read_text()
            assert "numpy" in maps and "paddle" not in maps, "a transfer worker needs no Paddle"
            for tensor in tensors:
                found = manager.pools[1].tensor(2, tensor.name)
                assert found.shape == [8, *tensor.shape] and tensor.dtype in str(found.dtype), name
            manager.pools[0].tensor(1, "key").view("uint8")[3] = 7
            again = open_pools(manager.name, 0, manager.config.layout)
            assert isinstance(again, NumpyPools)
            assert (again.pieces[manager.config.layout.piece(1, "key")][3] == 7).all(), name
            assert bool((again.tensor(1, "key").view("uint8")[3] == 7).all()), name


def test_paddle_without_a_gpu_says_so() -> None:
    paddle = pytest.importorskip("paddle")
    if paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_NO_DEVICE .*backend='paddle' runs without"):
        CacheManager.create(f"pools-{os.getpid()}", config(LAYOUTS["bf16"], "paddle-gpu"))
