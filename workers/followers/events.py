"""KV events for routers: what a ledger's log says about cached blocks, published over ZeroMQ as vLLM publishes its own.

Every event of the log is one batch, also where it changes nothing for a router, and a batch's number is the event's
sequence number less one. So the batches are a function of the log alone: a publisher that is killed and started again,
and an engine that is, go on with the same numbers, and who has missed some asks for them and gets them from the log, as
far back as that is kept. Who has missed more gets a batch that clears everything and stores what there is instead.

Format (vLLM 0.33, ``vllm/distributed/kv_events.py``): a message has the frames topic, number (8 bytes, big-endian) and
payload; the payload is a msgpack array ``[seconds, events, data-parallel rank]``, each event a map with its ``type``.
Requests for batches come as ``[b"", first number]`` and are answered with ``[b"", topic, number, payload]`` each, then
with number -1 and no payload.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgpack
import zmq

from ipc import LedgerError, Overrun, Record
from statemachine.events import Tier
from statemachine.records.replay import event_of
from statemachine.state.state import State
from workers.followers.follow import Follower
from workers.followers.residency import Block, Change, Removed, Residency, Stored

MEDIA = {Tier.DEVICE: "GPU", Tier.HOST: "CPU"}
"""What the tiers are called in events."""
_END = (-1).to_bytes(8, "big", signed=True)
_DONE = object()
_SLICE = 1000
"""Batches that are sent to an asker before what is new is looked at again."""
_FAR_BACK = 100_000
"""Who has missed more batches than this gets all that is cached now instead."""
_MOST_WAITING = 100_000
"""Batches that may wait for a subscriber that is slow; it loses what is more, sees the gap, and asks."""


class Batches:
    """The batches of a ledger from some point of its log on.

    Args:
        ledger: its name.
        rank: data-parallel rank of the engine, which stands in every batch.
        since: number of the first batch that is wanted; ``None``: from the newest snapshot on.
        whole: begin with a batch of all that is cached there, for who knows nothing.

    Raises:
        ipc.LedgerNotFound, OtherVersion, ipc.Overrun: as :class:`workers.followers.follow.Follower`.
    """

    def __init__(self, ledger: str, *, rank: int = 0, since: int | None = None, whole: bool = False) -> None:
        self._rank = rank
        self._since = since or 0
        self._follower = Follower(ledger) if since is None else Follower(ledger, before=since + 1)
        self._residency = Residency()
        self._time_ns = 0
        self._whole = whole or (since is not None and self._follower.sequence > self._since)
        """Whether what comes next begins with all that is announced, as what was asked for is gone."""

    def poll(self, timeout: float = 0.0) -> Iterator[tuple[int, bytes]]:
        """The next batches, each with its number; waits up to ``timeout`` seconds for some.

        Raises:
            ipc.LogCorrupt, InvariantViolation, statemachine.records.codec.CodecError: the log cannot be followed.
            ipc.Overrun: it was overrun, and there is no snapshot to go on from.
        """
        try:
            records = self._follower.poll(timeout)
        except Overrun:
            self._follower.resynchronise()
            self._residency = Residency()
            self._whole = True
            records = self._follower.poll()
        state = self._follower.state
        if self._whole and state is not None:
            self._whole = False
            if records:
                self._time_ns = records[0].time_ns
            yield self._follower.sequence - 1, self._payload(self._residency.everything(state))
        for record in records:
            yield from self._batch(record)

    def _batch(self, record: Record) -> Iterator[tuple[int, bytes]]:
        event = event_of(record)
        before = self._follower.state
        if before is not None:
            self._residency.before(before, event)
        after: State = self._follower.apply([record])
        changes = self._residency.after(after, event) if before is not None else []
        self._time_ns = record.time_ns
        if record.sequence > self._since:
            yield record.sequence - 1, self._payload(changes)

    def _payload(self, changes: list[Change]) -> bytes:
        events = [_encoded(change, self._follower.state) for change in changes]
        return bytes(msgpack.packb([self._time_ns / 1e9, events, self._rank]))

    @property
    def next_number(self) -> int:
        """Number of the next batch."""
        return self._follower.sequence

    def ended(self) -> bool:
        """Whether nothing will come any more."""
        return self._follower.ended()

    def removed(self) -> bool:
        """Whether the ledger was closed and is gone, with all its blocks."""
        return not self._follower.reader.exists()

    def last(self) -> tuple[int, bytes]:
        """The batch after the last event of a ledger that is gone: nothing of it can be found any more."""
        return self.next_number, bytes(msgpack.packb([self._time_ns / 1e9, [{"type": "AllBlocksCleared"}], self._rank]))

    def close(self) -> None:
        """Stop reading."""
        self._follower.close()


def _encoded(change: Change, state: State | None) -> dict[str, Any]:
    assert state is not None
    if isinstance(change, Stored):
        first: Block = change.blocks[0]
        return {
            "type": "BlockStored",
            "block_hashes": [block.hash for block in change.blocks],
            "parent_block_hash": first.parent,
            "token_ids": [token for block in change.blocks for token in block.tokens],
            "block_size": state.opened.block_size,
            "lora_id": None,
            "medium": MEDIA[change.tier],
            "lora_name": first.adapter or None,
        }
    if isinstance(change, Removed):
        return {"type": "BlockRemoved", "block_hashes": change.hashes, "medium": MEDIA[change.tier]}
    return {"type": "AllBlocksCleared"}


class Publisher:
    """Publishes a ledger's batches, and answers who has missed some; :meth:`step` is the whole loop body.

    Args:
        ledger: its name.
        endpoint: ZeroMQ address to bind and publish on; routers connect to it, and may come and go.
        replay_endpoint: ZeroMQ address to bind, at which batches can be asked for; empty: nobody answers.
        topic: first frame of each message.
        rank: data-parallel rank of the engine.

    Raises:
        ipc.LedgerNotFound, OtherVersion, ipc.Overrun: as :class:`workers.followers.follow.Follower`.
        zmq.ZMQError: an address cannot be bound; it names the address.
    """

    def __init__(
        self, ledger: str, endpoint: str, *, replay_endpoint: str = "", topic: str = "", rank: int = 0
    ) -> None:
        self.ledger = ledger
        self.published = 0
        """Batches published."""
        self.answered = 0
        """Requests for missed batches that were answered."""
        self._topic = topic.encode()
        self._rank = rank
        self._answers: list[Iterator[None]] = []
        self._batches = Batches(ledger, rank=rank)
        for _ in self._batches.poll():
            pass  # what was logged before this publisher came is there for who asks
        self._context = zmq.Context()
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self._out = self._bound(zmq.PUB, endpoint)
            if replay_endpoint:
                self._replay = self._bound(zmq.ROUTER, replay_endpoint)
        except BaseException:
            self.close()
            raise

    def _bound(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = _MOST_WAITING
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close()
            raise zmq.ZMQError(error.errno, f"{endpoint} cannot be bound: {error.strerror}") from error
        return socket

    def step(self, timeout: float = 0.0) -> int:
        """Publish what was logged and answer who asked; waits up to ``timeout`` seconds. Returns the batches.

        Raises:
            as :meth:`Batches.poll`.
        """
        count = 0
        for number, payload in self._batches.poll(timeout):
            self._out.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
            count += 1
        self.published += count
        self._answer()
        return count

    def _answer(self) -> None:
        """Begin to answer who has asked, and go on a little with each answer, so that what is new need not wait."""
        while self._replay is not None and self._replay.poll(0):
            frames = self._replay.recv_multipart()
            if len(frames) == 3 and not frames[1] and len(frames[2]) == 8:  # else: not this protocol
                self._answers.append(self._missed(frames[0], int.from_bytes(frames[2], "big")))
        for answer in list(self._answers):
            if next(answer, _DONE) is _DONE:
                self._answers.remove(answer)
                self.answered += 1

    def _missed(self, asker: bytes, first: int) -> Iterator[None]:
        """Send one asker what was published from a number on; pauses now and then."""
        assert self._replay is not None
        until = self._batches.next_number  # what comes later, comes with the live ones
        sent = 0
        near = until - first <= _FAR_BACK
        with contextlib.suppress(LedgerError):  # the log has gone on or is gone: the asker sees that it got less
            missed = Batches(self.ledger, rank=self._rank, since=first if near else None, whole=not near)
            try:
                while missed.next_number < until:
                    for number, payload in missed.poll():
                        if number < until:
                            frames = (asker, b"", self._topic, number.to_bytes(8, "big"), payload)
                            self._replay.send_multipart(frames)
                            sent += 1
                            if not sent % _SLICE:
                                yield
            finally:
                missed.close()
        self._replay.send_multipart((asker, b"", b"", _END, b""))

    def ended(self) -> bool:
        """Whether the ledger has ended: nobody writes it any more, or it is gone."""
        return self._batches.ended()

    def close(self) -> None:
        """Say that nothing is cached any more where the ledger is gone, and leave."""
        try:
            if not self._context.closed and hasattr(self, "_out") and self._batches.removed():
                number, payload = self._batches.last()
                self._out.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
                self._out.linger = 1000  # milliseconds for who is connected to get it
        finally:
            self._batches.close()
            self._context.destroy()
