"""How long an engine needs to take over a dead one's ledger, with a million blocks cached.

``python -m benchmarks.recovery [--quick]``: an engine is killed (SIGKILL) with a full cache; the next one opens its
ledger, first from the log alone, then from a snapshot and what followed. Beside it: reading that log with its
checksums, without applying it. Last, what the snapshot itself costs (a follower writes it), beside copying its bytes.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from typing import Any

import numpy as np

from benchmarks import figures as f
from ipc import LogReader, snapshots
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager
from statemachine.records.snapshot import snapshot

_BLOCK, _RUN = 16, 32


def _serve(manager: CacheManager, requests: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(requests):
        key = f"{seed}-{number}"
        manager.admit(key, rng.integers(0, 128_000, _RUN * _BLOCK, np.int32))
        manager.cache(key)
        manager.release(key)


def _fill(ledger: str, blocks: int, pipe: Any) -> None:
    config = CacheConfig(block_size=_BLOCK, device_blocks=blocks, retain_bytes=None)
    _serve(CacheManager.create(ledger, config), blocks // _RUN, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def _take_over(ledger: str, take_snapshot: bool, pipe: Any) -> None:
    """Sends seconds of reading the log and of opening it, the cached blocks, and seconds of a snapshot; then dies."""
    logging.disable(logging.WARNING)  # that an epoch started is no news here
    begun = time.perf_counter()
    reader = LogReader(ledger)
    while reader.poll():
        pass
    reading = time.perf_counter() - begun
    reader.close()
    begun = time.perf_counter()
    manager = CacheManager.open(ledger)
    opening = time.perf_counter() - begun
    cached = manager.stats()["device_evictable_blocks"]
    encoding = copying = 0.0
    if take_snapshot:
        begun = time.perf_counter()
        data = snapshot(manager.state)
        encoding = time.perf_counter() - begun
        target = np.empty(len(data), np.uint8)
        begun = time.perf_counter()
        target[:] = np.frombuffer(data, np.uint8)
        copying = time.perf_counter() - begun
        snapshots.write(ledger, manager.next_sequence - 1, data)
        _serve(manager, 500, 1)
    pipe.send((reading, opening, cached, encoding, copying))
    os.kill(os.getpid(), signal.SIGKILL)


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """Opening from the log and from a snapshot, and the snapshot."""
    blocks = 5_000 if quick else 1_000_000
    ledger = f"recovery-{os.getpid()}"
    context = multiprocessing.get_context("spawn")

    def die(work: Any, *arguments: Any) -> Any:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(ledger, *arguments, theirs))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            return None
        finally:
            process.join()

    try:
        die(_fill, blocks)
        times = 1 if quick else 3
        plain = [die(_take_over, number == times - 1) for number in range(times)]
        from_snapshot = [die(_take_over, False) for _ in range(times)]
    finally:
        remove_objects(ledger)
    full = blocks // _RUN * _RUN
    if plain[0] is None or from_snapshot[0] is None or plain[0][2] != full:
        raise RuntimeError(f"the ledger was not taken over with its {full} blocks: {plain}, {from_snapshot}")
    made = []
    for name, runs in (("log alone", plain), ("snapshot and tail", from_snapshot)):
        made.append(
            f.figure_of(
                f"taking over {blocks:,} blocks, {name}",
                "ms",
                [opening * 1e3 for _, opening, *_ in runs],
                "reading the log",
                [reading * 1e3 for reading, *_ in runs],
            )
        )
    *_, encoding, copying = plain[-1]
    made.append(f.figure_of(f"snapshot of {blocks:,} blocks", "ms", [encoding * 1e3], "memcpy", [copying * 1e3]))
    return made, []


if __name__ == "__main__":
    f.alone("recovery", figures)
