"""From the engine's append to a worker that sees it, one way, beside what engines use today.

``python -m benchmarks.handoff [--quick]`` (ZeroMQ: after ``pip install "kvledger[bench]"``). Times are stamped with the
machine's monotonic clock in both processes; a message every 200 µs, so that the spinning reader finds an empty log.
Last, what two transfer workers cost that have nothing to do.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import struct
import time
from multiprocessing.managers import BaseManager
from typing import Any

from benchmarks import figures as f
from ipc import LogReader, LogWriter
from kvledger import CacheConfig, CacheManager, HostPolicy

_COUNT = 3000
_WARM_UP = 500
"""Until the kernel has given both processes a core."""
_PERIOD_NS = 200_000


def _pace(next_at: int) -> int:
    while time.monotonic_ns() < next_at:
        pass
    return next_at + _PERIOD_NS


def _read_log(ledger: str, count: int, pipe: Any) -> None:
    reader = LogReader(ledger)
    pipe.send("ready")
    delays: list[int] = []
    while len(delays) < count:
        for record in reader.poll():
            delays.append(time.monotonic_ns() - struct.unpack("<Q", record.args[:8])[0])
    reader.close()
    pipe.send(delays)


def log(count: int) -> list[int]:
    ledger = f"handoff-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_read_log, args=(ledger, count, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for i in range(count):
        at = _pace(at)
        writer.append([(1, i, struct.pack("<Q", time.monotonic_ns()), b"")])
    delays: list[int] = ours.recv()
    process.join()
    writer.close(unlink=True)
    return delays


def _read_queue(queue: Any, count: int, pipe: Any) -> None:
    pipe.send("ready")
    delays = []
    for _ in range(count):
        sent = queue.get()
        delays.append(time.monotonic_ns() - sent)
    pipe.send(delays)


def queue(count: int) -> list[int]:
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    return _through(context, channel, channel.put, count)


def manager_queue(count: int) -> list[int]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        assert isinstance(manager, BaseManager)
        channel = manager.Queue()
        return _through(context, channel, channel.put, count)


def _through(context: Any, channel: Any, put: Any, count: int) -> list[int]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_queue, args=(channel, count, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for _ in range(count):
        at = _pace(max(at, time.monotonic_ns()))
        put(time.monotonic_ns())
    delays: list[int] = ours.recv()
    process.join()
    return delays


def _read_zmq(address: str, count: int, pipe: Any) -> None:
    import zmq

    socket = zmq.Context().socket(zmq.PULL)
    socket.connect(address)
    pipe.send("ready")
    delays = []
    for _ in range(count):
        (sent,) = struct.unpack("<Q", socket.recv())
        delays.append(time.monotonic_ns() - sent)
    pipe.send(delays)


def zeromq(count: int) -> list[int]:
    import zmq

    context = multiprocessing.get_context("spawn")
    address = f"ipc:///tmp/kvledger-handoff-{os.getpid()}"
    socket = zmq.Context().socket(zmq.PUSH)
    socket.bind(address)
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_zmq, args=(address, count, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for _ in range(count):
        at = _pace(at)
        socket.send(struct.pack("<Q", time.monotonic_ns()))
    delays: list[int] = ours.recv()
    process.join()
    socket.close()
    return delays


def idle(seconds: float = 10.0) -> float:
    """Share of one core that an idle transfer worker takes."""
    config = CacheConfig(device_blocks=64, host_blocks=64, host_policy=HostPolicy.EXCLUSIVE, ranks=2)
    with CacheManager.create(f"idle-{os.getpid()}", config) as manager:
        pids = [manager.worker_pid(rank) or 0 for rank in range(2)]
        time.sleep(0.5)
        before = sum(map(_cpu_seconds, pids))
        time.sleep(seconds)
        return (sum(map(_cpu_seconds, pids)) - before) / seconds / len(pids)


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """One way beside each peer, by repetitions that take turns; then what idling costs."""
    ways = {"": log, "multiprocessing.Queue": queue, "BaseManager queue": manager_queue}
    skipped = []
    try:
        import zmq  # noqa: F401

        ways["ZeroMQ ipc"] = zeromq
    except ImportError:
        skipped.append("ZeroMQ is not installed: pip install 'kvledger[bench]'")
    p50s: dict[str, list[float]] = {}
    p99s: dict[str, list[float]] = {}
    for _ in range(1 if quick else 3):
        for name, measure in ways.items():
            delays = measure(_WARM_UP + 200 if quick else _COUNT)[_WARM_UP:]
            p50s.setdefault(name, []).append(statistics.median(delays) / 1e3)
            p99s.setdefault(name, []).append(f.quantile(delays, 0.99) / 1e3)
    ours, ours_99 = p50s.pop(""), p99s.pop("")
    made = []
    for peer, theirs in p50s.items():
        made.append(f.figure_of("one way, p50", "µs", ours, peer, theirs, at_most=4.0))
        made.append(f.figure_of("one way, p99", "µs", ours_99, peer, p99s[peer]))
    share = max(idle(1.0 if quick else 10.0), 1e-4)
    made.append(f.figure_of("an idle transfer worker", "% of a core", [100 * share], "a core", [100.0], at_most=1.0))
    return made, skipped


if __name__ == "__main__":
    f.alone("hand-off", figures)
