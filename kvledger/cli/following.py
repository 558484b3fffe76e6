"""Ledger or recording: what a command says that was given the other one, or neither."""

from __future__ import annotations

import os

from ipc import InvalidName, LedgerError, LedgerNotFound
from ipc.names import SHM


def is_ledger(name: str) -> bool:
    """Whether a ledger has this name, and no file."""
    return not os.path.exists(name) and "/" not in name and os.path.exists(SHM / f"{name}.control")


def cannot_follow(name: str, error: LedgerError) -> str:
    """Why, and which command to use instead."""
    if isinstance(error, InvalidName | LedgerNotFound):
        if os.path.isfile(name):
            return f"{name} is a recording, not a ledger: kvledger check looks at recordings"
        if not is_ledger(name):
            return f"{error}: kvledger segments lists what is there"
    return str(error)
