"""Order between two plain stores, or two plain loads, of different processes.

A *held* lock that is released and taken again is a full fence on every CPython; ``with lock: pass`` is not before 3.13
(checked with herd7 against Arm's formal memory model). The lock is never contended: it is this thread's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


def make_fence() -> tuple[Callable[[], object], Callable[[], object]]:
    """``(release, acquire)`` of a held lock; calling both, in this order, is the fence."""
    lock = threading.Lock()
    lock.acquire()
    return lock.release, lock.acquire
