"""A tiny ledger from end to end: the proof that everything works together."""

from __future__ import annotations

import time

import numpy as np

from ipc import LedgerError
from kvledger.config import CacheConfig
from kvledger.doctor.finding import Finding, ok, problem
from kvledger.manager.manager import CacheManager
from statemachine.events import HostPolicy
from workers.pools.numpy import NumpyPools
from workers.processes.supervisor import WorkerFailed

_TIMEOUT_S = 10.0
_BLOCK_SIZE, _BLOCK_BYTES = 4, 4096
_CONFIG = CacheConfig(
    block_size=_BLOCK_SIZE,
    device_blocks=3,
    host_blocks=2,
    host_policy=HostPolicy.EXCLUSIVE,
    ranks=1,
    block_bytes=_BLOCK_BYTES,
    ready_timeout_s=_TIMEOUT_S,
    transfer_timeout_s=_TIMEOUT_S,
)
_PROMPT = np.arange(2 * _BLOCK_SIZE + 1, dtype=np.int32)
_OTHER = _PROMPT + 1000


def trial(ledger: str) -> Finding:
    """Create a ledger with a worker, swap two blocks out and in again, compare their bytes, remove it."""
    began = time.perf_counter()
    advice = "mend what is said above; if nothing is, this is a defect of kvledger: please report it"
    try:
        manager = CacheManager.create(ledger, _CONFIG)
    except (LedgerError, WorkerFailed) as error:
        return problem(f"a ledger cannot be created: {error}", advice)
    with manager:
        created = time.perf_counter()
        try:
            wrong = _swap(manager)
        except (LedgerError, TimeoutError) as error:
            wrong = str(error)
        if wrong:
            return problem(f"two blocks were not swapped out and in: {wrong}", advice)
        swapped = time.perf_counter()
    ended = time.perf_counter()
    times = [f"{1e3 * seconds:.0f} ms" for seconds in (created - began, swapped - created, ended - swapped)]
    return ok(
        f"a ledger with a worker created in {times[0]}, two blocks swapped out and in with their bytes in {times[1]}, "
        f"removed in {times[2]}"
    )


def _swap(manager: CacheManager) -> str:
    """What is wrong, if anything is."""
    pools = manager.pools[0]
    assert isinstance(pools, NumpyPools)
    kept = np.frombuffer(np.random.default_rng().bytes(2 * _BLOCK_BYTES), np.uint8).reshape(2, _BLOCK_BYTES)
    table = manager.admit("first", _PROMPT).block_table
    pools.device[0, table[:2]] = kept
    manager.cache("first")
    manager.release("first")
    table = manager.admit("second", _OTHER).block_table  # takes all blocks: the first request's go to the host
    manager.wait("second", 2 * _TIMEOUT_S)
    pools.device[0, table] = 0
    manager.release("second")
    admission = manager.admit("third", _PROMPT)
    if admission.host_blocks != 2:
        return f"{admission.host_blocks} of 2 blocks were found on the host"
    if manager.wait("third", 2 * _TIMEOUT_S).shortened:
        return "the worker could not copy them"
    if not np.array_equal(pools.device[0, admission.block_table[:2]], kept):
        return "they came back with other bytes"
    return ""
