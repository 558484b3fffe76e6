"""What this process may open and map (``ulimit``)."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from kvledger.config import CacheConfig
from kvledger.doctor.finding import Finding, note, ok, problem, size
from kvledger.doctor.shared_memory import LEAST_BYTES

_FEW_FILES = 64
"""A ledger with one rank opens about twenty beside what Python has open."""
_USUAL_FILES = 1024


def open_files() -> Finding:
    """``ulimit -n``."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return ok("unlimited")
    found = f"{limit:,} (ulimit -n), {len(os.listdir('/proc/self/fd')) - 1} are open"
    advice = f"ulimit -n {_USUAL_FILES}"
    if most != resource.RLIM_INFINITY and most < _USUAL_FILES:
        advice = f"raise the hard limit, {most:,}: LimitNOFILE= of the service, --ulimit nofile= of the container"
    if limit < _FEW_FILES:
        return problem(f"{found}: too few for a ledger and its workers", advice)
    if limit < _USUAL_FILES:
        return note(f"{found}: an engine with many ranks and connections needs more", advice)
    return ok(found)


def file_size() -> Finding:
    """``ulimit -f``, which holds for shared memory too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == resource.RLIM_INFINITY:
        return ok("unlimited")
    found = f"{size(limit)} (ulimit -f), also for objects in shared memory"
    if limit < CacheConfig.segment_bytes:
        return problem(f"{found}: a log segment has {size(CacheConfig.segment_bytes)}", "ulimit -f unlimited")
    return note(f"{found}: a pool cannot be larger", "ulimit -f unlimited")


def address_space() -> Finding:
    """``ulimit -v``."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return ok("unlimited")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    found = f"{size(limit)} (ulimit -v), {size(used)} in use"
    if limit - used < LEAST_BYTES:
        return problem(f"{found}: a ledger cannot be mapped", "ulimit -v unlimited")
    return note(f"{found}: all pools and the log have to fit", "ulimit -v unlimited")
