"""Waiting for transfers: in a loop, or in an event loop beside other tasks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvledger.manager.ranks import Progress, table_of
from statemachine.decide import request_named

if TYPE_CHECKING:
    from kvledger.manager.manager import CacheManager

_LONGEST_PAUSE_S = 1e-3


def loop(done: Callable[[], object], timeout: float) -> bool:
    """Ask until it is done, or so many seconds have passed. Returns whether it is done."""
    deadline = time.monotonic() + timeout
    pause = 0.0
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause + 2e-6, _LONGEST_PAUSE_S)
    return True


def until(manager: CacheManager, done: Callable[[], bool], timeout: float) -> bool:
    """Fold until ``done()``, or so many seconds have passed. Returns whether it is done."""

    def folded() -> bool:
        manager.fold()
        return done()

    return loop(folded, timeout)


def wait(manager: CacheManager, key: str, timeout: float | None) -> list[Progress]:
    """See :meth:`CacheManager.wait`."""

    def ready() -> bool:
        if not manager.ready(key):
            manager.fold()
        return manager.ready(key)

    if not loop(ready, _limit(manager, timeout)):
        raise _late(manager, key)
    return manager.poll()


async def wait_async(manager: CacheManager, key: str, timeout: float | None) -> Progress:
    """See :meth:`CacheManager.wait_async`."""
    import asyncio  # a third of the package's import time; who has an event loop has it already

    deadline = time.monotonic() + _limit(manager, timeout)
    request = request_named(manager.state, key)
    promised = request.leaf.end
    while not manager.ready(key):
        manager.fold()
        if time.monotonic() > deadline:
            raise _late(manager, key)
        await asyncio.sleep(_LONGEST_PAUSE_S / 2)
    manager._told(request)
    return Progress(key, table_of(request), request.leaf.end, request.leaf.end < promised)


def _limit(manager: CacheManager, timeout: float | None) -> float:
    return 2 * manager.config.transfer_timeout_s if timeout is None else timeout


def _late(manager: CacheManager, key: str) -> TimeoutError:
    return TimeoutError(f"request {key!r} still waits for {[*request_named(manager.state, key).waits]}")
