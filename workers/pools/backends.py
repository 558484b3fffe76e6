"""Create and open the KV pools of a rank, with the backend that its layout names.

``numpy`` and ``paddle`` keep the device pool in shared memory (everything runs on a laptop), ``paddle-gpu`` and
``cuda`` on a GPU. What each of them offers is said in :mod:`workers.pools.interface`; each is a module of its own,
imported when it is used. See ``docs/pools.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ipc import LedgerNotFound
from ipc.ownership import identity_of, remove_object
from statemachine.events import Tier
from workers.pools import memory as pool_memory
from workers.pools.interface import Bytes, Copies, Pools
from workers.pools.layout import PoolLayout
from workers.pools.memory import pool_names, pool_sizes


def open_pools(ledger: str, rank: int, layout: PoolLayout) -> Pools:
    """Attach a rank's pools in a process of the engine.

    Raises:
        PoolMismatch: they have another layout.
        ipc.LedgerNotFound: they are not there: the manager makes them. Try again soon.
        ImportError: the backend's framework is not installed.
    """
    if layout.backend == "numpy":
        from workers.pools.numpy import NumpyPools

        return NumpyPools(ledger, rank, layout)
    if layout.backend == "paddle":
        from workers.pools.paddle import PaddlePools

        return PaddlePools(ledger, rank, layout)
    if layout.backend == "paddle-gpu":
        from workers.pools.paddle import PaddleGpuPools

        return PaddleGpuPools(ledger, rank, layout)
    from workers.pools.cuda_pools import CudaPools

    return CudaPools(ledger, rank, layout)


def open_copies(ledger: str, rank: int, layout: PoolLayout, waiting: Callable[[str], None]) -> Copies:
    """Attach a rank's pools in its transfer worker. ``waiting`` is told what it waits for, if it does.

    Raises:
        PoolMismatch, ipc.LedgerNotFound
        workers.pools.cuda_driver.CudaError: there is no driver, no device, no memory to pin, or no such handle.
    """
    copies: Copies
    if layout.on_gpu:
        from workers.pools.cuda_copies import CudaCopies

        copies = CudaCopies(ledger, rank, layout, waiting)
    else:
        from workers.pools.numpy import NumpyCopies

        copies = NumpyCopies(ledger, rank, layout)
    if layout.checksums:
        from workers.pools.checksums import CheckedCopies

        return CheckedCopies(pool_memory.PoolMemory(ledger, rank, layout), copies)
    return copies


def create_pools(ledger: str, layout: PoolLayout) -> Sequence[Pools]:
    """Create the pools of all ranks.

    Raises:
        ipc.SharedMemoryFull, or what :func:`open_pools` raises: nothing is left behind.
    """
    try:
        for rank in range(layout.ranks):
            for name, size in zip(pool_names(ledger, rank), pool_sizes(layout), strict=True):
                pool_memory.create(name, size, layout)
        return [open_pools(ledger, rank, layout) for rank in range(layout.ranks)]
    except BaseException:
        for rank in range(layout.ranks):
            for name in pool_names(ledger, rank):
                remove_object(name, identity_of(ledger))
        raise


def ids_of(pools: Iterable[Pools]) -> str:
    """Ids of all pools, rank by rank, as they stand in the log."""
    return ";".join(pool.id for pool in pools)


def ids_after(known: str, found: str, tier: Tier) -> str:
    """The ids that stand in the log once it says that one tier is lost: of the other one those that were ``known``.

    A tier whose loss it does not say yet has to be missed by the next engine, if this one dies before it has said so.
    """
    ranks = []
    for before, now in zip(known.split(";"), found.split(";"), strict=True):
        ids = before.split(",")
        ids[tier] = now.split(",")[tier]
        ranks.append(",".join(ids))
    return ";".join(ranks)


def reopen_pools(ledger: str, layout: PoolLayout, ids: str) -> tuple[Sequence[Pools], dict[str, str]]:
    """Attach the pools that a ledger had, with the ``ids`` that stand in its log; replace those that are not the same.

    Returns the pools, and for each tier (``device``, ``host``) that is not what it was the reason. A device pool on a
    GPU is gone with the process that published it.

    Raises:
        ipc.SharedMemoryFull: a pool cannot be replaced.
    """
    lost: dict[str, str] = {}
    known = [rank_ids.split(",") for rank_ids in ids.split(";")]
    for rank in range(layout.ranks):
        tiers = zip(("device", "host"), pool_names(ledger, rank), pool_sizes(layout), known[rank], strict=True)
        for tier, name, size, id in tiers:
            try:
                found, there = pool_memory.attach(name, size, layout)
            except LedgerNotFound:
                lost.setdefault(tier, f"{name} is gone")
            else:
                if there == id and (tier == "host" or not layout.on_gpu or _is_owned(name, found)):
                    continue
                lost.setdefault(tier, f"{name} is not the memory that it was")
            remove_object(name, identity_of(ledger))
            pool_memory.create(name, size, layout)
    return [open_pools(ledger, rank, layout) for rank in range(layout.ranks)], lost


def _is_owned(name: str, device_object: Bytes) -> bool:
    """Whether the process that published GPU memory lives."""
    from workers.pools.cuda_pools import Published

    published = Published.read(device_object)
    return published is not None and published.owner_alive(name)
