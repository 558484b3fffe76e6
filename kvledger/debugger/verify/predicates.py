"""Predicates over a state: what ``bisect`` and ``shrink`` look for.

A predicate is the user's own Python, an expression or a file; it is run with the rights of whoever typed it, and no
more of a sandbox than any Python program. The small set of names below keeps expressions short, not safe. Predicates
never come from a log.
"""

from __future__ import annotations

import builtins
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvledger.debugger.explain.owners import expect_block, owners_of, short
from kvledger.debugger.source.source import Entry, SourceError
from statemachine import events
from statemachine.check import check
from statemachine.events import Tier
from statemachine.state.state import State

Predicate = Callable[[State, Entry], bool]
"""Whether it holds after an event, in the state that the event left."""

_PLAIN = (
    *("abs", "all", "any", "bool", "bytes", "dict", "enumerate", "filter", "float", "int", "isinstance", "len", "list"),
    *("map", "max", "min", "range", "reversed", "round", "set", "sorted", "str", "sum", "tuple", "type", "zip"),
)
NAMES = {
    "state": "the state after the event (statemachine.state.State)",
    "event": "the event; the classes of events have their names: isinstance(event, BlocksEvicted)",
    "sequence, time_ns, step": "where and when the event stands in the log",
    "device, host": "the pools: .capacity, .free",
    "requests": "live requests by name: .table, .leaf, .words, .waits_for, .private()",
    "nodes": "runs by id: .size, .start, .pins, .parent, .children; .device and .host: None, or a copy (.ids, .ready)",
    "transfers": "copies in flight by number: .direction, .sources, .targets, .waiters, .quarantined",
    "counters": "totals since genesis",
    "DEVICE, HOST": "the tiers",
    "owner(tier, block)": "who has a block, in words: 'free', \"private to request 'a', …\", 'block 3 of run 7'; "
    "a block that the pool does not have then is an error",
    "check(state)": "the violated invariants, a list of texts",
}
"""What an expression can use, beside plain functions like ``len`` and ``any``."""


def predicate(text: str) -> Predicate:
    """The predicate that the user typed: an expression, or a file that defines ``predicate(state, entry)``.

    Raises:
        SourceError: it does not compile, or the file defines no such function.
    """
    path = Path(text)
    if text.endswith(".py"):
        return _from_file(path)
    try:
        code = compile(text, "<predicate>", "eval")
    except (SyntaxError, ValueError) as error:
        raise SourceError(f"the predicate {text!r} is no Python expression: {error}") from None

    names = _Names()

    def holds(state: State, entry: Entry) -> bool:
        names.update(state=state, event=entry.event, sequence=entry.sequence, time_ns=entry.time_ns, step=entry.step)
        try:
            return bool(eval(code, names))
        except Exception as error:
            what = str(error) if isinstance(error, SourceError) else f"{type(error).__name__}: {error}"
            raise SourceError(f"the predicate fails at event {entry.sequence}: {what}") from None

    return holds


def _from_file(path: Path) -> Predicate:
    try:
        found = runpy.run_path(str(path)).get("predicate")
    except Exception as error:
        raise SourceError(f"the predicate file {path} fails: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise SourceError(f"{path} defines no function predicate(state, entry)")

    def holds(state: State, entry: Entry) -> bool:
        try:
            return bool(found(state, entry))
        except Exception as error:
            raise SourceError(f"{path} fails at event {entry.sequence}: {type(error).__name__}: {error}") from None

    return holds


_GLOBALS: dict[str, Any] = {
    "__builtins__": {name: getattr(builtins, name) for name in _PLAIN},
    **{event.__name__: event for event in events.KINDS.values()},
    **{tier.name: tier for tier in Tier},
    "Direction": events.Direction,
    "Outcome": events.Outcome,
    "ReleaseReason": events.ReleaseReason,
    "EvictReason": events.EvictReason,
    "check": check,
}


class _Names(dict[str, Any]):
    """The global names of an expression; those that depend on the state are made when it asks for them."""

    def __init__(self) -> None:
        super().__init__(_GLOBALS)

    def __missing__(self, name: str) -> Any:
        state: State = self["state"]
        match name:
            case "requests":
                return {request.request_id: request for request in state.requests.values()}
            case "nodes" | "transfers" | "counters":
                return getattr(state, name)
            case "device" | "host":
                return getattr(state, name).pool
            case "owner":
                return lambda tier, block: _owner(state, tier, block)
        raise KeyError(name)


def _owner(state: State, tier: Tier, block: int) -> str:
    expect_block(state, tier, block)
    return " and ".join(map(short, owners_of(state, tier, block))) or "nobody"
