"""vLLM's complete engine generates the same tokens on a ledger as with its own manager, in every mode it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S

pytest.importorskip("vllm._C")  # the CPU build; the files of another one cannot run a model here

from tests.vllm.complete import MODES

ROOT = Path(__file__).parents[2]


def ran(mode: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run. Hashes are not random: vLLM keeps its adapters in sets, and their order changes what it generates."""
    always = {"PYTHONPATH": str(ROOT), "KVLEDGER_NAME": f"complete-{os.getpid()}", "PYTHONHASHSEED": "0"}
    return subprocess.run(
        [sys.executable, "-m", "tests.vllm.complete", mode, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        cwd=ROOT,
        env={**os.environ, **always, **environment},
    )


def generated(mode: str, *arguments: str, **environment: str) -> dict[str, Any]:
    done = ran(mode, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_same(mode: str) -> None:
    theirs, ours = generated(mode), generated(mode, "ours")
    assert theirs["manager"] == "KVCacheManager" and ours["manager"] == "LedgerKVCacheManager"
    assert ours["texts"] == theirs["texts"]
    # What came as embeddings is never found again: the ledger does not know its content.
    assert ours["hits"] == theirs["hits"] or mode == "embeddings"
    assert ours["reset"] and not ours["left"] and not ours["broken"] and ours["free"]
    assert (ours["hits"][1] > 0) == (mode != "uncached")
    if mode != "thousand":
        assert (ours["preempted"] > 0) == (mode in ("preempted", "priority", "turbulent"))


def test_the_plugin_needs_no_flag() -> None:
    """It is found where kvledger is installed; asynchronous scheduling stays."""
    ours = generated("asynchronous", "ours", KVLEDGER_VLLM="1")
    assert ours["manager"] == "LedgerKVCacheManager" and ours["texts"] == generated("asynchronous")["texts"]
