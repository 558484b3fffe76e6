"""A fork of the engine's process: it inherits the manager, and neither writes nor ends what is its parent's.

``multiprocessing`` forks by default on Linux before Python 3.14, and so do some engines. In the child every manager,
with its sender and receiver, is closed to calls, its ``close()`` does nothing, and the ledger's lock is its parent's
alone: it can be opened again when the parent dies, whether the child lives on or not.
"""

from __future__ import annotations

import contextlib
import os
from typing import Protocol


class Owned(Protocol):
    """Something of a process that is not its forks'."""

    def disown(self) -> None:
        """Become closed to calls in a fork; what belongs to the parent stays as it is."""


_living: dict[int, Owned] = {}
"""What this process owns, by ``id``: a compiled manager cannot be referred to weakly."""


def watch(manager: Owned) -> None:
    """Let every child disown this."""
    _living[id(manager)] = manager


def unwatch(manager: Owned) -> None:
    """Leave out what was closed."""
    _living.pop(id(manager), None)


def _in_child() -> None:
    for manager in _living.values():
        with contextlib.suppress(Exception):  # one that is half closed keeps no other from it
            manager.disown()
    _living.clear()


os.register_at_fork(after_in_child=_in_child)
