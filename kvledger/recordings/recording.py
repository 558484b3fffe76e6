"""A recording (a ``.kvlog`` file) as the sequence of states it adds up to: any of them at once.

The first opening replays the file and keeps the state after every 5,000 events in ``FILE.kvlog.index``, a zip archive
(:mod:`kvledger.recordings.index`), mode 0600 like the recording itself: it holds users' prompts too. Whatever does not
fit the recording any more is built anew; a half-written index is never seen, it appears when it is complete.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import logging
import os
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import xxhash
import zstandard

from ipc import KvlogReader, LogCorrupt, Record
from ipc.kvlog import Place
from kvledger.recordings.index import TABLE, TIMELINE, VERSION, build, unpack
from kvledger.recordings.postings import Kind, stretches
from kvledger.recordings.proportion import in_proportion
from kvledger.recordings.timeline import Timeline
from kvledger.text import printable
from statemachine.errors import Contradiction
from statemachine.records import codec
from statemachine.records.replay import Replay
from statemachine.records.snapshot import MAGIC, SnapshotError, restore
from statemachine.records.upcast import UnknownSchema, digests_comparable, upcaster
from statemachine.state.state import State

_REMEMBERED = 64
_log = logging.getLogger(__name__)


class Recording:
    """States of a recording, by event sequence.

    Args:
        path: the ``.kvlog`` file.
        progress: called with bytes read and bytes in all while the index is being built.

    Raises:
        ipc.LedgerError: the file cannot be read, or is no recording.
    """

    def __init__(self, path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.path = path
        self._reader = KvlogReader(path)
        self._archive: zipfile.ZipFile | None = None
        self._asked: OrderedDict[tuple[Kind, int], list[int]] = OrderedDict()
        """What was asked lately: the stretches that mention it."""
        try:
            self._upcast = self._upcaster()
            self.digests_comparable = digests_comparable(self._reader.schema_hash)
            """Whether digests in the recording mean what they mean today."""
            self.ended = self._reader.ended
            """Whether the file ends with an end mark, where files of its version have one."""
            self._restorable()
            self._open_index(progress)
        except BaseException:
            self.close()
            raise

    def _restorable(self) -> None:
        try:
            self.base()
        except SnapshotError as error:
            raise LogCorrupt(str(self.path), 64, f"{error}: read it with the kvledger that wrote it") from None

    def _upcaster(self) -> Callable[[list[Record]], list[Record]]:
        reader = self._reader
        try:
            return in_proportion(upcaster(reader.schema_hash), self.path, self.path.stat().st_size)
        except UnknownSchema as error:
            program = f"kvledger {reader.program}" if reader.program else "the kvledger that wrote it"
            raise LogCorrupt(str(self.path), 0, f"{error}: read it with {program}, or a newer one") from None

    def _open_index(self, progress: Callable[[int, int], None]) -> None:
        index = self.path.with_name(self.path.name + ".index")
        identity = self._identity()
        table = self._load(index, identity) or self._build_index(index, identity, progress)
        self.last: int = table["last"]
        """Sequence of the last event."""
        self.damage: str = table["damage"]
        """Why the recording ends early; empty if it does not."""
        self.last_state: int = table["last_state"]
        """Sequence of the last event that has a state. An event that contradicts the state it meets has none."""
        self.contradiction: str = table["contradiction"]
        """What is wrong with event ``last_state + 1``; empty if every event has a state."""
        self.gaps: list[tuple[int, int]] = [(first, last) for first, last in table["gaps"]]
        """Events that are missing, first and last, with others behind them: no state is known after the first gap."""
        self._resumed = [Place(*place) for place in table["resumed"]]
        """Where reading can go on behind them."""
        self._places = [Place(*place) for place in table["places"]]
        self._contexts: list[int] = table["contexts"]
        self._sequences = [place.sequence for place in self._places]

    def _build_index(self, index: Path, identity: str, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """Build it beside the recording, or where there is room: reading needs nothing that can be written to.

        What is not beside the recording lives as long as this object.
        """
        size = self.path.stat().st_size
        begin = self._reader.place
        for folder in (index.parent, Path(tempfile.gettempdir()), None):
            name = ""
            self._reader.go_to(begin)
            try:
                if folder is None:
                    file: IO[bytes] = io.BytesIO()
                else:
                    handle, name = tempfile.mkstemp(dir=folder, prefix=index.name)
                    file = os.fdopen(handle, "w+b")
                    os.fchmod(handle, 0o600)  # whatever the umask is
                build(self._reader, self._upcast, identity, file, lambda done: progress(done, size))
                file.flush()
                if folder == index.parent:
                    file.close()
                    os.replace(name, index)
                elif name:
                    os.unlink(name)
            except OSError as error:
                _log.info("%s", printable(f"the index of {self.path} cannot be kept in {folder}: {error}"))
                _remove(name)
                continue
            except BaseException:
                _remove(name)
                raise
            table = self._load(index if folder == index.parent else file, identity)
            assert table is not None
            return table
        raise AssertionError("memory is a place")

    def _identity(self) -> str:
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(4096)
            file.seek(max(size - 4096, 0))
            ends += file.read()
        return f"{VERSION}-{codec.SCHEMA_HASH:x}-{MAGIC.decode()}-{size}-{xxhash.xxh3_128_hexdigest(ends)}"

    def _load(self, index: Path | IO[bytes], identity: str) -> dict[str, Any] | None:
        try:
            archive = zipfile.ZipFile(index)
        except (OSError, zipfile.BadZipFile):
            return None
        with contextlib.suppress(KeyError, ValueError, TypeError, zipfile.BadZipFile):
            table = json.loads(archive.read(TABLE))
            if table["identity"] == identity:
                self._archive = archive
                return dict(table)
        archive.close()
        return None

    def timeline(self) -> Timeline:
        """What the recording does over time, up to the last event that has a state.

        Raises:
            ipc.LogCorrupt: the index is damaged.
        """
        assert self._archive is not None
        try:
            return Timeline.unpack(self._archive.read(TIMELINE), self.base())
        except (KeyError, ValueError, zipfile.BadZipFile) as error:
            raise LogCorrupt(str(self._archive.filename), 0, f"{error}: remove this file, it is made anew") from error

    @property
    def first(self) -> int:
        """Sequence of the first event."""
        return self._reader.base_sequence

    def anchor(self, sequence: int) -> int:
        """The event after which the nearest state before or at ``sequence`` is kept: what follows is replayed."""
        return self._sequences[max(bisect.bisect_right(self._sequences, sequence + 1) - 1, 0)] - 1

    def starts(self) -> list[int]:
        """First events of the stretches between kept states, ascending."""
        return self._sequences

    def spans(self, kind: Kind, id: int) -> list[tuple[int, int]]:
        """The stretches, first and last event, that may mention something; events without a state are in the last.

        Raises:
            ipc.LogCorrupt: the index is damaged.
        """
        numbers = self._stretches(kind, id)
        if (self.contradiction or self.gaps) and len(self._sequences) - 1 not in numbers:
            numbers = [*numbers, len(self._sequences) - 1]
        ends = [*(sequence - 1 for sequence in self._sequences[1:]), self.last]
        return [(self._sequences[number], ends[number]) for number in numbers]

    def _stretches(self, kind: Kind, id: int) -> list[int]:
        asked = self._asked
        if (kind, id) not in asked:
            assert self._archive is not None
            try:
                asked[kind, id] = stretches(self._archive.read, len(self._sequences), kind, id)
            except (KeyError, ValueError, zipfile.BadZipFile) as error:
                why = f"{error}: remove this file, it is made anew"
                raise LogCorrupt(str(self._archive.filename), 0, why) from error
            if len(asked) > _REMEMBERED:
                asked.popitem(last=False)
        return asked[kind, id]

    def base(self) -> State | None:
        """The state that the first event meets; ``None`` where it is the first of its ledger."""
        return restore(self._reader.snapshot, expect_sound=False) if self._reader.snapshot else None

    def at(self, sequence: int) -> State:
        """The state after event ``sequence``: the nearest snapshot before it, and what follows.

        Raises:
            IndexError: there is no such event in the recording, or events before it are missing.
            Contradiction: the event, or one before it, contradicts the state that it meets.
        """
        if not self.first <= sequence <= self.last:
            raise IndexError(f"{self.path} holds the events {self.first} to {self.last}, not {sequence}")
        if sequence > self.last_state:
            if self.contradiction:
                raise Contradiction(self.last_state + 1, self.contradiction)
            raise IndexError(f"no state is known after event {self.last_state}: {self.damage}")
        # What is kept under the number of an event is the state that it meets.
        number = bisect.bisect_right(self._sequences, sequence + 1) - 1
        place = self._places[number]
        data = self._kept(number) if number else self._reader.snapshot
        replay = Replay(restore(data, expect_sound=False) if data else None, compare=False)
        self._reader.go_to(place)
        left = sequence - place.sequence + 1
        while left:
            records = self._upcast(self._reader.poll(1)[:left])
            replay.feed(records)
            left -= len(records)
        return replay.state

    def _kept(self, number: int) -> bytes:
        assert self._archive is not None
        place = self._places[number]
        try:
            context = self._reader.unpack(self._contexts[number], place.offset)
            return unpack(self._archive.read(str(place.sequence)), context)
        except (KeyError, zstandard.ZstdError, zipfile.BadZipFile) as error:
            raise LogCorrupt(str(self._archive.filename), 0, f"{error}: remove this file, it is made anew") from error

    def records(self, start: int) -> Iterator[list[Record]]:
        """The records from event ``start`` on, in whole transactions, a chunk at a time. Each call reads for itself.

        They end where events are missing.
        """
        reader = KvlogReader(self.path, from_sequence=start)
        try:
            kept = self._places[max(bisect.bisect_right(self._sequences, start) - 1, 0)]
            place = max([kept, *(each for each in self._resumed if each.sequence <= start)])
            reader.go_to(place)
            reader.cursor = max(start, place.sequence)
            while records := reader.poll(1):
                yield self._upcast(records)
        finally:
            reader.close()

    def close(self) -> None:
        """Close the files; the index stays for the next time."""
        self._reader.close()
        if self._archive is not None:
            self._archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)
