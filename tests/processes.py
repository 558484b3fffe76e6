"""What tests ask about processes that they started, or saw started."""

from __future__ import annotations

from ipc.processes import start_time


def alive(pid: int, started: int) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    return pid != 0 and started != 0 and start_time(pid) == started
