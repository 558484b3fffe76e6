"""``decide(state, command)``: which events a command comes to. Reads the state, never writes it; all policy is here.

The events of one command are one transaction. An impossible or invalid command raises a typed error.

Rules:

* What is decided is written into the events as ids; applying them asks nothing again.
* A subject has a file, and a table of its commands; this is the one table of all of them.
* Planning reads the state. Only the first transaction of an epoch (:mod:`.ledger`) is planned on a copy that it applies
  its events to.

::

    requests · cache · transfers · pools · ledger · followed ─► hits, eviction, capacity, lookup ─► state
    derive: from the events of a log back to the commands

Words: ``docs/glossary.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from statemachine.commands import Command
from statemachine.decide.cache import CACHE
from statemachine.decide.capacity import available_blocks, can_allocate, victims_for
from statemachine.decide.followed import FOLLOWED
from statemachine.decide.ledger import LEDGER
from statemachine.decide.lookup import peek, request_named
from statemachine.decide.pools import POOLS
from statemachine.decide.requests import REQUESTS
from statemachine.decide.transfers import TRANSFERS
from statemachine.errors import CommandRejected
from statemachine.events import Event
from statemachine.state.state import State

DECIDERS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    **REQUESTS,
    **CACHE,
    **TRANSFERS,
    **POOLS,
    **LEDGER,
    **FOLLOWED,
}
"""Command → what decides it."""


def decide(state: State, command: Command) -> list[Event]:
    """The events of a command.

    Raises:
        CommandRejected: the command is impossible or invalid; the class says why, the message what to do.
    """
    return DECIDERS[type(command)](state, command)


__all__ = [
    "DECIDERS",
    "CommandRejected",
    "available_blocks",
    "can_allocate",
    "decide",
    "peek",
    "request_named",
    "victims_for",
]
