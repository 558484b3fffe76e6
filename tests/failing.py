"""A failing example that a test has found, written out as a program that anybody can run.

Hypothesis says in notes what failed: the steps of a state machine, or the arguments of a test and what it drew. From
these a file of its own is made, under ``build/failing``, which needs no database of examples and no seed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "failing"
_HEADS = ("Failing test case: ", "Falsifying example: ")
_MACHINE = re.compile(r"state = \w+\(\)")
_CALL = re.compile(r"\w+\(\n(?P<arguments>.*)\n?\)$", re.DOTALL)
_ARGUMENT = re.compile(r"^    (?=\w+=)", re.MULTILINE)
_DRAW = re.compile(r"Draw \d+(?: \(.*?\))?: (?P<value>.*)", re.DOTALL)


class Drawn:
    """In place of ``st.data()``: gives what was drawn then."""

    def __init__(self, *values: Any) -> None:
        self._values = list(values)

    def draw(self, strategy: object, label: object = None) -> Any:
        return self._values.pop(0)


def again(module: Any, test: Callable[..., object], **arguments: Any) -> None:
    """Call the body of a property test with an example."""
    inner: Callable[..., object] = test.hypothesis.inner_test  # type: ignore[attr-defined]
    inner(**arguments)


def examples(error: BaseException) -> Iterator[tuple[BaseException, list[str]]]:
    """Each failure in an exception that has an example among its notes, and these notes."""
    notes = getattr(error, "__notes__", [])
    if any(note.startswith(_HEADS) for note in notes):
        yield error, notes
    for part in getattr(error, "exceptions", ()):
        yield from examples(part)


def body_of(test: str, notes: Sequence[str], fixtures: Sequence[str]) -> list[str]:
    """The lines of the example: steps of a state machine, or one call."""
    steps = [index for index, note in enumerate(notes) if _MACHINE.match(note)]
    if steps:
        rest = notes[steps[0] :]
        end = next((index for index, note in enumerate(rest) if note.startswith("state.teardown")), len(rest))
        return [line for note in rest[: end + 1] for line in note.splitlines()]
    head = next(note for note in notes if note.startswith(_HEADS))
    call = _CALL.search(head)
    written = _ARGUMENT.split(call["arguments"]) if call else []
    values = [draw["value"] for draw in map(_DRAW.fullmatch, notes) if draw is not None]
    lines = ["again("]
    lines += ["    module,", f"    module.{test},"]
    for argument in written[1:]:
        name = argument.partition("=")[0]
        if name in fixtures:
            lines.append(f"    {name}={name},")
        elif argument.startswith(f"{name}=data(...)"):
            lines += [f"    {name}=Drawn(", *(f"{value}\n," for value in values), "    ),"]
        else:
            lines += [f"    {line}" for line in argument.rstrip().splitlines()]
    return [*lines, ")"]


def program_of(
    node: str, module: str, test: str, fixtures: Sequence[str], error: BaseException, notes: Sequence[str]
) -> str:
    """The text of a program that fails as ``node`` did."""
    used = [
        name for name in fixtures if any(re.match(rf" *{name}=", line) for note in notes for line in note.split("\n"))
    ]
    said = f"{type(error).__name__}: {error}".replace("\\", "/").replace('"', "'").splitlines()
    body = "\n".join(f"    {line}" for each in body_of(test, notes, used) for line in each.splitlines())
    return f'''"""{node} fails with this example.

{said[0] if said else ""}

Run this file: python {{}}
"""

import sys

sys.path.insert(0, {str(ROOT)!r})

import pytest
from numpy import *

import {module} as module
from tests.failing import Drawn, again

globals().update({{name: value for name, value in vars(module).items() if not name.startswith(("test_", "__"))}})


def test_again({", ".join(used)}):
{body}


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "tests.conftest", "-p", "no:cacheprovider", "--timeout=0", __file__]))
'''


def write_programs(item: Any, error: BaseException) -> list[Path]:
    """Write a program for each example that a test has failed with; none where a failure has no example."""
    if hasattr(error, "program"):  # of a simulated run
        return [_write(item.name, error.program())]
    parts = item.module.__name__, item.originalname, [*item.funcargs]
    return [_write(item.name, program_of(item.nodeid, *parts, part, notes)) for part, notes in examples(error)]


def _write(name: str, text: str) -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name).strip('_')}_{xxhash.xxh3_64_hexdigest(text.encode())[:8]}.py"
    path.write_text(text.replace("Run this file: python {}", f"Run this file: {sys.executable} {path}"))
    return path
