"""The processes beside the engine: transfer workers, one per rank, and who starts and watches them."""

from workers.layout import KVTensor, PoolLayout
from workers.pools import PoolMismatch, Pools
from workers.supervisor import Supervisor, WorkerFailed

__all__ = ["KVTensor", "PoolLayout", "PoolMismatch", "Pools", "Supervisor", "WorkerFailed"]
