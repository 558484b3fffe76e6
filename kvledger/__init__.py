"""kvledger: the KV-block manager of an LLM serving engine as an event-sourced state machine with shared-memory IPC."""

from types import FunctionType

from kvledger.config import CacheConfig, ConfigError
from kvledger.errors import CallTooLarge, ManagerClosed, Paused, WrongThread
from kvledger.manager import Admission, CacheManager
from kvledger.ranks import Progress
from statemachine.content import InvalidTokens, Item, namespace_key
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
from statemachine.events import HostPolicy, ReleaseReason, Tier

__all__ = [
    "Admission",
    "Busy",
    "CacheConfig",
    "CacheManager",
    "CallTooLarge",
    "CommandRejected",
    "ConfigError",
    "DuplicateRequest",
    "HostPolicy",
    "InvalidCommand",
    "InvalidTokens",
    "InvariantViolation",
    "Item",
    "ManagerClosed",
    "OutOfBlocks",
    "Paused",
    "Progress",
    "ReleaseReason",
    "RequestNotReady",
    "Tier",
    "UnknownRequest",
    "WrongThread",
    "is_compiled",
    "namespace_key",
]


def is_compiled() -> bool:
    """Whether this is the compiled build (``KVLEDGER_NATIVE=1 pip install``).

    There, an argument of the wrong type raises ``TypeError`` where the interpreted build raises
    :class:`InvalidCommand`; nothing has changed in either.
    """
    return not isinstance(CacheManager.admit, FunctionType)
