"""From the engine's append to a worker that sees it, one way, beside what engines use today.

``python -m benchmarks.handoff`` (ZeroMQ: after ``pip install "kvledger[bench]"``). Times are stamped with the
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

from ipc import LogReader, LogWriter
from kvledger import CacheConfig, CacheManager, HostPolicy

COUNT = 3000
_WARM_UP = 500
"""Until the kernel has given both processes a core."""
_PERIOD_NS = 200_000


def _pace(next_at: int) -> int:
    while time.monotonic_ns() < next_at:
        pass
    return next_at + _PERIOD_NS


def _read_log(ledger: str, pipe: Any) -> None:
    reader = LogReader(ledger)
    pipe.send("ready")
    delays: list[int] = []
    while len(delays) < COUNT:
        for record in reader.poll():
            delays.append(time.monotonic_ns() - struct.unpack("<Q", record.args[:8])[0])
    reader.close()
    pipe.send(delays)


def log() -> list[int]:
    ledger = f"handoff-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_read_log, args=(ledger, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for i in range(COUNT):
        at = _pace(at)
        writer.append([(1, i, struct.pack("<Q", time.monotonic_ns()), b"")])
    delays: list[int] = ours.recv()
    process.join()
    writer.close(unlink=True)
    return delays


def _read_queue(queue: Any, pipe: Any) -> None:
    pipe.send("ready")
    delays = []
    for _ in range(COUNT):
        sent = queue.get()
        delays.append(time.monotonic_ns() - sent)
    pipe.send(delays)


def queue() -> list[int]:
    context = multiprocessing.get_context("spawn")
    channel = context.Queue()
    return _through(context, channel, channel.put)


def manager_queue() -> list[int]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        assert isinstance(manager, BaseManager)
        channel = manager.Queue()
        return _through(context, channel, channel.put)


def _through(context: Any, channel: Any, put: Any) -> list[int]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_queue, args=(channel, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for _ in range(COUNT):
        at = _pace(max(at, time.monotonic_ns()))
        put(time.monotonic_ns())
    delays: list[int] = ours.recv()
    process.join()
    return delays


def _read_zmq(address: str, pipe: Any) -> None:
    import zmq

    socket = zmq.Context().socket(zmq.PULL)
    socket.connect(address)
    pipe.send("ready")
    delays = []
    for _ in range(COUNT):
        (sent,) = struct.unpack("<Q", socket.recv())
        delays.append(time.monotonic_ns() - sent)
    pipe.send(delays)


def zeromq() -> list[int]:
    import zmq

    context = multiprocessing.get_context("spawn")
    address = f"ipc:///tmp/kvledger-handoff-{os.getpid()}"
    socket = zmq.Context().socket(zmq.PUSH)
    socket.bind(address)
    ours, theirs = context.Pipe()
    process = context.Process(target=_read_zmq, args=(address, theirs))
    process.start()
    ours.recv()
    at = time.monotonic_ns()
    for _ in range(COUNT):
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
        assert manager._ranks is not None
        pids = [manager._ranks.supervisor.pid(rank) for rank in range(2)]
        time.sleep(0.5)
        before = sum(map(_cpu_seconds, pids))
        time.sleep(seconds)
        return (sum(map(_cpu_seconds, pids)) - before) / seconds / len(pids)


def _cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    rows = {"kvledger log, spinning": log, "multiprocessing.Queue": queue, "BaseManager queue": manager_queue}
    try:
        import zmq  # noqa: F401

        rows["ZeroMQ ipc"] = zeromq
    except ImportError:
        print("ZeroMQ is not installed: pip install 'kvledger[bench]'")
    ours = 0.0
    for name, measure in rows.items():
        delays = sorted(measure()[_WARM_UP:])
        p50, p99 = statistics.median(delays) / 1e3, delays[len(delays) * 99 // 100] / 1e3
        ours = ours or p50
        print(f"{name:26} p50 {p50:8.1f} µs  p99 {p99:8.1f} µs  {p50 / ours:6.1f} x")
    print(f"an idle transfer worker takes {idle():.2%} of a core")


if __name__ == "__main__":
    main()
