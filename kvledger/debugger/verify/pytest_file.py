"""A shrunk failure as a pytest file, to be kept beside the other tests of whoever mends it."""

from __future__ import annotations

from array import array
from enum import IntEnum

from kvledger.debugger.verify.shrink import Shrunk
from kvledger.text import printable
from statemachine.commands import Command

_FILE = '''"""Shrunk by ``kvledger shrink`` from {origin}: {left} of {before} commands.

{message}
"""

from array import array  # noqa: F401

{debugger}from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.commands import {commands}
from statemachine.decide import decide
from statemachine.errors import CommandRejected, OutOfBlocks
from statemachine.events import {events}

OPENED = {opened}
COMMANDS = [
{listed}
]
{holds}

def test_shrunk() -> None:
    state, sequence = genesis(OPENED), 1
    for command in COMMANDS:
        try:
            events = decide(state, command)
        except OutOfBlocks as refused:
            events = [refused.event]
        except CommandRejected:
            continue
        for event in events:
            sequence += 1
            apply(state, event)
            assert not check(state), (command, event)
{assertion}'''
_DEBUGGER = """from kvledger.debugger import Entry
from kvledger.debugger.verify.predicates import predicate
"""
_ASSERTION = "            assert not HOLDS(state, Entry(sequence, 0, 0, event)), (command, event)\n"
_ENUMS = "Direction", "Outcome", "ReleaseReason", "Tier"


def as_test(shrunk: Shrunk, origin: str, predicate: str) -> str:
    """The file; it fails as the log does.

    Args:
        origin: what the log is called.
        predicate: as the user typed it; empty: an invariant or the application of an event fails.
    """
    listed = [f"    {_source(command)}," for command in shrunk.commands]
    enums = [name for name in _ENUMS if any(f"{name}." in line for line in listed)]
    return _FILE.format(
        origin=_in_docstring(origin),
        left=len(shrunk.commands),
        before=shrunk.before,
        message=_in_docstring(shrunk.message),
        debugger=_DEBUGGER if predicate else "",
        commands=", ".join(sorted({type(command).__name__ for command in shrunk.commands})),
        events=", ".join(sorted([*enums, "LedgerOpened"])),
        opened=shrunk.opened,
        listed="\n".join(listed),
        holds=f"HOLDS = predicate({predicate!r})\n" if predicate else "",
        assertion="            assert not HOLDS(state, Entry(sequence, 0, 0, event)), (command, event)\n"
        if predicate
        else "",
    )


def _in_docstring(text: str) -> str:
    """Escape what would end a docstring: a name of a client or of a file must never become code."""
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')


def _source(command: Command) -> str:
    fields = []
    usual = command._field_defaults
    values = list(command)
    while (name := command._fields[len(values) - 1]) in usual and usual[name] == values[-1]:
        values.pop()
    for value in values:
        if isinstance(value, memoryview):
            fields.append(f'memoryview(array("i", {list(value.cast("B").cast("i"))})).cast("B")')
        elif isinstance(value, array):
            fields.append(f"array({value.typecode!r}, {list(value)})")
        elif isinstance(value, IntEnum):
            fields.append(f"{type(value).__name__}.{value.name}")
        else:
            fields.append(repr(value))
    return f"{type(command).__name__}({', '.join(fields)})"
