"""kvledger: the KV-block manager of an LLM serving engine as an event-sourced state machine with shared-memory IPC.

What an engine needs is listed here; everything else has a room of its own:

::

    cli                  what is typed            adapters    managers of other engines, as views of a ledger
    doctor testing view
    debugger run         what happened, and a proof that it works
    recordings telemetry
    handoff              prefill and decode
    manager              the life of a request, and of the ledger
    config errors        models: what a model's config.json says about its KV cache

Each room uses those below it, and ``workers``, ``ipc`` and ``statemachine``, which know nothing of kvledger.
``lint-imports`` holds that. The rooms in one picture: ``docs/architecture.md``. Words: ``docs/glossary.md``.
"""

import sys
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

try:
    from ipc import (
        InvalidName,
        KvlogReader,
        LedgerError,
        LedgerExists,
        LedgerNotFound,
        LogCorrupt,
        LogReader,
        Overrun,
        Record,
        SharedMemoryFull,
        WriterAlive,
    )
    from kvledger.config import CacheConfig, ConfigError
    from kvledger.errors import CallTooLarge, CannotContinue, HandoffError, ManagerClosed, Paused, WrongThread
    from kvledger.handoff.peer import Handed, Received
    from kvledger.handoff.receiver import Receiver
    from kvledger.handoff.sender import Sender
    from kvledger.manager.answers import Admission, Prospect, Started
    from kvledger.manager.manager import CacheManager
    from kvledger.manager.marks import Marks
    from kvledger.manager.ranks import BlockTable, Progress
    from kvledger.manager.tokens import Growth
    from statemachine.content import InvalidTokens, Item, Tokens, namespace_key
    from statemachine.errors import (
        Busy,
        CommandRejected,
        DuplicateRequest,
        InvalidCommand,
        InvariantViolation,
        OutOfBlocks,
        RequestNotReady,
        UnknownRequest,
    )
    from statemachine.events import HostPolicy, Outcome, ReleaseReason, Tier
    from workers import PoolLayout, Pools, WorkerFailed
    from workers.handoff.progress import LayerProgress
    from workers.handoff.pushes import Address
    from workers.pools.layout import KVTensor
except ImportError as error:
    # Another package has the name of one of ours, or a part is missing. What tells which has to be importable:
    # kvledger.doctor. Everything else fails with this error, at the first name that is taken from here.
    _broken = error
    if not TYPE_CHECKING:

        def __getattr__(name: str) -> Any:
            raise ImportError(
                f"kvledger is not whole here ({_broken}): {_advice()}", name=_broken.name, path=_broken.path
            ) from _broken

        def _advice() -> str:
            """What to do: mostly there is a ``workers.py`` or the like beside the script that is run."""
            for part in ("ipc", "statemachine", "workers"):
                file = getattr(sys.modules.get(part), "__file__", None)
                if file and Path(file).resolve().parents[1] != Path(__file__).resolve().parents[1]:
                    return f"{file} has the name of one of its packages: rename or remove it, or run kvledger doctor"
            return "run kvledger doctor"


__all__ = [
    "Address",
    "Admission",
    "BlockTable",
    "Busy",
    "CacheConfig",
    "CacheManager",
    "CallTooLarge",
    "CannotContinue",
    "CommandRejected",
    "ConfigError",
    "DuplicateRequest",
    "Growth",
    "Handed",
    "HandoffError",
    "HostPolicy",
    "InvalidCommand",
    "InvalidName",
    "InvalidTokens",
    "InvariantViolation",
    "Item",
    "KVTensor",
    "KvlogReader",
    "LayerProgress",
    "LedgerError",
    "LedgerExists",
    "LedgerNotFound",
    "LogCorrupt",
    "LogReader",
    "ManagerClosed",
    "Marks",
    "OutOfBlocks",
    "Outcome",
    "Overrun",
    "Paused",
    "PoolLayout",
    "Pools",
    "Progress",
    "Prospect",
    "Received",
    "Receiver",
    "Record",
    "ReleaseReason",
    "RequestNotReady",
    "Sender",
    "SharedMemoryFull",
    "Started",
    "Tier",
    "Tokens",
    "UnknownRequest",
    "WorkerFailed",
    "WriterAlive",
    "WrongThread",
    "__version__",
    "is_compiled",
    "namespace_key",
]


def is_compiled() -> bool:
    """Whether this is the compiled build (``KVLEDGER_NATIVE=1 pip install``).

    There, an argument of the wrong type raises ``TypeError`` where the interpreted build raises
    :class:`InvalidCommand`; nothing has changed in either.
    """
    from kvledger.manager.manager import CacheManager

    return not isinstance(CacheManager.admit, FunctionType)
