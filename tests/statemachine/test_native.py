"""kvledger compiled (``KVLEDGER_NATIVE=1``, setup.py) gives the same events, digests, errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
_TESTS = ["golden", "old_logs", "every_event", "snapshots", "machine", "hostile", "content", "log", "manager"]
_COMPILED = "import kvledger; assert kvledger.is_compiled(), kvledger.__file__"


@pytest.mark.timeout(1000)  # compiling takes 70 s of processor time
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler")
def test_compiled_it_does_the_same(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("statemachine", "ipc", "workers", "kvledger"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "workers"
    stale.mkdir(parents=True)
    (stale / "deleted.py").touch()  # an earlier build left it; setuptools would pack it

    def run(*command: str, **environment: str) -> None:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(installed), str(source), KVLEDGER_NATIVE="1")
    assert not (installed / "workers" / "deleted.py").exists()
    path = {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
    run("-c", _COMPILED, **path)
    files = [f"tests/test_{name}.py" for name in _TESTS]
    run("-m", "pytest", "--import-mode=append", "-p", "no:cacheprovider", *files, **path)
