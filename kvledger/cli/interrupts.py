"""Ctrl-C and SIGTERM: a wish that a loop looks at, so that what it is doing ends as a whole; or how a follower ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer

from kvledger.cli.exits import INTERRUPTED, OK


@contextmanager
def until_signal() -> Iterator[Callable[[], bool]]:
    """Inside, the two signals only set what the yielded function returns."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def until_asked(follows: bool = True) -> Iterator[None]:
    """What follows something ends when it is asked to: either signal, at any moment, is a clean end, exit code 0.

    Args:
        follows: false: what is inside has an end of its own, and to be interrupted is another thing.
    """
    if not follows:
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(OK) from None
    except typer.Exit as ended:
        raise typer.Exit(OK if ended.exit_code == INTERRUPTED else ended.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
