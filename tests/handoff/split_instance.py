"""One instance of a split pair, as an engine runs it: ``python -m tests.handoff.split_instance ROLE LEDGER [PEER]``.

Commands come as lines of JSON on the standard input, each answered by one line; at its end the instance closes.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from kvledger import CacheConfig, CacheManager
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.run.pattern import PatternEngine, Seeds, chain
from statemachine.check import check
from statemachine.content import words_of
from tests.waiting import wait_until
from workers.handoff.pushes import Address

LAYERS = 4
CONFIG = CacheConfig(block_size=4, device_blocks=32, ranks=2, layers=LAYERS, block_bytes=64)


def prompt(number: int) -> np.ndarray:
    """Six blocks."""
    return np.arange(24, dtype=np.int32) + 1000 * number


def write_layer(manager: CacheManager, rank: int, layer: int, table: np.ndarray, seeds: Seeds) -> None:
    """One layer of what :class:`PatternEngine` writes, by way of a pool of its own."""
    engine = PatternEngine(manager.pools)
    pattern = engine._first_words(seeds, rank, layer) + engine._ramp
    manager.pools[rank].tensor(layer, "kv").view(np.uint64)[table] = pattern


class Prefill:
    """Computes in steps, layer by layer, and pushes."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager
        self.sender = Sender(manager)
        self.pids = [self.sender.supervisor.pid(rank) for rank in range(CONFIG.ranks)]
        self.step = 0
        self.rest: tuple[str, np.ndarray, Seeds] | None = None

    def do(self, what: str, *more: Any) -> Any:
        if what == "compute the rest":
            assert self.rest is not None
            return self._finish(*self.rest)
        key, number, address = more
        self.step += 1
        table = self.manager.admit(key, prompt(number), blocks=6).block_table
        self.rest = key, table, chain(words_of(prompt(number)), 4 * CONFIG.block_size, b"")
        self.sender.send(key, Address.parse(address), step=self.step)
        self._compute(range(LAYERS // 2), *self.rest[1:])
        return self._finish(*self.rest) if what == "compute and send" else "half"

    def _compute(self, layers: range, table: np.ndarray, seeds: Seeds) -> None:
        for layer in layers:
            for rank in range(CONFIG.ranks):
                write_layer(self.manager, rank, layer, table, seeds)
                self.sender.progress[rank].wrote(self.step, layer + 1)

    def _finish(self, key: str, table: np.ndarray, seeds: Seeds) -> str:
        self._compute(range(LAYERS // 2, LAYERS), table, seeds)
        (done,) = wait_until("the push ends", self.sender.poll)
        assert done.request_id == key
        self.manager.release(key)
        assert not check(self.manager.state)
        return done.outcome.name


class Decode:
    """Receives, and verifies every byte."""

    def __init__(self, manager: CacheManager, peer: str) -> None:
        self.manager = manager
        self.receiver = Receiver(manager)
        self.peer = peer
        self.pids: list[int] = []

    def do(self, what: str, *more: Any) -> Any:
        if what == "free blocks when quiet":
            wait_until("nothing is on its way", lambda: not self.receiver.busy(), meanwhile=self.receiver.fold)
            assert not check(self.manager.state)
            return len(self.manager.state.device.pool.free)
        key, number = more
        if what == "reserve":
            self.manager.match(key, prompt(number))
            return self.receiver.reserve(key, 6, peer=self.peer).text()
        (received,) = wait_until("something arrives", self.receiver.poll)
        assert received.request_id == key
        if received.outcome.name == "DONE":
            seeds = chain(words_of(prompt(number)), 4 * CONFIG.block_size, b"")
            PatternEngine(self.manager.pools).verify(key, received.block_table, seeds, self.manager.next_sequence)
            self.manager.cache(key, 6)
        self.manager.release(key)
        assert not check(self.manager.state)
        return [received.outcome.name, received.reason]


def main(role: str, ledger: str, *peer: str) -> int:
    open_it = CacheManager.open if role.endswith("again") else CacheManager.create
    with open_it(ledger, CONFIG) as manager:
        instance = Prefill(manager) if role.startswith("prefill") else Decode(manager, *peer)
        print(json.dumps(instance.pids), flush=True)
        for line in sys.stdin:
            print(json.dumps(instance.do(*json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
