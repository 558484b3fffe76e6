"""Which ledger a command is about: the one that was named, or the only one that is here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ipc import InvalidName, LedgerError, LedgerNotFound
from ipc.ownership import ledger_names
from kvledger.cli.exits import CommandFailed
from kvledger.cli.terminal import note


def named(begun: str) -> list[str]:
    """For a shell: ledgers of this machine and recordings in this folder whose names begin so."""
    recordings = sorted(path.name for path in Path().glob("*.kvlog"))
    return [name for name in [*_here(), *recordings] if name.startswith(begun) and name.isprintable()]


def _here() -> list[str]:
    from kvledger.doctor.ledgers import ledgers

    return [ledger.name for ledger in ledgers() if ledger.state != "other user"]


Name = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME", help="Name of a ledger on this machine; default: the one that is here", autocompletion=named
    ),
]


def the_one(name: str | None, argument: str = "NAME") -> str:
    """The name itself; without one the only ledger of this machine, which is said.

    Raises:
        CommandFailed: there is none, or there are several.
    """
    if name is not None:
        return name
    here = _here()
    if len(here) == 1:
        note(f"note: {here[0]} is the only ledger here")
        return here[0]
    if here:
        raise CommandFailed(f"{argument} is missing, and there are {len(here)} ledgers here: {', '.join(here)}")
    raise CommandFailed(f"{argument} is missing, and there is no ledger on this machine")


def is_ledger(name: str) -> bool:
    """Whether a ledger has this name, and no file."""
    return not os.path.exists(name) and "/" not in name and name in ledger_names()


def cannot_follow(name: str, error: LedgerError) -> str:
    """Why, and which command to use instead."""
    if isinstance(error, InvalidName | LedgerNotFound):
        if os.path.isfile(name):
            return f"{name} is a recording, not a ledger: kvledger check looks at recordings"
        if not is_ledger(name):
            return f"{error}: kvledger segments lists what is there"
    return str(error)
