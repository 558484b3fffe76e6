"""The mutation check: faults planted on purpose, and the tests that have to find each of them.

``python -m tests.mutants`` plants one after the other in a copy of the tree and runs the tests named beside it. A fault
that no test finds is a hole in the tests. A fault whose text is not in the code any more is an error, so that the
tables stay in step with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Edit(NamedTuple):
    """``old``, which stands in ``file`` exactly once, becomes ``new``."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """A planted fault."""

    name: str
    edits: tuple[Edit, ...]
    """More than one where the code has a second line of defence that would hide what the tests see."""
    tests: tuple[str, ...]
    """Node ids; one of them has to fail."""


def mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """A fault in one place."""
    return Mutant(name, (Edit(file, old, new),), tests)


class NotInTheCode(AssertionError):
    """The text that a mutant replaces is not there, or not exactly once."""


def mutated(edit: Edit, root: Path = ROOT) -> str:
    """The file with the fault in it. Raises :class:`NotInTheCode`."""
    text = (root / edit.file).read_text()
    count = text.count(edit.old)
    if count != 1:
        raise NotInTheCode(f"{edit.file} has {count} times, not once: {edit.old!r}")
    return text.replace(edit.old, edit.new)


def all_mutants() -> list[Mutant]:
    """Every planted fault, log first."""
    from tests.mutants import engine, followers, handoff, log, machine

    return [*log.MUTANTS, *machine.MUTANTS, *engine.MUTANTS, *handoff.MUTANTS, *followers.MUTANTS]
