"""kvledger compiled (``KVLEDGER_NATIVE=1``, setup.py) gives the same events, digests, errors.

The build is made once, by whoever needs it first, while other test processes go on; these tests begin first
(``conftest.py``), so that nobody waits for them at the end. It is kept until a source changes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import xxhash

ROOT = Path(__file__).parents[2]
_BUILDS = ROOT / "build" / "compiled"
_PACKAGES = ("statemachine", "ipc", "workers", "kvledger")
_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
_TESTS = [
    "ipc/test_log.py",
    "ipc/test_snapshots.py",
    "manager/test_manager.py",
    "project/test_hostile.py",
    "statemachine/test_content.py",
    "statemachine/test_every_event.py",
    "statemachine/test_golden.py",
    "statemachine/test_machine.py",
    "statemachine/test_old_logs.py",
]
_COMPILED = "import kvledger; assert kvledger.is_compiled(), kvledger.__file__"

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler")


def run(*command: str, **environment: str) -> None:
    """A Python process. It has no limit of its own: compiling takes 70 s of processor time, whoever else has it."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def sources() -> str:
    """What the build depends on, in short."""
    digest = xxhash.xxh3_64(f"{sys.version} {sysconfig.get_platform()}".encode())
    paths = [ROOT / name for name in _FILES]
    for package in _PACKAGES:
        paths += (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}".encode() + path.read_bytes())
    return digest.hexdigest()


def build(installed: Path, source: Path) -> None:
    for name in _PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(ROOT / name, source)
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "workers"
    stale.mkdir(parents=True)
    (stale / "deleted.py").touch()  # an earlier build left it; setuptools would pack it
    made = installed.with_suffix(".partial")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made), str(source), KVLEDGER_NATIVE="1")
    assert not (made / "workers" / "deleted.py").exists()
    made.rename(installed)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kvledger is installed compiled, as its sources are now."""
    _BUILDS.mkdir(parents=True, exist_ok=True)
    installed = _BUILDS / sources()
    with open(_BUILDS / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be building it
        if not installed.exists():
            for old in _BUILDS.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
            build(installed, tmp_path_factory.mktemp("source"))
    return installed


@pytest.mark.parametrize("file", _TESTS)
def test_compiled_it_does_the_same(compiled: Path, file: str) -> None:
    path = {"PYTHONPATH": f"{compiled}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
    run("-c", _COMPILED, **path)
    run("-m", "pytest", "--import-mode=append", "-p", "no:cacheprovider", f"tests/{file}", **path)
