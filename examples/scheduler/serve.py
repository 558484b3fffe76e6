"""An asyncio front for the scheduler: any number of tasks ask, one of them computes."""

from __future__ import annotations

import asyncio

from examples.scheduler.scheduler import Request, Scheduler


async def generate(request: Request, scheduler: Scheduler) -> list[int]:
    """The tokens of a request after its last answer. A task that is cancelled gives its request up."""
    scheduler.submit(request)
    try:
        while not request.done.is_set():
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        scheduler.abort(request)
        raise
    return request.tokens


async def serve(scheduler: Scheduler) -> None:
    """Compute step by step, until it is cancelled."""
    while True:
        scheduler.step()
        await asyncio.sleep(0)
