"""Tests wait in one way: for what they can see, with a limit that no slow machine reaches."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import waiting
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
_PLANNED = {"tests/campaigns/__main__.py", "tests/campaigns/chaos.py"}
"""What draws when something happens, or is told how long to search."""
_WAITS = {"wait", "join", "communicate", "result"}
_NO_LIMITS = {
    "thread.join(0.2)",  # it must not end
    "reader.wait(0.002)",  # in a loop that ends with what is read
    "log.wait(10000.0)",  # simulated seconds
}


def test_what_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.01)
    looks = []
    with pytest.raises(AssertionError, match="and never came: the bus"):
        wait_until("the bus", lambda: looks.append("look"), meanwhile=lambda: looks.append("meanwhile"))
    assert looks[:2] == ["meanwhile", "look"]
    monkeypatch.undo()
    assert wait_until("a number", iter([0, None, 7]).__next__) == 7


def limits(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Where a test would give up, or go on, after a number of seconds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first = node.args[:1] if isinstance(node.func, ast.Attribute) and node.func.attr in _WAITS else []
            values = first + [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            if any(map(_number, values)) and ast.unparse(node) not in _NO_LIMITS:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _number(node.right):
            if ast.unparse(node.left) in ("time.monotonic()", "time.time()"):
                yield node.lineno, ast.unparse(node)


def _number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value > 0


def test_no_test_has_a_limit_of_its_own() -> None:
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in _PLANNED:
            found += [f"{name}:{line}: {text}" for line, text in limits(ast.parse(path.read_text()))]
    assert not found, "wait with wait_until, or with PATIENCE_S, of tests/waiting.py:\n" + "\n".join(found)
