"""Bytes per second of the transfer worker's copy, beside one memcpy of the same bytes.

``python -m benchmarks.swap``
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable

import numpy as np

from ipc.names import remove_objects
from statemachine.events import Direction
from workers import PoolLayout
from workers.numpy_pools import copy_blocks
from workers.pools import create_pools


def best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def main() -> None:
    print(f"{'block bytes':>11} {'layers':>6} {'ids':>10} {'memcpy GB/s':>11} {'swap out':>9} {'swap in':>8}")
    ledger = f"swap-{os.getpid()}"
    for block_bytes, layers in ((4096, 8), (65536, 8), (262144, 8)):
        blocks = (192 << 20) // (block_bytes * layers)
        (pools,) = create_pools(ledger, PoolLayout(1, layers, block_bytes, blocks, blocks))
        pools.device[:], pools.host[:] = 1, 2
        count = blocks // 2
        size = count * block_bytes * layers
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        floor = size / best(lambda: np.copyto(target, source)) / 1e9
        rng = np.random.default_rng(0)
        orders = {"scattered": rng.permutation(blocks)[:count], "in order": np.arange(count)}
        for name, order in orders.items():
            ids, others = array("i", order.tolist()), array("i", range(count))
            rates = [
                size / best(lambda: copy_blocks(pools, direction, ids, others)) / 1e9 / floor
                for direction in (Direction.SWAP_OUT, Direction.SWAP_IN)
            ]
            print(f"{block_bytes:11,} {layers:6} {name:>10} {floor:11.1f} {rates[0]:9.0%} {rates[1]:8.0%}")
        remove_objects(ledger)


if __name__ == "__main__":
    main()
