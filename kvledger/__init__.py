"""kvledger: the KV-block manager of an LLM serving engine as an event-sourced state machine with shared-memory IPC."""

from kvledger.config import CacheConfig, ConfigError
from kvledger.manager import Admission, CacheManager, ManagerClosed, Paused, WrongThread
from kvledger.ranks import Progress
from kvledger.transactions import CallTooLarge
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
    "namespace_key",
]
