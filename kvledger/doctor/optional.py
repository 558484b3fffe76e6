"""The parts that one can do without."""

from __future__ import annotations

import importlib.util
import resource
import subprocess

from kvledger.doctor.finding import Finding, note, ok, problem, size
from workers.processes.programs import environment, python

EXTRAS = {
    "paddle": ("paddle",),
    "metrics": ("prometheus_client",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "plot": ("matplotlib",),
    "events": ("msgpack", "zmq"),
    "export": ("pyarrow", "perfetto"),
    "testing": ("hypothesis",),
}
"""By extra of the distribution, the modules it brings. ``paddle-gpu`` brings what ``paddle`` does."""

_ASK = (
    "from workers.pools.cuda_driver import Driver; driver = Driver(); print(driver.devices(), int(driver.has_batches))"
)
_TIMEOUT_S = 30.0
_DRIVER = "only the backends cuda and paddle-gpu need one: its driver, in a container --gpus"


def extras() -> Finding:
    """Which extras are installed."""
    there = [name for name, modules in EXTRAS.items() if all(map(_exists, modules))]
    missing = [name for name in EXTRAS if name not in there]
    found = f"installed: {', '.join(there) or 'none'}"
    if not missing:
        return ok(found)
    return note(f"{found}; not: {', '.join(missing)}", f"what you want of them: pip install 'kvledger[{missing[0]}]'")


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def gpu() -> Finding:
    """Whether there is a GPU for the backends ``cuda`` and ``paddle-gpu``.

    A process of its own asks: the driver of a sick GPU may hang, or end who called it.
    """
    command = python("-c", _ASK)
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return problem(f"the driver does not answer within {_TIMEOUT_S:g} s", "see what dmesg says about the GPU")
    if done.returncode < 0:
        return problem(f"the driver ends who asks it by signal {-done.returncode}", "see what dmesg says about the GPU")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return note(f"none to be used: {reason.removeprefix('workers.pools.cuda_driver.CudaError: ')}", _DRIVER)
    devices, has_batches = map(int, done.stdout.split())
    if not devices:
        return note("a driver, and no device", "show the process one: CUDA_VISIBLE_DEVICES, --gpus of the container")
    found = f"{devices} {'device' if devices == 1 else 'devices'}"
    notes, advice = [], []
    if not has_batches:
        notes.append("a driver before CUDA 12.8, which is given each copy by a call of its own")
        advice.append("a newer driver moves many small blocks faster")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY:
        notes.append(f"{size(limit)} may be locked (ulimit -l)")
        advice.append("if a worker cannot pin the host pool: ulimit -l unlimited")
    return note(f"{found}; {'; '.join(notes)}", "; ".join(advice)) if notes else ok(found)
