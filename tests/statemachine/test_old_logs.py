"""Logs of every event table there has been replay to the digests they were written with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c
from typer.testing import CliRunner

from ipc import KvlogReader
from kvledger.cli import app
from kvledger.debugger import Source, SourceError, open_source
from kvledger.debugger.source.replay import decisions, evolve
from kvledger.debugger.verify.check import check_log
from statemachine.events import KIND_OF, KINDS, AllocationRefused
from statemachine.records.codec import SCHEMA_HASH
from statemachine.records.replay import event_of
from statemachine.records.snapshot import MAGIC, state_digest
from statemachine.records.upcast import EARLIER, UnknownSchema, upcaster

CORPUS = Path(__file__).parents[1] / "data"
LOGS = sorted(CORPUS.glob("*/*.kvlog"))


@pytest.fixture
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Source, Path]]:
    """A log of the corpus, copied to where its index may be written."""
    original: Path = request.param
    path = tmp_path / original.name
    path.write_bytes(original.read_bytes())
    with open_source(str(path)) as source:
        yield source, original


def test_the_corpus_has_a_folder_for_every_table() -> None:
    """An event, or the encoding of a state, has changed: see :mod:`statemachine.records.upcast` for what to do."""
    files = list(CORPUS.glob("*/digests.json"))
    for file in files:
        for name, told in json.loads(file.read_text()).items():
            assert MAGIC.decode() in told["digests"], (file.parent.name, name)
    folders = {file.parent.name for file in files}
    assert folders == {f"{schema:016x}" for schema in (*EARLIER, SCHEMA_HASH)}


@pytest.mark.parametrize("log", LOGS, ids=lambda path: f"{path.parent.name}-{path.stem}", indirect=True)
def test_it_replays_to_the_same_digests(log: tuple[Source, Path]) -> None:
    source, original = log
    told = json.loads((original.parent / "digests.json").read_text())[original.name]
    assert (source.last, source.contradiction, source.damage) == (told["events"], "", "")
    assert state_digest(source.at(source.last)).hex() == told["digests"][MAGIC.decode()]
    compared = list(evolve(source, 1, source.last))
    assert all(digest.equal for digest in compared)
    assert (len(compared) > 3) == source.digests_comparable
    assert check_log(source, 1, source.last, every_event_in_full=True).violation is None


def test_the_present_table_decides_as_it_did(tmp_path: Path) -> None:
    kinds = set()
    for original in CORPUS.glob(f"{SCHEMA_HASH:016x}/*.kvlog"):
        path = tmp_path / original.name
        path.write_bytes(original.read_bytes())
        with open_source(str(path)) as source:
            different = [decision for decision in decisions(source, 1, source.last) if not decision.same]
            assert not different, different[0]
            kinds.update(type(entry.event) for entry in source.entries())
    assert kinds == set(KINDS.values())


def test_the_first_table_did_not_say_which_path_was_refused() -> None:
    first = next(iter(EARLIER))
    for original in CORPUS.glob(f"{first:016x}/*.kvlog"):
        reader = KvlogReader(original)
        records = [record for record in reader.poll() if record.kind == KIND_OF[AllocationRefused]]
        reader.close()
        assert records
        for old, record in zip(records, upcaster(first)(records), strict=True):
            event = event_of(record)
            assert isinstance(event, AllocationRefused) and event.key and event.wanted > event.available
            assert (event.leaf, event.cut, record.time_ns) == (0, 0, old.time_ns)
    with pytest.raises(UnknownSchema):
        upcaster(1)


def test_an_unknown_table_is_refused_with_who_can_read_it(tmp_path: Path) -> None:
    data = bytearray(next(CORPUS.glob(f"{SCHEMA_HASH:016x}/*.kvlog")).read_bytes())
    data[16:24] = b"\x01" * 8
    data[32:36] = crc32c(bytes(data[:32])).to_bytes(4, "little")
    path = tmp_path / "newer.kvlog"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"event table 0101010101010101 .* with kvledger \d+\.\d+.*, or a newer"):
        open_source(str(path))
    done = CliRunner().invoke(app, ["log", str(path)])
    assert done.exit_code == 2 and done.output.count("\n") == 1
    data[36:60] = bytes(24)  # a file that does not say which version wrote it
    path.write_bytes(data)
    with pytest.raises(SourceError, match="read it with the kvledger that wrote it"):
        open_source(str(path))
