"""Every error that a call of the manager or of the hand-over can raise stands in the table of docs/integrating.md."""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

import kvledger
from kvledger import CacheConfig, CacheManager, CallTooLarge

ROOT = Path(__file__).parents[2]
REACHED = (
    "kvledger/config.py",
    "kvledger/handoff",
    "kvledger/manager",
    "statemachine/apply",
    "statemachine/content.py",
    "statemachine/decide",
    "ipc",
    "workers/pools",
    "workers/processes/adopted.py",
    "workers/processes/presence.py",
    "workers/processes/supervisor.py",
)
"""What runs inside a call."""
_ROOTS = {"RuntimeError", "ValueError", "AssertionError"}
NEVER_LEAVES = {
    "NoCommand": "the debugger derives commands, no call does",
    "OutOfOrder": "poll() ends transfers in their order",
    "TransactionTooLarge": "becomes CallTooLarge",
    "UnknownTransfer": "poll() ends only transfers that are there",
}
"""Errors that are raised in there and that no caller meets: why."""


def raised() -> set[str]:
    """Names of the project's own errors that are raised or built in :data:`REACHED`."""
    paths = [ROOT / name for name in REACHED]
    files = [file for path in paths for file in ([path] if path.suffix else path.rglob("*.py"))]
    trees = [ast.parse(file.read_text()) for file in files]
    defined = [ROOT / "statemachine" / "errors.py", ROOT / "kvledger" / "errors.py"]
    sources = [*trees, *(ast.parse(file.read_text()) for file in defined)]
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in sources
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def is_error(name: str) -> bool:
        return any(base in _ROOTS or is_error(base) for base in bases.get(name, ()))

    calls = (node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {name.id for name in calls if isinstance(name, ast.Name) and is_error(name.id)}


def told() -> set[str]:
    """Names in the first column of the table."""
    page = (ROOT / "docs" / "integrating.md").read_text()
    table = page.partition("## What a call can raise\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row)}


def documented() -> set[str]:
    """Names under ``Raises:`` of the public methods of what ``kvledger`` exports."""
    names: set[str] = set()
    exported = [getattr(kvledger, name) for name in kvledger.__all__]
    for each in exported:
        for name, member in inspect.getmembers(each) if inspect.isclass(each) else ():
            if not name.startswith("_"):
                section = (inspect.getdoc(member) or "").partition("Raises:\n")[2].partition("\n\n")[0]
                names.update(re.findall(r"\b(?:[a-z]+\.)*([A-Z][a-z]\w+)\b(?=[,:\n]|$)", section))
    return names


def test_the_table_has_every_error() -> None:
    table = told()
    assert {"OutOfBlocks", "TimeoutError"} < table
    found = raised()
    assert {"OutOfBlocks", "WriterAlive", "LogCorrupt", "PoolMismatch"} < found, "the walk sees what is raised"
    assert not found - table - set(NEVER_LEAVES), "raised in a call, and not in the table of docs/integrating.md"
    assert set(NEVER_LEAVES) <= found, "no longer raised"
    assert not documented() - table, "named by a docstring, and not in the table"
    exported = {
        name
        for name in kvledger.__all__
        if inspect.isclass(cls := getattr(kvledger, name)) and issubclass(cls, BaseException)
    }
    assert not exported - table, "exported, and not in the table"


def test_the_error_says_how_long_a_prompt_may_be() -> None:
    """By default as many tokens as docs/integrating.md says, for blocks of 16 and of 4."""
    page = (ROOT / "docs" / "integrating.md").read_text()
    assert "about 980,000 tokens fit with 16 tokens per block, 838,000 with 4" in page
    for size, most in ((16, 980_000), (4, 838_000)):
        config = CacheConfig(block_size=size, device_blocks=1_100_000 // size)
        with CacheManager.create(f"longest-{os.getpid()}", config) as manager:
            prompt = np.zeros(1_100_000, np.int32)
            with pytest.raises(CallTooLarge, match=r"a prompt has up to about [\d,]+ new tokens here") as refused:
                manager.admit("long", prompt)
            number = int(str(refused.value).split("up to about ")[1].split()[0].replace(",", ""))
            assert most <= number < most * 1.01
            manager.admit("long", prompt[:most])
            manager.cache("long")
