"""Who a process is: its id alone can be reused, its id and start time cannot."""

from __future__ import annotations

import os


def start_time(pid: int) -> int:
    """Start time of a process in clock ticks since boot (``/proc/<pid>/stat``, field 22); 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(pid: int, started: int) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    return pid != 0 and started != 0 and start_time(pid) == started


def own_identity() -> tuple[int, int]:
    """``(pid, start time)`` of this process."""
    pid = os.getpid()
    return pid, start_time(pid)
