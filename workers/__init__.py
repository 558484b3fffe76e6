"""The processes beside the engine: transfer workers, one per rank, and who starts and watches them."""

from workers.pools.interface import PoolMismatch, Pools
from workers.pools.layout import KVTensor, PoolLayout
from workers.processes.supervisor import Supervisor, WorkerFailed

__all__ = ["KVTensor", "PoolLayout", "PoolMismatch", "Pools", "Supervisor", "WorkerFailed"]
