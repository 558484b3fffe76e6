"""A ``.kvlog`` file as a source: any question about its past is answered from its index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ipc import (
    KvlogReader,
    LedgerError,
    Record,
)
from kvledger.debugger.source.source import Source, SourceError, Tail
from kvledger.recordings.postings import Kind
from kvledger.recordings.recording import Recording
from statemachine.state.state import State


class RecordedSource(Source):
    """A ``.kvlog`` file."""

    def __init__(self, name: str, progress: Callable[[int, int], None]) -> None:
        super().__init__(name)
        self.recording = Recording(Path(name), progress)
        self.digests_comparable = self.recording.digests_comparable
        self.unfinished = not self.recording.ended
        if self.recording.damage:
            self._find_damage()

    @property
    def first(self) -> int:
        """See :class:`Source`, like the rest."""
        return self.recording.first

    @property
    def last(self) -> int:
        return self.recording.last

    @property
    def last_state(self) -> int:
        return self.recording.last_state

    @property
    def contradiction(self) -> str:
        return self.recording.contradiction

    def intact(self) -> list[tuple[int, int]]:
        gaps = self.recording.gaps
        starts, ends = [self.first, *(last + 1 for _, last in gaps)], [*(first - 1 for first, _ in gaps), self.last]
        return [(start, end) for start, end in zip(starts, ends, strict=True) if start <= end]

    def records(self, start: int | None = None) -> Iterator[list[Record]]:
        start = self.first if start is None else start
        reached = start - 1
        for records in self.recording.records(start):
            reached = records[-1].sequence
            yield records
        if reached < self.last and not self.damage:  # damaged since it was indexed
            self._find_damage()

    def _find_damage(self) -> None:
        reader = KvlogReader(self.recording.path)
        try:
            damage = reader.seek_damage()
        finally:
            reader.close()
        if damage is not None:
            self.damage, self.damaged_at = str(damage), damage.offset

    def at(self, sequence: int) -> State:
        try:
            return self.recording.at(sequence)
        except IndexError as error:
            raise SourceError(str(error)) from None

    def anchor(self, sequence: int) -> int:
        return self.recording.anchor(sequence)

    def starts(self) -> list[int]:
        return self.recording.starts()

    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        try:
            return self.recording.spans(kind, id)
        except LedgerError as error:
            raise SourceError(str(error)) from error

    def before(self, sequence: int) -> State | None:
        if sequence <= self.first:
            return self.recording.base()
        return self.at(sequence - 1)

    def tail(self, start: int | None = None) -> Tail:
        raise SourceError(f"{self.name} is a recording, it does not grow: follow a living ledger by its name")

    def close(self) -> None:
        self.recording.close()
