"""What is around the scheduler: an asyncio front, where any number of tasks ask and one computes; and the end."""

from __future__ import annotations

import asyncio
import time

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
    """Compute step by step, until it is cancelled (``loop.add_signal_handler(signal.SIGTERM, task.cancel)``)."""
    while True:
        scheduler.step()
        await asyncio.sleep(0)


def drain(scheduler: Scheduler, seconds: float) -> None:
    """End in order, before the manager is closed: afterwards no request holds anything.

    What has not begun is given back to its client. What runs is served for so many seconds, then aborted.
    """
    while scheduler.waiting:
        request = scheduler.waiting.popleft()
        request.failed = "the engine stops"
        request.done.set()
    deadline = time.monotonic() + seconds
    while scheduler.running or scheduler.waiting:  # a preempted request waits, too
        if time.monotonic() >= deadline:
            for request in [*scheduler.running.values(), *scheduler.waiting]:
                scheduler.abort(request)
        scheduler.step()
