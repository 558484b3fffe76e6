"""What a check found."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """kvledger works, but slower, with less room, or without an optional part."""
    PROBLEM = "problem"
    """kvledger does not work here, or will stop working."""


class Finding(NamedTuple):
    """The answer of one check."""

    status: Status
    found: str
    advice: str = ""
    """What to do; empty if nothing has to be done."""


def ok(found: str) -> Finding:
    """All is well."""
    return Finding(Status.OK, found)


def note(found: str, advice: str) -> Finding:
    """It works, but somebody may want to know."""
    return Finding(Status.NOTE, found, advice)


def problem(found: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(Status.PROBLEM, found, advice)


def size(count: int) -> str:
    """Bytes for people, rounded down: what is not there is never promised."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count * 10 // unit / 10:.1f} {name}"
    return f"{count:,} bytes"
