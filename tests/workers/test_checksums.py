"""Host blocks with checksums: damage is found before it is attended, told, and dropped."""

from __future__ import annotations

import json
import logging
import os
import signal
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy
from kvledger.cli import app
from kvledger.debugger.source import open_source
from statemachine.check import check
from statemachine.events import Direction, TransferStarted
from tests.adapters.fastdeploy_engine import manager as drop_in
from tests.waiting import wait_until
from workers import PoolLayout
from workers.pools.backends import create_pools, open_copies
from workers.pools.interface import Ended
from workers.pools.memory import PoolMemory

BLOCK = 4
TOKENS = np.arange(4 * BLOCK, dtype=np.int32)
NONE = array("Q")


def config(policy: HostPolicy = HostPolicy.EXCLUSIVE, checksums: bool = True) -> CacheConfig:
    return CacheConfig(
        block_size=BLOCK,
        device_blocks=4,
        host_blocks=8,
        host_policy=policy,
        ranks=2,
        layers=2,
        block_bytes=16,
        checksums=checksums,
    )


@pytest.fixture
def ledger() -> Iterator[str]:
    name = f"checksums-{os.getpid()}"
    yield name
    remove_objects(name)


def moved(transfer: int, direction: Direction, sources: list[int], targets: list[int]) -> TransferStarted:
    ids = array("i", sources), array("i", targets)
    return TransferStarted(transfer, direction, 0, 0, NONE, array("I"), NONE, array("I"), *ids)


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_what_stands_before_the_damage_is_copied(ledger: str, spoiled: int) -> None:
    layout = PoolLayout(1, 2, 16, 4, 4, checksums=True)
    (pools,) = create_pools(ledger, layout)
    copies = open_copies(ledger, 0, layout, lambda reason: None)
    pools.tensor(0, "kv")[:] = np.arange(4, dtype=np.uint8)[:, None] + 1
    copies.start(moved(1, Direction.SWAP_OUT, [0, 1, 2], [3, 1, 0]))
    copies.start(moved(2, Direction.BACKUP, [3], [2]))
    assert copies.ended() == [Ended(1, 3), Ended(2, 1)]
    pools.tensor(0, "kv")[:] = 99
    host = [3, 1, 0][spoiled]
    pools.host[host, 1, 15] ^= 1
    copies.start(moved(3, Direction.SWAP_IN, [3, 1, 0], [0, 1, 2]))
    copies.start(moved(4, Direction.SWAP_IN, [2], [3]))
    assert copies.busy()
    reason = f"host block {host} of rank 0 is not what was written"
    assert sorted(copies.ended()) == [Ended(3, spoiled, reason, corrupt=True), Ended(4, 1)]
    assert not copies.busy()
    back = pools.tensor(0, "kv")[:, 0].tolist()
    assert back == [*[1, 2, 3][:spoiled], *[99] * (3 - spoiled), 4]
    copies.close()


def test_a_block_that_is_none_is_an_error_as_without_checksums(ledger: str) -> None:
    layout = PoolLayout(1, 2, 16, 4, 4, checksums=True)
    create_pools(ledger, layout)
    copies = open_copies(ledger, 0, layout, lambda reason: None)
    copies.start(moved(1, Direction.SWAP_IN, [4], [0]))
    (ended,) = copies.ended()
    assert "IndexError" in ended.error and not ended.corrupt


def swapped_out(manager: CacheManager) -> int:
    """Cache a prompt of four blocks, and push it out to the host. Returns the host block of its third block."""
    manager.admit("a", TOKENS, max_blocks=4)
    for pools in manager.pools:
        pools.tensor(0, "kv")[:] = 7
    manager.cache("a")
    manager.release("a")
    wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
    manager.make_room(4)
    wait_until("nothing is in flight", lambda: not manager.state.transfers, meanwhile=manager.poll)
    assert manager.peek(TOKENS, max_blocks=99) == (0, 4)
    (run,) = manager.state.nodes.values()
    assert run.host is not None
    return run.host.ids[2]


@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_a_damaged_block_is_never_attended(ledger: str, policy: HostPolicy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kvledger.manager.notices")
    with CacheManager.create(ledger, config(policy)) as manager:
        host = swapped_out(manager)
        manager.pools[1].host[host, 0, 0] ^= 0x40  # one bit, on one rank
        assert not manager.match("b", TOKENS, max_blocks=4).ready
        progress = manager.wait("b")
        assert progress.shortened and progress.cached_blocks == 2
        assert manager.peek(TOKENS, max_blocks=99) == (2, 0)  # the rest has left the host tier, too
        assert not check(manager.state)
        manager.allocate({"b": 2})
        manager.cache("b")
        manager.release("b")
        assert manager.peek(TOKENS, max_blocks=99) == (4, 0)
        assert not check(manager.state)
    told = [record.getMessage() for record in caplog.records]
    assert any(text.startswith("host_block_corrupt") and f"host block {host} of rank 1" in text for text in told)
    assert any(text.startswith("transfer_corrupt") for text in told)


def test_without_checksums_nobody_notices(ledger: str) -> None:
    with CacheManager.create(ledger, config(checksums=False)) as manager:
        host = swapped_out(manager)
        manager.pools[1].host[host, 0, 0] ^= 0x40
        manager.match("b", TOKENS, max_blocks=4)
        manager.wait("b")
        assert manager.cached_blocks("b") == 4
        assert manager.pools[1].tensor(0, "kv")[manager.block_table("b")[2]][0] == 7 ^ 0x40


def test_checksums_outlive_engine_and_workers(ledger: str) -> None:
    with CacheManager.create(ledger, config()) as first:
        host = swapped_out(first)
        for rank in range(2):
            pid = first.worker_pid(rank)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        first.close(keep=True)
    with pytest.raises(ConfigError, match="checksums is True in this ledger, not False"):
        CacheManager.open(ledger, config(checksums=False))
    with CacheManager.open(ledger) as second:
        assert second.config.checksums
        second.pools[0].host[host, 1, 3] += 1
        assert not second.match("b", TOKENS, max_blocks=4).ready
        progress = second.wait("b")
        assert progress.shortened and progress.cached_blocks == 2


def test_the_table_stands_behind_the_host_pool(ledger: str) -> None:
    layout = PoolLayout(1, 2, 16, 4, 4, checksums=True)
    create_pools(ledger, layout)
    memory = PoolMemory(ledger, 0, layout)
    assert memory.checksums.shape == (4,) and memory.host.shape == (4, 2, 16)
    assert PoolLayout.parse(layout.text()) == layout
    plain = layout._replace(checksums=False)
    assert "checksums" not in plain.text() and PoolLayout.parse(plain.text()) == plain


def test_a_setting_that_is_none() -> None:
    with pytest.raises(ConfigError, match="checksums must be True or False, not 'yes'"):
        CacheConfig(device_blocks=1, checksums="yes")  # type: ignore[arg-type]


def test_a_whole_run_with_checksums(tmp_path: Path) -> None:
    path = tmp_path / "run.kvlog"
    sizes = ["--requests", "150", "--device-blocks", "200", "--host-blocks", "400", "--name", f"checked-{os.getpid()}"]
    done = CliRunner().invoke(app, ["run", "--checksums", *sizes, "--record", str(path), "--json"])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.output)
    assert summary["moved_blocks"]["swap_in"] > 0 and not summary["stats"]["failed_transfers"]
    with open_source(str(path)) as source:
        assert PoolLayout.parse(source.at(1).opened.layout).checksums


@pytest.mark.parametrize("wanted", [True, False])
def test_over_fastdeploys_interface(wanted: bool) -> None:
    with drop_in(gpu=4, cpu=4, **({"kv_checksums": True} if wanted else {})) as it:
        assert it.manager.config.checksums is wanted
