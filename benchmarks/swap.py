"""Bytes per second of the transfer worker's copy, beside one memcpy of the same bytes.

``python -m benchmarks.swap [--quick]``: by block size, layers and how scattered the block ids are; what checksums cost.
"""

from __future__ import annotations

import os
import statistics
import time
from array import array
from collections.abc import Callable

import numpy as np

from benchmarks import figures as f
from ipc.ownership import remove_objects
from statemachine.events import Direction, TransferStarted
from workers import PoolLayout
from workers.pools.backends import create_pools, open_copies
from workers.pools.numpy import copy_blocks

_SHAPES = ((4096, 8), (65_536, 8), (262_144, 8), (65_536, 1), (65_536, 32))
"""Bytes per block and layer, layers."""


def spent(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def figures(quick: bool) -> tuple[list[f.Figure], list[str]]:
    """Both directions, by block size, layers and order of the ids, in GB/s; memcpy and copy take turns."""
    made = []
    ledger = f"swap-{os.getpid()}"
    for block_bytes, layers in _SHAPES[:1] if quick else _SHAPES:
        blocks = ((8 if quick else 192) << 20) // (block_bytes * layers)
        (pools,) = create_pools(ledger, PoolLayout(1, layers, block_bytes, blocks, blocks))
        pools.device[:], pools.host[:] = 1, 2
        count = blocks // 2
        size = count * block_bytes * layers
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        orders = {
            "scattered": np.random.default_rng(0).permutation(blocks)[:count],
            "runs of 8": np.random.default_rng(0).permutation(blocks // 8).repeat(8)[:count] * 8 + np.arange(count) % 8,
            "in order": np.arange(count),
        }
        for name, order in orders.items():
            ids, others = array("i", order.tolist()), array("i", range(count))
            for direction in (Direction.SWAP_OUT, Direction.SWAP_IN):
                ours, floor = [], []
                for _ in range(2 if quick else 7):
                    floor.append(size / spent(lambda: np.copyto(target, source)) / 1e9)
                    ours.append(size / spent(lambda: copy_blocks(pools, direction, ids, others)) / 1e9)
                made.append(
                    f.Figure(
                        name=f"{direction.name.lower().replace('_', ' ')}, {block_bytes:,} B, {layers} layers, {name}",
                        unit="GB/s",
                        ours=statistics.median(ours),
                        against="memcpy",
                        theirs=statistics.median(floor),
                        ratios=f.faster(floor, ours),
                    )
                )
        remove_objects(ledger)
    return made + checked(quick), []


def checked(quick: bool) -> list[f.Figure]:
    """A worker's copies of 64 KiB blocks with checksums, beside those without, by turns, in GB/s."""
    ledger = f"swap-{os.getpid()}"
    block_bytes, layers = 65_536, 8
    blocks = ((8 if quick else 96) << 20) // (block_bytes * layers)
    size = blocks * block_bytes * layers
    ids, none = array("i", range(blocks)), array("Q")
    rates: dict[tuple[Direction, bool], list[float]] = {}
    for _ in range(2 if quick else 7):
        for checksums in (False, True):
            layout = PoolLayout(1, layers, block_bytes, blocks, blocks, checksums=checksums)
            create_pools(ledger, layout)
            copies = open_copies(ledger, 0, layout, lambda reason: None)
            for number, direction in enumerate((Direction.SWAP_OUT, Direction.SWAP_OUT, Direction.SWAP_IN)):
                transfer = TransferStarted(number, direction, 0, 0, none, none, none, none, ids, ids)
                took = spent(lambda: (copies.start(transfer), copies.ended()))
                if number:  # the first one touches the memory
                    rates.setdefault((direction, checksums), []).append(size / took / 1e9)
            copies.close()
            remove_objects(ledger)
    return [
        f.Figure(
            name=f"{direction.name.lower().replace('_', ' ')}, {block_bytes:,} B, {layers} layers, with checksums",
            unit="GB/s",
            ours=statistics.median(rates[direction, True]),
            against="without",
            theirs=statistics.median(rates[direction, False]),
            ratios=f.faster(rates[direction, False], rates[direction, True]),
        )
        for direction in (Direction.SWAP_OUT, Direction.SWAP_IN)
    ]


if __name__ == "__main__":
    f.alone("swap", figures)
