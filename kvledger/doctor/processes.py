"""Whether workers can be started, where they run, and who was here before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from ipc import memory
from ipc.liveness import Lock, NoLocks
from ipc.names import SHM
from ipc.ownership import unlink
from ipc.processes import own_identity
from kvledger.doctor.finding import Finding, note, ok, problem, size
from kvledger.doctor.installation import ROOT
from kvledger.doctor.ledgers import ledgers
from workers.processes.acknowledgements import signals_name
from workers.processes.programs import environment, python

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_WORKER = "import workers.transfer; print(workers.transfer.__file__)"
_HOLD = """
import sys
from ipc.liveness import Lock
lock = Lock.on(sys.argv[1])
lock.take()
print(flush=True)
sys.stdin.read()
"""
_TIMEOUT_S = 30.0
_MOST_NAMES = 3


def worker() -> Finding:
    """Whether the interpreter can be started as a worker, and imports the worker that belongs to this kvledger."""
    command = python("-c", _WORKER)
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return problem(
            f"{command[0]} cannot be started: {error}",
            "raise what limits processes (ulimit -u, pids.max of the container)",
        )
    advice = "take what hides kvledger off PYTHONPATH, or give it an environment of its own"
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        return problem(f"a worker cannot be started with {command[0]}: {reason}", advice)
    place = Path(done.stdout.strip()).parents[1].resolve()
    if place != ROOT:
        return problem(f"a worker imports kvledger from {place}, this process from {ROOT}", advice)
    return ok(f"{command[0]} starts workers")


def who_lives(ledger: str) -> Finding:
    """Whether the lock of a living process is seen, and is given up when it dies; and what else tells who lives."""
    name = signals_name(ledger, 0, 0)
    memory.create(name, 4096).close()
    lock = Lock.on(name)
    try:
        command = python("-c", _HOLD, name)
        holder = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert holder.stdout is not None
            holder.stdout.readline()
            seen = lock.is_taken()
        finally:
            holder.kill()
            holder.communicate()
        if not seen or lock.is_taken():
            what = "kept after its process was killed" if seen else "not seen by another process"
            return problem(
                f"a lock on shared memory (fcntl F_OFD_SETLK) is {what}: who lives and who died is not known",
                f"mount {SHM} as a plain tmpfs; a sandbox has to allow these locks",
            )
    except NoLocks as error:
        return problem(str(error), "allow fcntl(F_OFD_SETLK) to the engine and its workers")
    finally:
        lock.close()
        unlink(name)
    found = "a lock is seen, and given up when its process is killed"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return note(f"{found}; pidfd_open is refused ({error.strerror})", "nothing needs to be done: it is not needed")
    if not own_identity().namespace:
        return note(
            f"{found}; /proc belongs to another PID namespace",
            "mount /proc anew in this namespace: else a worker that outlived its engine is ended only if it listens",
        )
    return ok(found)


def cores() -> Finding:
    """How many processors there are for the engine's thread and the workers: they poll."""
    count = float(len(os.sched_getaffinity(0)))
    limited = ""
    try:
        quota, period = _CPU_LIMIT.read_text().split()
        if quota != "max" and int(quota) / int(period) < count:
            count, limited = int(quota) / int(period), " (cpu.max of the container)"
    except FileNotFoundError:  # no container, or one of cgroup v1
        pass
    found = f"{count:g} {'core' if count == 1 else 'cores'}{limited}"
    if count < 2:
        return note(
            f"{found}: the engine and a worker take turns", "give it a core for each rank and one for the engine"
        )
    return ok(f"{found}, enough for {int(count) - 1} {'rank' if count < 3 else 'ranks'} and the engine")


def left_behind() -> Finding:
    """Ledgers of engines that are gone, and of other users."""
    found = ledgers()
    parts, advice = [], []
    for state in ("dead", "other user"):
        some = [ledger for ledger in found if ledger.state == state]
        if not some:
            continue
        names = ", ".join(ledger.name for ledger in some[:_MOST_NAMES])
        more = f" and {len(some) - _MOST_NAMES} more" if len(some) > _MOST_NAMES else ""
        whose = "dead" if state == "dead" else "of other users"
        parts.append(f"{len(some)} {whose} ({size(sum(ledger.bytes for ledger in some))}): {names}{more}")
        if state == "dead":
            advice.append(
                "CacheManager.open() takes a dead one over, kvledger segments --remove-dead frees their memory"
            )
        else:
            advice.append("kvledger segments says whose they are")
    if parts:
        return note("; ".join(parts), "; ".join(advice))
    return ok(f"{len(found)} in use, none left behind" if found else "none")
