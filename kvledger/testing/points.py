"""Where a simulated process may lose its turn: between two lines of the code that shares memory.

Lines are seen with ``sys.settrace``, which makes everything slower that runs meanwhile. So it is on only inside the
functions of :data:`TRACED`, and what they call: :func:`watched` stands in for each of them while a simulation runs.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

_SHARING = ("control", "memory", "reader", "segment", "signals", "snapshots", "writer")
_WORKING = (
    "handoff/progress",
    "handoff/tickets",
    "handoff/shared_memory",
    "pools/memory",
    "processes/loop",
    "transfer",
)
TRACED = (*(f"/ipc/{name}.py" for name in _SHARING), *(f"/workers/{name}.py" for name in _WORKING))
"""Ends of the file names of code whose lines are points of the schedule: what reads and writes shared memory."""

Enter = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Calls a function with its arguments and options, with its lines as points."""


INTERPRETED_ONLY = "this kvledger is compiled: simulate with one that was installed without KVLEDGER_NATIVE"


@functools.cache
def is_traced(file: str) -> bool:
    """Whether the lines of this file are points."""
    return file.endswith(TRACED)


def storing_lines(code: CodeType) -> frozenset[int]:
    """The lines of a function that can store into shared memory: they assign to an element, or call something."""
    ends = [(end, line) for _, end, line in code.co_lines() if line is not None]
    storing = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("CALL", "STORE_SUBSCR", "STORE_SLICE")) or "WITH" in instruction.opname:
            storing.add(next((line for end, line in ends if instruction.offset < end), 0))
    return frozenset(storing)


def entrances(packages: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
    """Every function that others reach, as ``(module or class, name)``: in all modules that have one, and in classes.

    What begins with an underscore is called from inside only.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in packages:
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, FunctionType) and is_traced(value.__code__.co_filename):
                yield module, attribute
            elif isinstance(value, type) and value.__module__ == name and is_traced(_file(module)):
                for key, member in list(vars(value).items()):
                    function = getattr(member, "__func__", getattr(member, "fget", member))
                    public = key == "__init__" or not key.startswith("_")
                    if public and isinstance(function, FunctionType) and is_traced(function.__code__.co_filename):
                        yield value, key


def _file(module: ModuleType) -> str:
    return module.__file__ or ""


def watched(member: Any, enter: Enter) -> Any:
    """What stands in for a function, method or property of :func:`entrances`."""
    if isinstance(member, property):
        return property(*(function and watched(function, enter) for function in (member.fget, member.fset)))
    if isinstance(member, classmethod | staticmethod):
        return type(member)(watched(member.__func__, enter))

    @functools.wraps(member)
    def call(*arguments: Any, **options: Any) -> Any:
        return enter(member, arguments, options)

    return call
