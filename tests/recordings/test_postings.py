"""The index leaves nothing out: what is explained with it is what reading every event of the log explains."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.garbled.engine import Engine
from ipc import KvlogReader, KvlogWriter
from kvledger.debugger import Source, SourceError, open_source
from kvledger.debugger.explain.explain import explain_block, explain_hash, explain_request, explain_transfer
from kvledger.debugger.explain.story import Explanation
from kvledger.debugger.source.file import RecordedSource
from kvledger.recordings import index, postings
from kvledger.recordings.postings import Kind
from statemachine.decide.derive import path_words
from statemachine.events import HostPolicy, RequestMatched, Tier
from statemachine.hashing import block_hashes
from statemachine.records.snapshot import snapshot
from tests.data.generate import drive

MANY = 10_000
"""More facts than there are."""


class Unread(RecordedSource):
    """A recording that does not know where anything is mentioned."""

    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        starts = self.starts()
        return list(zip(starts, [*(start - 1 for start in starts[1:]), self.last]))


@pytest.fixture(scope="module", params=list(HostPolicy), ids=lambda policy: policy.name.lower())
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mentioned") / "every.kvlog"
    host = (0, 0) if request.param == HostPolicy.OFF else (10, 5)
    engine = Engine(path, 14, *host, request.param, backup_after=2)
    drive(engine, random.Random(request.param))
    engine.close()
    return path


@pytest.fixture(scope="module", params=["whole", "cut"])
def sources(
    request: pytest.FixtureRequest, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Source, Source]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "SNAPSHOT_EVERY", 8)
        patch.setattr(postings, "_VOLUME", 3)
        if request.param == "cut":
            path = second_half(path, tmp_path_factory.mktemp("cut"))
        with open_source(str(path)) as indexed, Unread(str(path), lambda done, total: None) as unread:
            assert len(indexed.starts()) > 10
            yield indexed, unread


def second_half(path: Path, folder: Path) -> Path:
    """The same log from its middle on, beginning with a snapshot."""
    cut = folder / "cut.kvlog"
    with open_source(str(path)) as source:
        start = next(begun for begun in source.starts() if begun > source.last // 3)
        state = snapshot(source.at(start - 1))
    reader = KvlogReader(path)
    with KvlogWriter(cut, schema_hash=reader.schema_hash, base_sequence=start, snapshot=state) as writer:
        while records := reader.poll(1):
            writer.write([record for record in records if record.sequence >= start])
    reader.close()
    return cut


def told(explain: Callable[..., Explanation], *about: Any) -> object:
    try:
        found = explain(*about)
    except SourceError as error:
        return str(error)
    return found.now, found.history


def places(source: Source) -> list[int]:
    return sorted({*range(source.first + 5, source.last, 41), source.last})


def test_blocks(sources: tuple[Source, Source]) -> None:
    indexed, unread = sources
    for at in places(indexed):
        for tier in Tier:
            for block in range(16):
                with_index = told(explain_block, indexed, block, tier, at, MANY)
                assert with_index == told(explain_block, unread, block, tier, at, MANY), (at, tier, block)


def test_requests_and_transfers(sources: tuple[Source, Source]) -> None:
    indexed, unread = sources
    numbers = {entry.event.request for entry in indexed.entries() if isinstance(entry.event, RequestMatched)}
    for number in sorted(numbers):
        for at in (indexed.last // 2, indexed.last):
            with_index = told(explain_request, indexed, f"#{number}", at, MANY)
            assert with_index == told(explain_request, unread, f"#{number}", at, MANY), (at, number)
    for number in range(1, indexed.at(indexed.last).next_transfer):
        with_index = told(explain_transfer, indexed, number, indexed.last, MANY)
        assert with_index == told(explain_transfer, unread, number, indexed.last, MANY), number


def test_contents(sources: tuple[Source, Source]) -> None:
    """Also of contents that are cached nowhere any more; what both say about what never was is the same too."""
    indexed, unread = sources
    hashes = {"00" * 16: 0}
    for entry, state in indexed.replay():
        if isinstance(entry.event, RequestMatched):
            request = state.requests[entry.event.request]
            words = path_words(request.leaf, 0, state.block_bytes) + request.words
            for hash in block_hashes(words, state.opened.block_size, request.namespace, items=request.items):
                hashes.setdefault(hash.hex(), entry.sequence)
    gone = 0
    for name in random.Random(0).sample(sorted(hashes), min(len(hashes), 12)):
        for at in places(indexed):
            with_index = told(explain_hash, indexed, name, at, MANY)
            assert with_index == told(explain_hash, unread, name, at, MANY), (at, name)
            gone += "it is cached nowhere" in str(with_index)
    assert gone
