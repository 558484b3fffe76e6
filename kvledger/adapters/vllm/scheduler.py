"""Putting the ledger into vLLM's scheduler: by class (``--scheduler-cls``), or into one that exists.

A subclass of vLLM's ``Scheduler`` switches asynchronous scheduling off, one of ``AsyncScheduler`` keeps it: there are
both.
"""

from __future__ import annotations

import logging
from typing import Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ipc import LedgerError
from kvledger.adapters.vllm.manager import LedgerKVCacheManager, expect_expressible
from kvledger.adapters.vllm.recorder import Recorder
from kvledger.adapters.vllm.requests import NULL_BLOCKS
from kvledger.adapters.vllm.settings import expect_version, settings
from kvledger.config import CacheConfig, ConfigError
from kvledger.manager.manager import CacheManager
from kvledger.text import printable

_log = logging.getLogger(__name__)


class LedgerScheduler(Scheduler):
    """vLLM's scheduler with a ledger: ``--scheduler-cls kvledger.adapters.vllm.LedgerScheduler``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_over(self)


class LedgerAsyncScheduler(AsyncScheduler):
    """vLLM's asynchronous scheduler with a ledger: ``--scheduler-cls kvledger.adapters.vllm.LedgerAsyncScheduler``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        take_over(self)


def take_over(scheduler: Scheduler) -> CacheManager:
    """Replace the block manager of a scheduler that has not scheduled anything yet.

    ``schedule`` and ``update_from_output`` become one transaction each, numbered by the step; ``shutdown`` closes the
    ledger. Returns the ledger's manager.

    Raises:
        ConfigError: this vLLM or this model is not one that a ledger can serve, or a setting is wrong.
        ipc.WriterAlive: an engine of that name runs.
    """
    own = scheduler.kv_cache_manager
    ledger = _ledger_of(scheduler)
    scheduler.kv_cache_manager = LedgerKVCacheManager(ledger, own)
    _without_hashes(scheduler)
    _in_steps(scheduler, ledger)
    _log.info("ledger %s: %d blocks of %d tokens", ledger.name, ledger.config.device_blocks, ledger.config.block_size)
    return ledger


def record(scheduler: Scheduler, name: str) -> Recorder | None:
    """Record what the block manager of a scheduler does, which has not scheduled anything yet, under that name.

    Whatever stands in the way is logged as a warning, and the engine runs without: ``None``.
    """
    try:
        ledger = _ledger_of(scheduler, name)
    except (ConfigError, LedgerError) as error:
        _log.warning("kvledger records nothing of this engine: %s", printable(str(error)))
        return None
    _log.info("ledger %s records %d blocks", ledger.name, ledger.config.device_blocks)
    return Recorder(scheduler, ledger)


def _ledger_of(scheduler: Any, name: str = "") -> CacheManager:
    expect_version(vllm.__version__)
    own = scheduler.kv_cache_manager
    expect_expressible(scheduler.kv_cache_config, own)
    if scheduler.connector is not None:
        raise ConfigError("a KV connector moves blocks that the ledger does not know of: leave kv_transfer_config out")
    if scheduler.enable_kv_cache_events and not name:
        raise ConfigError("KV events come from the log (kvledger events NAME): leave kv_events_config out")
    config = scheduler.vllm_config
    wanted = settings(config.additional_config, config.parallel_config.data_parallel_rank, name)
    return _opened(
        wanted.name,
        CacheConfig(
            block_size=own.coordinator.single_type_managers[0].block_size,
            device_blocks=scheduler.kv_cache_config.num_blocks - NULL_BLOCKS,
            segment_bytes=wanted.segment_bytes,
            retain_bytes=wanted.retain_bytes,
        ),
    )


def _opened(name: str, config: CacheConfig) -> CacheManager:
    """The ledger of this engine, with all device blocks free: what a dead one had computed died with it."""
    started = CacheManager.open_or_create(name, config, replace_dead=True)
    if started.warm:
        started.manager.clear(force=True)
    return started.manager


def _without_hashes(scheduler: Any) -> None:
    """Spare requests the hashing of every block they fill: a ledger compares tokens."""
    add = scheduler.add_request

    def added(request: Any) -> Any:
        request._block_hasher = None
        return add(request)

    scheduler.add_request = added


def _in_steps(scheduler: Any, ledger: CacheManager) -> None:
    schedule, update, shutdown = scheduler.schedule, scheduler.update_from_output, scheduler.shutdown
    number = 0

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        if not number:
            ledger.adopt_thread()  # engines make a scheduler in one thread and may run it in another
        number += 1
        with ledger.step(number):
            return schedule(*args, **kwargs)

    def updated(*args: Any, **kwargs: Any) -> Any:
        with ledger.step(number):
            return update(*args, **kwargs)

    def closed(*args: Any, **kwargs: Any) -> Any:
        try:
            return shutdown(*args, **kwargs)
        finally:
            ledger.close()

    scheduler.schedule, scheduler.update_from_output, scheduler.shutdown = scheduled, updated, closed
