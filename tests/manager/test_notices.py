"""An operator hears of what matters, and of nothing else."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.manager.notices import log_notices
from kvledger.manager.retention import Retention
from statemachine.events import EpochStarted, TierLost, TransferFinished
from tests.waiting import PATIENCE_S, wait_until

PROMPT = np.arange(40, dtype=np.int32)


def config(**settings: float) -> CacheConfig:
    return CacheConfig(
        block_size=4,
        device_blocks=12,
        host_blocks=32,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=1,
        block_bytes=64,
        transfer_timeout_s=settings.get("transfer_timeout_s", 30.0),
    )


def until(manager: CacheManager, caplog: pytest.LogCaptureFixture, name: str) -> logging.LogRecord:
    def said() -> list[logging.LogRecord]:
        return [record for record in caplog.records if getattr(record, "notice", "") == name]

    return wait_until(f"an operator hears of {name}", said, meanwhile=manager.poll)[0]


def test_a_killed_worker_and_its_successor(caplog: pytest.LogCaptureFixture) -> None:
    with CacheManager.create(f"notices-{os.getpid()}", config()) as manager:
        assert not caplog.records  # that a worker joined is no warning
        assert manager._ranks is not None
        os.kill(manager._ranks.supervisor.pid(0), signal.SIGKILL)
        lost = until(manager, caplog, "worker_lost")
        assert lost.name == "kvledger.manager.notices" and lost.levelno == logging.WARNING
        assert lost.getMessage().startswith(f'worker_lost ledger={manager.name} rank=0 incarnation=1 reason="killed by')
        assert vars(lost)["rank"] == 0 and vars(lost)["ledger"] == manager.name
        assert vars(until(manager, caplog, "worker_replaced"))["incarnation"] == 2


def test_a_transfer_that_times_out(caplog: pytest.LogCaptureFixture) -> None:
    with CacheManager.create(f"notices-{os.getpid()}", config(transfer_timeout_s=0.2)) as manager:
        assert manager._ranks is not None
        pid = manager._ranks.supervisor.pid(0)
        os.kill(pid, signal.SIGSTOP)
        try:
            manager.admit("a", PROMPT)
            manager.cache("a")
            manager.release("a")
            manager.admit("b", PROMPT + 100)
            assert vars(until(manager, caplog, "transfer_timed_out"))["valid_blocks"] == 0
        finally:
            os.kill(pid, signal.SIGCONT)


def test_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    log_notices("x", [TransferFinished(1, 0, 4, 0)])
    assert not caplog.records
    log_notices("x", [TierLost(1, "its memory is gone", ""), EpochStarted(2, 99)])
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert caplog.records[0].getMessage() == 'tier_lost ledger=x tier=host reason="its memory is gone"'


def test_a_log_that_no_snapshot_covers_is_said_to_be_over_its_limit_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retention, "_start", lambda self: None)  # no auditor can be started: nothing may go
    config = CacheConfig(block_size=4, device_blocks=64, segment_bytes=64 << 10, retain_bytes=128 << 10)
    with CacheManager.create(f"notices-{os.getpid()}", config) as manager:
        for number in range(2000):
            manager.admit(str(number), PROMPT + number % 9)
            manager.cache(str(number))
            manager.release(str(number))
        until(manager, caplog, "log_over_limit")
        assert manager.stats()["log_bytes"] > 2 * config.retain_bytes  # type: ignore[operator]
    (said,) = [record for record in caplog.records if vars(record)["notice"] == "log_over_limit"]
    assert vars(said)["log_limit_bytes"] == 128 << 10 < vars(said)["log_bytes"]


def test_quiet_by_default() -> None:
    """No handler of ours, and what the standard library prints by itself is one line per warning."""
    code = "import logging, kvledger; print(logging.root.handlers, logging.getLogger('kvledger').handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "[] []\n" and not done.stderr
