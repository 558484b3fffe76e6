"""What callers of the manager pass, looked at before it becomes a command.

All of these raise :class:`InvalidCommand`, naming the argument.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

from kvledger.config import member_of, names_of
from statemachine.errors import InvalidCommand
from statemachine.events import IntArray, ReleaseReason, Tier
from statemachine.state.groups import Kind
from statemachine.state.state import State


def expect_count(name: str, value: SupportsIndex) -> int:
    """Take a whole number from 0, Python's or NumPy's; refuse anything else, a bool too."""
    if type(value) is int and value >= 0:
        return value
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise InvalidCommand(f"{name} must be a whole number from 0, not {value!r:.80}")
    return number


def expect_namespace(namespace: object) -> None:
    """Refuse a namespace that is not bytes."""
    if type(namespace) is not bytes:
        raise InvalidCommand(f"a namespace is bytes, from namespace_key(), not {type(namespace).__name__}")


def expect_seconds(name: str, value: object) -> None:
    """Refuse what is no number of seconds; ``None`` is allowed."""
    if value is not None and not (isinstance(value, int | float) and value < 1e9):
        raise InvalidCommand(f"{name} is a number of seconds, not {value!r:.80}")


def expect_bool(name: str, value: object) -> None:
    """Refuse what is no bool, also where Python would take it for one."""
    if not isinstance(value, bool):
        raise InvalidCommand(f"{name} is a bool, not {value!r:.80}")


def tier_of(tier: object) -> Tier:
    """Take a tier, or its name; refuse anything else, also a number."""
    found = member_of(Tier, tier)
    if found is None:
        raise InvalidCommand(f"tier is a Tier, or one of {names_of(Tier)}, not {tier!r:.80}")
    return found


def reason_of(reason: object) -> ReleaseReason:
    """Take a reason to release a request, or its name; refuse anything else, also a number."""
    found = member_of(ReleaseReason, reason)
    if found is None:
        raise InvalidCommand(f"reason is a ReleaseReason, or one of {names_of(ReleaseReason)}, not {reason!r:.80}")
    return found


def expect_group(state: State, group: SupportsIndex) -> int:
    """Take the number of a layer group that the ledger has."""
    number = expect_count("group", group)
    if number > len(state.groups):
        raise InvalidCommand(f"this ledger has the layer groups 0 to {len(state.groups)}, not {number}")
    return number


def expect_static(state: State, tokens: SupportsIndex) -> int:
    """Take a number of tokens for the static groups; refuse any where the ledger has no such group."""
    number = expect_count("static_tokens", tokens)
    if number and not any(group.kind == Kind.STATIC for group in state.groups):
        raise InvalidCommand(f"{number} static_tokens have no place: this ledger has no static() group")
    return number


def block_ids(blocks: Sequence[int]) -> IntArray:
    """The ids as commands carry them, ``array('i')``."""
    try:
        return array("i", blocks)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidCommand(f"blocks are block ids: {error}") from error
