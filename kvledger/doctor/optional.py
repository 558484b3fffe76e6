"""The parts that one can do without."""

from __future__ import annotations

import importlib.util
import resource

from kvledger.doctor.finding import Finding, note, ok, size
from workers.cuda_driver import CudaError, Driver

EXTRAS = {
    "paddle": ("paddle",),
    "metrics": ("prometheus_client",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "plot": ("matplotlib",),
    "export": ("pyarrow", "perfetto"),
    "testing": ("hypothesis",),
}
"""By extra of the distribution, the modules it brings. ``paddle-gpu`` brings what ``paddle`` does."""

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
    """Whether there is a GPU for the backends ``cuda`` and ``paddle-gpu``."""
    try:
        driver = Driver()
        devices = driver.devices()
    except CudaError as error:
        return note(f"none to be used: {error}", _DRIVER)
    if not devices:
        return note("a driver, and no device", "show the process one: CUDA_VISIBLE_DEVICES, --gpus of the container")
    found = f"{devices} {'device' if devices == 1 else 'devices'}"
    notes, advice = [], []
    if not driver.has_batches:
        notes.append("a driver before CUDA 12.8, which is given each copy by a call of its own")
        advice.append("a newer driver moves many small blocks faster")
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY:
        notes.append(f"{size(limit)} may be locked (ulimit -l)")
        advice.append("if a worker cannot pin the host pool: ulimit -l unlimited")
    return note(f"{found}; {'; '.join(notes)}", "; ".join(advice)) if notes else ok(found)
