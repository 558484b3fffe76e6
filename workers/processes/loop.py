"""The loop that every worker of a ledger runs in: announce itself, get ready, step until asked to end or orphaned.

A transfer worker and a pusher differ in what a step is; the words in which they tell a supervisor how they are, and
when they leave, are the same, and stand here.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Protocol

from ipc import Control, LedgerError, LedgerNotFound, LogReader
from ipc.signals import Signals
from workers.pools.layout import PoolLayout
from workers.processes import acknowledgements
from workers.processes.presence import Presence

READY, HEARTBEAT = 0, 8
"""Words of a worker's signals, on cache lines of their own. Who it is: :mod:`workers.processes.presence`."""
STARTING, IS_READY, HAS_FAILED = 0, 1, 2
"""What ``READY`` says."""
ORPHAN_GRACE_S = 5.0
"""A worker whose engine died waits so long for the next one."""
_PARK_S = 0.25


class Worker(Protocol):
    """What :func:`run` runs."""

    reader: LogReader
    superseded: bool

    def step(self, timeout: float = 0.0) -> int:
        """The whole loop body; returns how much it has done."""

    def close(self) -> None:
        """Give back what the worker holds; its answers stay."""


def run(
    arguments: list[str],
    make: Callable[[str, int, int, int, PoolLayout, int, Callable[[str], None]], Worker],
    orphan_grace_s: float = ORPHAN_GRACE_S,
) -> int:
    """Run a worker until SIGTERM, or until it is not wanted any more, or its engine is gone. Returns the exit status.

    Args:
        arguments: ``ledger rank incarnation epoch from_sequence layout``, as a supervisor gives them.
        make: makes the worker from these, parsed; its last argument is told what the worker waits for, if it does, and
            raises ``InterruptedError`` when there is no use in waiting.
        orphan_grace_s: a worker whose engine died waits so long for the next one.
    """
    ledger, rank, incarnation, epoch, from_sequence = arguments[0], *map(int, arguments[1:5])
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine, which then stops its workers
    try:
        signals = Signals(acknowledgements.signals_name(ledger, rank, incarnation))
        presence = Presence.announce(signals)
    except LedgerNotFound:  # its engine died before this process began, and the next one has tidied up
        return 1
    except LedgerError as error:
        signals.text = f"{type(error).__name__}: {error}"
        signals.words[READY] = HAS_FAILED
        return 1
    if presence is None:
        return 1

    def waiting(reason: str) -> None:
        signals.text = reason
        control = Control.open(ledger)
        if stopping or presence.is_unwanted() or not control.writer_alive():
            raise InterruptedError(reason)
        control.close()

    try:
        layout = PoolLayout.parse(arguments[5])
        worker = make(ledger, rank, incarnation, epoch, layout, from_sequence, waiting)
    except Exception as error:  # the reason travels to the engine, which raises it
        signals.text = f"{type(error).__name__}: {error}"
        signals.words[READY] = HAS_FAILED
        return 1
    signals.words[READY] = IS_READY
    try:
        orphan_since = 0.0
        while not (stopping or worker.superseded or presence.is_unwanted()):
            if not worker.step(_PARK_S):
                if worker.reader.writer_alive():
                    orphan_since = 0.0
                else:
                    orphan_since = orphan_since or time.monotonic()
                    if time.monotonic() - orphan_since > orphan_grace_s:
                        break
            signals.words[HEARTBEAT] = time.time_ns()
    except Exception as error:
        signals.text = f"{type(error).__name__}: {error}"
        signals.words[READY] = HAS_FAILED
        return 1
    finally:
        worker.close()
        signals.close()
        presence.close()
    return 0
