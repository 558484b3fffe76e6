"""From the engine's order to its event: append, worker, copy, acknowledgement, ``TransferFinished``.

``python -m benchmarks.roundtrip [--quick]``: a block of eight bytes is swapped out and in again by 1, 2, 4 and 8 ranks,
so that what is measured is the way there and back. Workers have just answered, so they spin, as long as there is a core
for each. Beside it: the same number of processes that answer over ZeroMQ, which decides, copies and records nothing.
Last, the way of the log alone: a record there, a record back.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import figures as f
from ipc import LogReader, LogWriter
from kvledger import CacheConfig, CacheManager, HostPolicy

_RANKS = (1, 2, 4, 8)
_TRIPS = 600
_WARM_UP = 100
_BLOCK = 16


def swaps(ranks: int, trips: int) -> list[float]:
    """µs from the order to its event, through a real manager and its workers."""
    config = CacheConfig(
        block_size=_BLOCK,
        device_blocks=1,
        host_blocks=1,
        host_staging_blocks=1,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=ranks,
        block_bytes=8,
    )
    tokens = np.arange(_BLOCK, dtype=np.int32)
    times: list[float] = []
    with CacheManager.create(f"roundtrip-{os.getpid()}", config) as manager:
        manager.admit("first", tokens)
        manager.cache("first")
        manager.release("first")

        def trip(order: Callable[[], object]) -> None:
            begun = time.perf_counter_ns()
            order()
            while manager.state.transfers:
                manager.poll()
            times.append((time.perf_counter_ns() - begun) / 1e3)

        for number in range(trips // 2):
            trip(lambda: manager.make_room(1))
            trip(lambda: manager.match(str(number), tokens, max_blocks=1))
            assert manager.cached_blocks(str(number)) == 1
            manager.release(str(number))
    return times


def _echo(address: str, back: str, pipe: Any) -> None:
    import zmq

    context = zmq.Context()
    orders, answers = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    orders.connect(address)
    answers.connect(back)
    pipe.send("ready")
    while message := orders.recv():
        answers.send(message)


def zeromq(ranks: int, trips: int) -> list[float]:
    """µs until all ranks have sent a message back."""
    import zmq

    context, spawn = zmq.Context(), multiprocessing.get_context("spawn")
    base = f"ipc:///tmp/kvledger-roundtrip-{os.getpid()}"
    answers = context.socket(zmq.PULL)
    answers.bind(f"{base}-back")
    orders, processes = [], []
    for rank in range(ranks):
        socket = context.socket(zmq.PUSH)
        socket.bind(f"{base}-{rank}")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_echo, args=(f"{base}-{rank}", f"{base}-back", theirs))
        process.start()
        ours.recv()
        orders.append(socket)
        processes.append(process)
    times = []
    for _ in range(trips):
        begun = time.perf_counter_ns()
        for socket in orders:
            socket.send(b"12345678")
        for _ in range(ranks):
            answers.recv()
        times.append((time.perf_counter_ns() - begun) / 1e3)
    for socket, process in zip(orders, processes):
        socket.send(b"")
        process.join()
    context.destroy()
    return times


def _answer(ledger: str, back: str, trips: int, pipe: Any) -> None:
    reader = LogReader(ledger)
    writer = LogWriter.create(back, schema_hash=1)
    pipe.send("ready")
    answered = 0
    while answered < trips:
        for record in reader.poll():
            writer.append([(1, record.subject, b"", b"")])
            answered += 1
    pipe.recv()
    reader.close()
    writer.close(unlink=True)


def log(trips: int) -> list[float]:
    """µs of a record there and a record back."""
    spawn = multiprocessing.get_context("spawn")
    ledger = f"roundtrip-{os.getpid()}"
    writer = LogWriter.create(ledger, schema_hash=1)
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_answer, args=(ledger, f"{ledger}-back", trips, theirs))
    process.start()
    ours.recv()
    reader = LogReader(f"{ledger}-back")
    times = []
    for number in range(trips):
        begun = time.perf_counter_ns()
        writer.append([(1, number, b"", b"")])
        while not reader.poll():
            pass
        times.append((time.perf_counter_ns() - begun) / 1e3)
    ours.send("end")
    process.join()
    reader.close()
    writer.close(unlink=True)
    return times


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """Per number of ranks; repetitions take turns."""
    skipped = []
    try:
        import zmq  # noqa: F401

        peer = True
    except ImportError:
        peer = False
        skipped.append("ZeroMQ is not installed: pip install 'kvledger[bench]'")
    trips = 140 if quick else _TRIPS
    made = []
    for ranks in (1, 2) if quick else _RANKS:
        ours, theirs, bare = [], [], []
        for _ in range(1 if quick else 3):
            ours.append(swaps(ranks, trips)[_WARM_UP:])
            if peer:
                theirs.append(zeromq(ranks, trips)[_WARM_UP:])
            if ranks == 1:
                bare.append(log(trips)[_WARM_UP:])
        name = f"swap of a block, {ranks} rank{'s' * (ranks > 1)}"
        own = [statistics.median(times) for times in ours]
        late = {"ours_p99_us": statistics.median(f.quantile(times, 0.99) for times in ours)}
        if peer:
            others = [statistics.median(times) for times in theirs]
            made.append(f.figure_of(f"{name}, p50", "µs", own, "ZeroMQ echo", others, details=late))
        if ranks == 1:
            floor = [statistics.median(times) for times in bare]
            made.append(f.figure_of(f"{name}, p50", "µs", own, "own log alone", floor, details=late, at_most=15.0))
            if peer:
                made.append(f.figure_of("log alone, p50", "µs", floor, "ZeroMQ echo", others))
    return made, skipped


if __name__ == "__main__":
    f.alone("round trip", figures)
