"""Builds the index of a recording: kept states, what is mentioned where, the timeline.

A kept state is mostly the words of what is cached, and those stand in the log, most of them not far before it. So it is
compressed with the log before it as its *context*, down to a tenth of what it takes alone.
"""

from __future__ import annotations

import json
import zipfile
from collections import deque
from collections.abc import Callable
from typing import IO

import zstandard

from ipc import KvlogReader, Record
from ipc.kvlog import Place
from kvledger.recordings.postings import Postings
from kvledger.recordings.timeline import ROW_EVENTS, Timeline
from statemachine.errors import Contradiction
from statemachine.records.replay import Replay
from statemachine.records.snapshot import restore, snapshot

SNAPSHOT_EVERY = 5_000
VERSION = 10
TABLE, TIMELINE = "table.json", "timeline"
_CONTEXT = 2
"""Bytes of context per byte of state."""
_LARGEST_CONTEXT = 64 << 20


def build(
    reader: KvlogReader,
    upcast: Callable[[list[Record]], list[Record]],
    identity: str,
    file: IO[bytes],
    progress: Callable[[int], None],
) -> None:
    """Replay a recording from its beginning and write its index.

    Args:
        identity: of the recording, to be found in the index.
        progress: called with the bytes of the recording that are done.

    Raises:
        OSError: the index cannot be written.
    """
    before = restore(reader.snapshot, expect_sound=False) if reader.snapshot else None
    with zipfile.ZipFile(file, "w") as archive:
        postings = Postings(before, archive.writestr)
        replay = Replay(before, compare=False, watch=postings.add)
        timeline = Timeline()
        context = _Context(reader)
        places = [reader.place]
        contexts = [reader.place.offset]
        indexed = 0
        contradiction: Contradiction | None = None
        while True:
            place = reader.place
            records = upcast(context.poll())
            if not records:
                break
            if contradiction is not None:
                continue
            if replay.events >= indexed + SNAPSHOT_EVERY:
                state = snapshot(replay.state)
                contexts.append(context.start(len(state)))
                places.append(place)
                archive.writestr(str(place.sequence), pack(state, reader.unpack(contexts[-1], place.offset)))
                postings.end_stretch(replay.state)
                indexed = replay.events
                progress(place.offset)
            try:
                for begin in range(0, len(records), ROW_EVENTS):
                    _replay_row(replay, timeline, records[begin : begin + ROW_EVENTS])
            except Contradiction as error:
                contradiction = error
        postings.end_stretch(replay.state if replay.events else before)
        postings.close()
        last = reader.place.sequence - 1
        damage = str(reader.damage or "")
        gaps, resumed = _read_on(reader)
        table = {
            "identity": identity,
            "last": reader.place.sequence - 1,
            "last_state": last if contradiction is None else contradiction.sequence - 1,
            "contradiction": str(contradiction or ""),
            "damage": damage,
            "gaps": gaps,
            "resumed": resumed,
            "places": places,
            "contexts": contexts,
        }
        archive.writestr(TIMELINE, timeline.pack())
        archive.writestr(TABLE, json.dumps(table))


def _read_on(reader: KvlogReader) -> tuple[list[tuple[int, int]], list[Place]]:
    """What is intact behind damage: the events that are missing before each stretch of it, and where that begins."""
    gaps: list[tuple[int, int]] = []
    places: list[Place] = []
    last = reader.place
    while reader.resume():
        place = reader.place
        while reader.poll(1):
            pass
        if reader.place.sequence > place.sequence:
            gaps.append((last.sequence, place.sequence - 1))
            places.append(place)
            last = reader.place
    reader.place = last
    return gaps, places


class _Context:
    """Reads the chunks of a recording, and knows where the last few of them begin."""

    def __init__(self, reader: KvlogReader) -> None:
        self._reader = reader
        self._chunks: deque[tuple[int, int]] = deque()
        """The last chunks, each as its offset and its unpacked size in bytes."""
        self._bytes = 0

    def poll(self) -> list[Record]:
        """The records of the next chunk."""
        offset, unpacked = self._reader.place.offset, self._reader.unpacked
        records = self._reader.poll(1)
        self._chunks.append((offset, self._reader.unpacked - unpacked))
        self._bytes += self._chunks[-1][1]
        while self._bytes - self._chunks[0][1] > _LARGEST_CONTEXT:
            self._bytes -= self._chunks.popleft()[1]
        return records

    def start(self, state_bytes: int) -> int:
        """The offset where the context of a state of that size, kept now, begins."""
        wanted = _CONTEXT * state_bytes
        for offset, size in reversed(self._chunks):
            wanted -= size
            if wanted <= 0:
                return offset
        return self._chunks[0][0]


def pack(state: bytes, context: bytes) -> bytes:
    """A state, compressed with what stands in the log before it."""
    bits = (len(context) + len(state)).bit_length()
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1,
        window_log=min(max(bits, 20), 27),  # so that it reaches back over all of the context
        hash_log=min(max(bits - 4, 17), 23),  # so that a place in every eighth word of it is remembered
    )
    dictionary = zstandard.ZstdCompressionDict(context, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(state)


def unpack(packed: bytes, context: bytes) -> bytes:
    """What :func:`pack` made. Raises :class:`zstandard.ZstdError`: it is damaged, or that is not its context."""
    dictionary = zstandard.ZstdCompressionDict(context, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdDecompressor(dict_data=dictionary).decompress(packed)


def _replay_row(replay: Replay, timeline: Timeline, records: list[Record]) -> None:
    """Replay a row's worth of records; those before a contradiction are a row of their own."""
    before = replay.events
    try:
        replay.feed(records)
    finally:
        if done := records[: replay.events - before]:
            timeline.add(done[-1].sequence, done[-1].time_ns, [record.kind for record in done], replay.state)
