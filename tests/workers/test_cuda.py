"""The CUDA backend with real worker processes, over a stand-in for the driver (``cuda_standin.c``)."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc import LedgerNotFound
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.run.pattern import PatternEngine, chain
from statemachine.content import words_of
from tests.manager.test_manager import replays, serve
from tests.waiting import PATIENCE_S, wait_until
from workers import KVTensor, WorkerFailed
from workers.pools.backends import create_pools, ids_of, open_copies, open_pools, reopen_pools
from workers.pools.cuda_copies import Side, plan
from workers.pools.cuda_driver import LIBRARY, CudaError, Driver
from workers.pools.cuda_pools import CudaPools, Published
from workers.pools.layout import PoolLayout

CONFIG = CacheConfig(
    block_size=4,
    device_blocks=16,
    host_blocks=32,
    host_policy=HostPolicy.EXCLUSIVE,
    ranks=2,
    layers=2,
    block_bytes=64,
    backend="cuda",
)


def changed(**changes: object) -> CacheConfig:
    return CacheConfig(**{**vars(CONFIG), **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The stand-in as a driver with the batched copy, and as one without."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("standin")
    source = Path(__file__).with_name("cuda_standin.c")
    made = {}
    for name, flags in (("batch", []), ("loop", ["-DNO_BATCH"])):
        made[name] = folder / f"{name}.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", *flags, "-o", made[name], source], check=True)
    return made


class Standin:
    """The driver of one test: the same library for this process and its workers, with a folder for its memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fail()

    def fail(self, *lines: str) -> None:
        """From now on these calls fail, in all processes: ``"cuMemcpyBatchAsync 1"``."""
        new = self.folder / "fail.new"
        new.write_text("\n".join(lines))
        new.rename(self.folder / "fail")

    def hold(self, stream: int, held: bool = True) -> None:
        """Stream 0 (swap-out) or 1 (swap-in) of all workers stands still."""
        path = self.folder / f"hold.{stream}"
        path.touch() if held else path.unlink()

    def calls(self, name: str) -> list[str]:
        """Details of all calls of that name in other processes."""
        texts = [path.read_text() for path in self.folder.glob("calls.*") if path.suffix != f".{os.getpid()}"]
        return [line.split(" ", 1)[1] for text in texts for line in text.splitlines() if line.split(" ")[0] == name]


@pytest.fixture
def standin(libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Standin:
    use(libraries["batch"], tmp_path, monkeypatch)
    return Standin(tmp_path)


def use(library: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = folder / "libcuda.so"  # loaded by its path: its state is this test's alone
    shutil.copy(library, own)
    monkeypatch.setenv(LIBRARY, str(own))
    monkeypatch.setenv("STANDIN_DIR", str(folder))


class DeviceTensor(np.ndarray):
    """A tensor of a framework: GPU memory with an address."""

    def data_ptr(self) -> int:
        return self.ctypes.data


def tensor_at(address: int, layout: PoolLayout, block_bytes: int) -> DeviceTensor:
    memory = (ctypes.c_ubyte * (layout.device_blocks * block_bytes)).from_address(address)
    return np.frombuffer(memory, np.uint8).reshape(layout.device_blocks, block_bytes).view(DeviceTensor)


def allocate(pools: Sequence[CudaPools], *, arena: bool = False) -> None:
    """What an engine does: allocate the device tensors, and publish them. ``arena``: all in one allocation."""
    driver = Driver()
    driver.use(driver.retain(0))
    for pool in pools:
        layout = pool.layout
        sizes = [piece.tensor.block_bytes for piece in layout.pieces]
        if arena:
            base = driver.allocate(layout.device_blocks * sum(sizes) + 256) + 256
            addresses = [base + layout.device_blocks * sum(sizes[:i]) for i in range(len(sizes))]
        else:
            addresses = [driver.allocate(layout.device_blocks * size) for size in sizes]
        tensors = [tensor_at(address, layout, size) for address, size in zip(addresses, sizes, strict=True)]
        pool.publish(tensors)


def create(config: CacheConfig = CONFIG, **options: bool) -> CacheManager:
    return CacheManager.create(f"cuda-{os.getpid()}", config, publish=lambda pools: allocate(pools, **options))


def prompt(number: int, blocks: int = 8) -> np.ndarray:
    return np.arange(4 * blocks + 1, dtype=np.int32) + 1000 * number


@pytest.mark.parametrize("library", ["batch", "loop"])
@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_bytes_follow_tokens_and_killed_workers_come_back(
    libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, policy: HostPolicy
) -> None:
    use(libraries[library], tmp_path, monkeypatch)
    standin = Standin(tmp_path)
    with create(changed(host_policy=policy), arena=policy == HostPolicy.WRITE_THROUGH) as manager:
        engine = PatternEngine(manager.pools)
        hits = 0
        for i in range(60):
            if i == 30:
                assert manager._ranks is not None
                os.kill(manager._ranks.supervisor.pid(1), signal.SIGKILL)
            hits += serve(manager, engine, str(i), prompt(i % 3))
        assert hits > 100 and manager.state.workers[1] == 2 and manager.stats()["swapped_in_blocks"] > 50
        assert replays(manager)
    assert {*standin.calls("cuStreamCreate")} == {"non-blocking"}
    assert {*standin.calls("cuMemHostRegister_v2")} == {f"bytes={36 * 2 * 64}"}
    opened = 1 if policy == HostPolicy.WRITE_THROUGH else 2
    assert len(standin.calls("cuIpcOpenMemHandle_v2")) == opened * 3, "per incarnation, each allocation once"
    batches, singles = standin.calls("cuMemcpyBatchAsync"), standin.calls("cuMemcpyAsync")
    assert bool(batches) == (library == "batch") and bool(singles) == (library == "loop")
    # the source of a swap-in may be read at any time, that of a swap-out in the order of the stream
    assert all((" order=3" in call) == ("stream=1" in call) for call in batches)


def test_what_is_adjacent_on_both_sides_is_one_copy(standin: Standin) -> None:
    with create(changed(layers=1)) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", prompt(0, 16)[:64])
        serve(manager, engine, "b", prompt(1, 16)[:64])
        assert serve(manager, engine, "c", prompt(0, 16)[:64]) == 15
        moved = manager.stats()["swapped_out_blocks"] + manager.stats()["swapped_in_blocks"]
    counts = [int(call.split("count=")[1].split()[0]) for call in standin.calls("cuMemcpyBatchAsync")]
    assert moved >= 30 and len(counts) >= 4 and max(counts) <= 4


@given(st.data())
def test_a_plan_is_the_copies_one_by_one(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    apart = data.draw(st.sampled_from([0, 100]))
    stride = sum(sizes)

    def side(block_first: bool, base: int) -> Side:
        starts = np.cumsum([0, *sizes[:-1]])
        if block_first:
            return Side((base + starts).astype(np.uint64), np.full(len(sizes), stride, np.uint64), 12)
        bases = base + starts * 12 + apart * np.arange(len(sizes))
        return Side(bases.astype(np.uint64), np.array(sizes, np.uint64), 12)

    source = side(data.draw(st.booleans()), 0)
    target = side(data.draw(st.booleans()), 0)
    ids = [array("i", data.draw(st.permutations(range(12)))[: data.draw(st.integers(0, 12))]) for _ in range(1)]
    sources = ids[0]
    targets = array("i", data.draw(st.permutations(range(12)))[: len(sources)])
    memory, other = np.random.default_rng(0).integers(0, 256, (2, 1000), np.uint8)
    wanted = other.copy()
    for s, t in zip(sources, targets, strict=True):
        for piece, size in enumerate(sizes):
            at = int(source.bases[piece]) + s * int(source.strides[piece])
            to = int(target.bases[piece]) + t * int(target.strides[piece])
            wanted[to : to + size] = memory[at : at + size]
    t_at, s_at, size_of = plan(source, target, np.array(sizes, np.uint64), sources, targets)
    for to, at, size in zip(t_at.tolist(), s_at.tolist(), size_of.tolist(), strict=True):
        other[to : to + size] = memory[at : at + size]
    assert np.array_equal(other, wanted)
    assert int(size_of.sum()) == len(sources) * stride


def test_block_ids_outside_the_pool_are_not_copied() -> None:
    side = Side(np.zeros(1, np.uint64), np.ones(1, np.uint64), 4)
    for ids in ([4], [-1]):
        with pytest.raises(IndexError, match="in a pool of 4"):
            plan(side, side, np.ones(1, np.uint64), array("i", ids), array("i", [0]))


def test_a_swap_in_waits_for_the_swap_out_of_its_targets_and_for_no_other(standin: Standin) -> None:
    with create() as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", prompt(0, 15))
        serve(manager, engine, "b", prompt(1, 15))  # a is on the host now
        standin.hold(0)
        admission = manager.admit("c", prompt(0, 15))
        assert admission.host_blocks and any(transfer.waits_for for transfer in manager.state.transfers.values())
        for _ in range(50):  # time enough for a worker that did not wait
            manager.poll()
            time.sleep(0.01)
        assert not manager.ready("c")
        standin.hold(0, False)
        manager.wait("c")
        seeds = chain(words_of(prompt(0, 15)), 16, b"")
        engine.verify("c", admission.block_table[:15], seeds, 0)
        manager.release("c")
        assert serve(manager, engine, "d", prompt(1, 15)) > 0, "and what was swapped out was not overwritten before"


def test_a_swap_in_overtakes_a_swap_out_that_has_nothing_to_do_with_it(standin: Standin) -> None:
    with create(changed(device_blocks=24, host_policy=HostPolicy.WRITE_THROUGH)) as manager:
        engine = PatternEngine(manager.pools)
        for name in range(3):
            serve(manager, engine, str(name), prompt(name, 7))
        wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
        standin.hold(0)
        serve(manager, engine, "x", prompt(7, 4))  # its back-up stands still
        assert manager.state.transfers
        admission = manager.admit("again", prompt(0, 7))
        assert admission.host_blocks and not admission.ready
        progress = manager.wait("again", timeout=PATIENCE_S)
        assert not progress.shortened and manager.state.transfers
        standin.hold(0, False)
        manager.release("again")


def test_a_copy_that_fails_is_a_failed_transfer_and_nothing_is_stuck(standin: Standin) -> None:
    with create() as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", prompt(0, 15))
        serve(manager, engine, "b", prompt(1, 15))
        standin.fail("cuMemcpyBatchAsync 1")
        assert manager.admit("c", prompt(0, 15)).host_blocks
        progress = manager.wait("c")
        assert progress.request_id == "c" and progress.shortened and progress.cached_blocks == 0
        manager.release("c")
        standin.fail()
        for i in range(6):
            serve(manager, engine, f"d{i}", prompt(i % 2, 15))
        assert manager.state.workers[0] == 1 and replays(manager)


def test_a_worker_whose_context_is_lost_begins_again(standin: Standin) -> None:
    with create() as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", prompt(0, 15))
        standin.fail("fatal 700")
        manager.admit("b", prompt(1, 15))

        def poll() -> None:
            manager.poll()
            if manager.state.transfers and len(standin.calls("cuInit")) > 3:
                standin.fail()

        wait_until("the worker is replaced", lambda: manager.state.workers[0] > 1, meanwhile=poll)
        standin.fail()
        assert not manager.wait("b").shortened
        manager.release("b")
        assert serve(manager, engine, "c", prompt(0, 15)) == 15, "it was swapped out in the end"
        assert replays(manager)


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        ("cuInit 100", "cuInit: CUDA_ERROR_NO_DEVICE"),
        ("cuMemHostRegister_v2 2", "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuStreamCreate 2", "cuStreamCreate: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuIpcOpenMemHandle_v2 400", "cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE"),
        ("cuCtxSetCurrent 12345", "cuCtxSetCurrent: unknown error"),
    ],
)
def test_a_worker_that_cannot_start_names_the_cuda_error(standin: Standin, failure: str, text: str) -> None:
    def publish(pools: Sequence[CudaPools]) -> None:
        allocate(pools)
        standin.fail(failure)

    with pytest.raises(WorkerFailed, match=rf"rank \d did not start: CudaError: {text}"):
        CacheManager.create(f"cuda-{os.getpid()}", CONFIG, publish=publish)


def test_a_handle_that_is_none(standin: Standin) -> None:
    def publish(pools: Sequence[CudaPools]) -> None:
        allocate(pools)
        published = Published.read(pools[0]._memory.device_object)
        assert published is not None and published.owner_alive(f"/cuda-{os.getpid()}.pool.device.0")
        table = bytes(pools[0]._memory.device).replace(published.handles[0], b"x" * 64)
        pools[0]._write(bytes(pools[0]._memory.device_object[64:104]), table)

    with pytest.raises(WorkerFailed, match=r"rank 0 did not start: CudaError: cuIpcOpen.*CUDA_ERROR_INVALID_HANDLE"):
        CacheManager.create(f"cuda-{os.getpid()}", CONFIG, publish=publish)


def test_a_device_that_the_worker_does_not_see(standin: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(pools: Sequence[CudaPools]) -> None:
        allocate(pools)
        monkeypatch.setenv("STANDIN_FIRST_DEVICE", "7")

    with pytest.raises(WorkerFailed, match=r"CUDA_ERROR_INVALID_DEVICE.*CUDA_VISIBLE_DEVICES"):
        CacheManager.create(f"cuda-{os.getpid()}", CONFIG, publish=publish)


def test_device_tensors_that_nobody_publishes(standin: Standin) -> None:
    def impatient(reason: str) -> None:
        raise InterruptedError(reason)

    def publish(pools: Sequence[CudaPools]) -> None:
        with pytest.raises(InterruptedError, match="nobody has published the device tensors of rank 1"):
            open_copies(f"cuda-{os.getpid()}", 1, CONFIG.layout, impatient)

    with pytest.raises(WorkerFailed, match="not ready within 2 s"):
        CacheManager.create(f"cuda-{os.getpid()}", changed(ready_timeout_s=2.0), publish=publish)


@pytest.mark.parametrize(
    ("library", "text"),
    [("/nowhere/libcuda.so", "CUDA_ERROR_SHARED_OBJECT_INIT_FAILED"), ("libc.so.6", "CUDA_ERROR_NOT_FOUND")],
)
def test_no_driver(monkeypatch: pytest.MonkeyPatch, library: str, text: str) -> None:
    monkeypatch.setenv(LIBRARY, library)
    with pytest.raises(CudaError, match=text):
        Driver()
    with pytest.raises(WorkerFailed, match=text):
        CacheManager.create(f"cuda-{os.getpid()}", CONFIG)


def test_tensors_that_do_not_fit_are_not_published(standin: Standin) -> None:
    layout = PoolLayout(1, 2, 64, 16, 4, (KVTensor("key", (64,), "uint8"),), "cuda")
    size = 64 * 16
    tried = []

    def publish(pools: Sequence[CudaPools]) -> None:
        (pool,) = pools
        driver = Driver()
        driver.use(driver.retain(0))
        good, short = driver.allocate(size), driver.allocate(size - 1)
        host = np.zeros(size, np.uint8)
        for tensors, error, text in (
            ([good], ValueError, "has 2 tensors in 2 layers, not 1"),
            ([good, short], ValueError, "tensor 'key' of layer 1 needs 1,024 bytes, its memory has 1,023"),
            ([good, "key"], TypeError, "str is no GPU tensor"),
            ([good, host.ctypes.data], CudaError, "cuPointerGetAttribute: CUDA_ERROR_INVALID_VALUE"),
        ):
            with pytest.raises(error, match=text):
                pool.publish(tensors)
            assert Published.read(pool._memory.device_object) is None
            tried.append(text)
        with pytest.raises(CudaError, match="has published no device tensors"):
            pool.tensor(0, "key")
        pool.publish([good, driver.allocate(size)])
        assert pool.tensor(0, "key") == good
        with pytest.raises(KeyError, match="no tensor 'value' in layer 0"):
            pool.tensor(0, "value")
        with pytest.raises(ValueError, match=f"process {os.getpid()} has published the device tensors of rank 0"):
            pool.publish([good, driver.allocate(size)])

    config = changed(ranks=1, device_blocks=16, host_blocks=4, block_bytes=4096, tensors=layout.tensors)
    CacheManager.create(f"cuda-{os.getpid()}", config, publish=publish).close()
    assert len(tried) == 4


_RUNNER = """
import sys, time
from ipc import LedgerNotFound
from tests.workers.test_cuda import CONFIG, allocate
from workers.pools.backends import open_pools
pools = []
while len(pools) < 2:
    try:
        pools.append(open_pools(sys.argv[1], len(pools), CONFIG.layout))
    except LedgerNotFound:
        time.sleep(0.01)
allocate(pools)
sys.stdin.read()
"""


def map_published(manager: CacheManager) -> None:
    """Look at device tensors that another process owns."""
    driver = Driver()
    driver.use(driver.retain(0))
    for pool in manager.pools:
        published = Published.read(pool._memory.device_object)
        assert published is not None and published.owner[0] != os.getpid()
        pool._tensors = [tensor_at(driver.open(handle), pool.layout, 64) for handle in published.handles]


def serve_some(manager: CacheManager) -> int:
    engine = PatternEngine(manager.pools)
    return sum(serve(manager, engine, str(i), prompt(i % 2, 15)) for i in range(8))


@pytest.fixture
def runner() -> Iterator[str]:
    """A process that owns the device tensors of a ledger; the fixture is the ledger's name."""
    name = f"cuda-{os.getpid()}"
    process = subprocess.Popen([sys.executable, "-c", _RUNNER, name], stdin=subprocess.PIPE)
    yield name
    process.communicate(b"")


def test_the_tensors_may_belong_to_another_process(standin: Standin, runner: str) -> None:
    with CacheManager.create(runner, CONFIG) as manager:
        map_published(manager)
        assert serve_some(manager) > 40
        assert manager.stats()["swapped_in_blocks"] > 20


_ENGINE = """
import os, signal, sys
from kvledger import CacheManager
from tests.workers.test_cuda import CONFIG, allocate, map_published, serve_some
name, owner = sys.argv[1:]
manager = CacheManager.create(name, CONFIG, publish=allocate if owner == "engine" else None)
if owner == "runner":
    map_published(manager)
serve_some(manager)
while manager.state.transfers:
    manager.poll()
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_engine_until_it_dies(name: str, owner: str) -> None:
    done = subprocess.run([sys.executable, "-c", _ENGINE, name, owner], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_device_tier_outlives_an_engine_that_does_not_own_it(standin: Standin, runner: str) -> None:
    run_engine_until_it_dies(runner, "runner")
    with CacheManager.open(runner) as manager:
        assert manager.config.layout == CONFIG.layout
        map_published(manager)
        engine = PatternEngine(manager.pools)
        assert manager.peek(prompt(1, 15), max_blocks=99) == (15, 0)
        assert serve(manager, engine, "warm", prompt(1, 15)) == 15


def test_the_device_tier_is_lost_with_the_process_that_owns_it(standin: Standin) -> None:
    name = f"cuda-{os.getpid()}"
    run_engine_until_it_dies(name, "engine")
    with CacheManager.open(name, publish=allocate) as manager:
        engine = PatternEngine(manager.pools)
        device, host = manager.peek(prompt(0, 15), max_blocks=99)
        assert device == 0 and host > 10, "what was on the host is still there"
        for i in range(4):
            serve(manager, engine, str(i), prompt(i % 2, 15))
        assert replays(manager)


def test_device_tensors_for_an_engine_that_is_gone_are_not_published(standin: Standin) -> None:
    """A rank that starts before its engine would else hand blank memory to the next one as its cache."""
    name = f"cuda-{os.getpid()}"
    run_engine_until_it_dies(name, "engine")
    with pytest.raises(
        LedgerNotFound, match=r"of rank 1 ended with process \d+: open .* when the manager has opened the ledger"
    ):
        allocate([open_pools(name, 1, CONFIG.layout)])
    with CacheManager.open(name, publish=allocate) as manager:
        assert manager.peek(prompt(0, 15), max_blocks=99)[0] == 0


def test_device_tensors_for_pools_that_were_replaced_are_not_published(standin: Standin) -> None:
    name = f"cuda-{os.getpid()}"
    try:
        before = create_pools(name, CONFIG.layout)
        now, lost = reopen_pools(name, CONFIG.layout, ids_of(before))
        assert set(lost) == {"device"}
        with pytest.raises(LedgerNotFound, match="has made the pools of rank 0 anew: open them again"):
            allocate(before)
        allocate(now)
        removed = create_pools(f"{name}-removed", CONFIG.layout)
        remove_objects(f"{name}-removed")
        with pytest.raises(LedgerNotFound, match="of rank 0 anew"):
            allocate(removed)
    finally:
        remove_objects(name)
