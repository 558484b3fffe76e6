"""What docs/promises.md says of versions: who opens what, and what is refused, and how."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvledger
from ipc.names import SHM
from kvledger import CacheManager, WorkerFailed
from kvledger.cli import app
from kvledger.debugger import SourceError, open_source
from kvledger.errors import CannotContinue
from kvledger.manager import lifecycle
from statemachine.records.codec import SCHEMA_HASH
from statemachine.records.snapshot import MAGIC, state_digest
from tests.data import ledgers
from workers.followers.follow import Follower, OtherVersion

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
LEDGERS = sorted(DATA.glob("*/ledger.zip"))
OTHER = 0x0101010101010101


@pytest.fixture
def name() -> Iterator[str]:
    name = f"promises-{os.getpid()}"
    yield name
    ledgers.remove(name)


def contents(name: str) -> dict[str, bytes]:
    """Everything but the control segment, in which whoever looks says that it is there."""
    files = [file for file in ledgers.objects(name) if file != f"{name}.control"]
    return {file: Path(SHM, file).read_bytes() for file in files}


def test_the_present_table_has_a_ledger_in_the_corpus() -> None:
    """Missing: ``python -m tests.data.generate`` writes it beside the recordings of a new table."""
    assert f"{SCHEMA_HASH:016x}" in {path.parent.name for path in LEDGERS}


def test_every_released_version_is_in_the_corpus() -> None:
    """A release writes down its event table, and whoever changes the table afterwards changes the version."""
    released = re.findall(r"^## v?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    tables = json.loads((DATA / "versions.json").read_text())
    assert sorted(tables) == sorted(released)
    assert all((DATA / table / "digests.json").exists() for table in tables.values())
    assert tables.get(kvledger.__version__, f"{SCHEMA_HASH:016x}") == f"{SCHEMA_HASH:016x}"


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.parent.name)
def test_a_ledger_of_each_table(name: str, path: Path) -> None:
    """An engine goes on with one of its own table only; the debugger reads them all."""
    ledgers.lay_out(path, name)
    told = json.loads((path.parent / "digests.json").read_text())["ledger.zip"]["digests"]
    before = contents(name)
    with open_source(name) as source:
        state = source.at(source.last)
        assert (source.contradiction, source.damage) == ("", "")
        assert state_digest(state).hex() == told[MAGIC.decode()]
    if path.parent.name != f"{SCHEMA_HASH:016x}":
        with pytest.raises(CannotContinue, match="another event table: open it with the kvledger that wrote it"):
            CacheManager.open(name)
        assert contents(name) == before
        return
    with CacheManager.open(name) as manager:
        assert manager.admit("again", ledgers.PROMPT).cached_tokens == 16
        assert manager.stats()["requests"] == 21


def of_another_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a ledger whose event table nobody here knows."""
    with monkeypatch.context() as patched:
        patched.setattr(lifecycle.codec, "SCHEMA_HASH", OTHER)
        ledgers.written(name)


def test_a_ledger_of_another_version_is_refused_and_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another_version(name, monkeypatch)
    before = contents(name)
    for start in (lambda: CacheManager.open(name), lambda: CacheManager.open_or_create(name, ledgers.CONFIG)):
        with pytest.raises(CannotContinue, match="open it with the kvledger that wrote it"):
            start()
    with pytest.raises(OtherVersion, match="use the kvledger that writes it"):
        Follower(name)
    with pytest.raises(SourceError, match="read it with the kvledger that writes it"):
        open_source(name)
    done = CliRunner().invoke(app, ["explain", name, "block", "1"])
    assert done.exit_code == 2 and "read it with the kvledger that writes it" in done.output
    assert contents(name) == before
    started = CacheManager.open_or_create(name, ledgers.CONFIG, replace_dead=True)
    assert not started.warm and "another event table" in started.reason
    started.manager.close()


def test_workers_of_one_version_refuse_an_engine_of_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = kvledger.CacheConfig(device_blocks=4, ranks=1)
    with monkeypatch.context() as patched:
        patched.setattr(lifecycle.codec, "SCHEMA_HASH", OTHER)
        with pytest.raises(WorkerFailed, match="the engine runs another version of kvledger"):
            CacheManager.create(name, config)
    assert not ledgers.objects(name)


def test_what_is_between_the_parts_is_kept_apart_from_the_public_calls() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    apart = [re.findall(r"`(\w+)`", line) for line in page.splitlines() if line.startswith("*Between the parts")]
    assert {"attach", "detach", "fold", "disown"} <= {*apart[0]}
    for name in {name for names in apart for name in names}:
        assert f"#### CacheManager.{name}\n" not in page
