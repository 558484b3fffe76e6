"""The processes beside the engine: transfer workers, one per rank, and who starts and watches them.

Rules:

* A worker follows the engine's log from its own cursor and answers in a log of its own: no queue, no call, no pickle.
* Copies may be done twice and their sources are held, so a worker that was killed is started again and goes on.
* An incarnation executes what was ordered after its own ``WorkerJoined``, or ordered anew.
* Every process is a loop around a testable ``step()``. It is started by exec, never by fork.

::

    engine's log ─► transfer ─► pools (device ⇄ host) ─► acknowledgements ─► engine
         │             └ processes: supervisor, programs
         ├────────► handoff: pusher ─► another instance's pool
         └────────► followers: auditor, recorder, publisher

``followers`` and ``handoff`` use ``processes``, which use ``pools``; nothing here imports ``kvledger``.
Words: ``docs/glossary.md``.
"""

from workers.pools.interface import PoolMismatch, Pools
from workers.pools.layout import KVTensor, PoolLayout
from workers.processes.supervisor import Supervisor, WorkerFailed

__all__ = ["KVTensor", "PoolLayout", "PoolMismatch", "Pools", "Supervisor", "WorkerFailed"]
