"""The one way in which tests wait: for something that can be seen, however slow the machine is.

A test says what it waits for and how to see it. It never says how long that may take: the limit here is for what will
never come, far above what a slow or busy machine needs, and whoever reaches it is told what was waited for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = float(os.environ.get("KVLEDGER_PATIENCE_S", "600"))
"""How long a test waits for anything: also the limit of the processes it runs. The mutation check, which waits for what
its faults have broken, sets a shorter one."""


def wait_until(
    what: str, seen: Callable[[], T], *, meanwhile: Callable[[], object] | None = None, pause_s: float = 0.002
) -> T:
    """Look until something is seen, and return it.

    Args:
        what: what is waited for, as the end of a sentence: "the worker of rank 1 is replaced".
        seen: looks; a true answer ends the waiting, and is returned.
        meanwhile: called before each look, for what goes on only if somebody does it (``manager.poll``).
        pause_s: between two looks.

    Raises:
        AssertionError: it did not come within :data:`PATIENCE_S`; the message names it.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        if meanwhile is not None:
            meanwhile()
        found = seen()
        if found:
            return found
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s, and never came: {what}"
        time.sleep(pause_s)
