"""Asking again and again whether something is done: in a loop, or in an event loop beside other tasks."""

from __future__ import annotations

import time
from collections.abc import Callable

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


async def loop_async(done: Callable[[], object], timeout: float) -> bool:
    """Ask until it is done, while other tasks of the event loop run. Returns whether it is done."""
    import asyncio  # a third of the package's import time; who has an event loop has it already

    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_LONGEST_PAUSE_S / 2)
    return True
