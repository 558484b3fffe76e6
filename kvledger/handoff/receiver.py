"""The receiving side of split prefill and decode: room for what another instance sends.

The room for a request is a request of its own in the ledger, ``(receiving ...)``: its blocks are in nobody's block
table, so nothing can read or write them by mistake. When everything has arrived they move to the end of the real
request's block table (``BlocksReassigned``), in token order. When it has not, the real request is told at once, and
the room is *quarantined*: released only when nobody can write it any more (:mod:`workers.handoff.tickets`).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from kvledger.config import ConfigError
from kvledger.errors import HandoffError
from kvledger.handoff.peer import PeerLog, Received
from kvledger.manager.handoffs import end_receiving
from kvledger.manager.ranks import table_of
from kvledger.text import logged
from statemachine.decide import request_named
from statemachine.errors import InvalidCommand
from statemachine.events import Outcome, ReleaseReason
from workers.handoff.pushes import Address
from workers.handoff.tickets import Tickets, claimed

if TYPE_CHECKING:
    from kvledger.manager.manager import CacheManager

_log = logging.getLogger(__name__)
_LOOK_AT_CLAIMS_S = 0.005


class _Room:
    """Blocks that another instance may write."""

    def __init__(
        self, request_id: str, own: str, slot: int, ticket: int, first: int, peer: PeerLog, deadline: float
    ) -> None:
        self.request_id = request_id
        """The request that it is for."""
        self.own = own
        """The request that has the blocks meanwhile."""
        self.slot = slot
        self.ticket = ticket
        self.first = first
        self.peer = peer
        self.deadline = deadline


class Receiver:
    """Reserves blocks of one manager for what prefill instances on this host send.

    The manager's thread makes all calls; closing the manager closes the receiver.

    ::

        receiver = Receiver(manager)
        manager.match("request-1", prompt)  # what is cached here need not be sent
        address = receiver.reserve("request-1", blocks, peer="prefill-0")
        ...  # address.text() goes to the prefill instance
        for received in receiver.poll():  # once per scheduler step
            if received.outcome != Outcome.DONE:
                ...  # allocate, and compute it here

    Raises:
        ConfigError: the manager has no pools, or pools that are not shared memory.
        ipc.SharedMemoryFull
    """

    def __init__(self, manager: CacheManager) -> None:
        if not manager.config.ranks or manager.config.layout.on_gpu:
            raise ConfigError("receiving needs pools in shared memory: ranks of 1 or more, backend numpy or paddle")
        self._manager = manager
        self._peers: dict[str, PeerLog] = {}
        self._rooms: dict[int, _Room] = {}
        """Open rooms, by ticket."""
        self._quarantined: dict[int, _Room] = {}
        """Rooms whose ticket is revoked and which may still be written, by ticket."""
        self._next_look = 0.0
        self._told: list[Received] = []
        self._closed = False
        manager.attach(self)
        try:
            end_receiving(manager.name)
            self._tickets = Tickets(manager.name, create=True)
        except BaseException:
            manager.detach(self)
            raise

    def reserve(self, request_id: str, blocks: int, *, peer: str, timeout: float | None = None) -> Address:
        """Reserve so many blocks behind those that a request has, for a prefill instance to write.

        Waits for copies that still read these blocks, if there are any. Until :meth:`poll` reports the request, give
        it no other blocks.

        Args:
            peer: ledger of the prefill instance; its sender runs already.
            timeout: seconds until they have to have arrived; default: twice the deadline of a transfer.

        Raises:
            HandoffError: the prefill instance is not there, the request receives already, or too many do.
            OutOfBlocks: nothing is reserved.
            TimeoutError: copies that read these blocks do not end; nothing is reserved.
            InvalidCommand, UnknownRequest, Paused
        """
        manager = self._manager
        if self._closed:
            raise HandoffError("the receiver is closed")
        if type(blocks) is not int or blocks < 1:
            raise InvalidCommand(f"blocks must be a whole number from 1, not {blocks!r:.80}")
        seconds = 2 * manager.config.transfer_timeout_s if timeout is None else timeout
        if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
            raise InvalidCommand(f"timeout is a number of seconds, not {timeout!r:.80}")
        manager.expect_published("reserve()")  # the address lets others write at once
        request = request_named(manager.state, request_id)
        if self.uses(request_id):
            raise HandoffError(f"request {request_id!r} receives blocks already")
        follower = self._follow(peer)
        issued = self._tickets.issue()
        if issued is None:
            raise HandoffError("too many requests are being received: poll(), and try again")
        slot, ticket = issued
        own = f"(receiving {ticket:016x})"
        room = _Room(request_id, own, slot, ticket, len(request.table), follower, time.monotonic() + seconds)
        try:
            admission = manager.admit(own, (), blocks=blocks)
            if not admission.ready:
                try:
                    manager.wait(own)
                except TimeoutError:
                    manager.release(own)
                    raise
        except BaseException:
            self._tickets.free(slot)  # nobody has been told of it
            raise
        self._rooms[ticket] = room
        state = manager.state
        return Address(
            manager.name,
            state.pools,
            manager.config.layout.text(),
            self._tickets.id,
            slot,
            ticket,
            peer,
            manager.config.block_size,
            room.first,
            tuple(admission.block_table.tolist()),
        )

    def _follow(self, peer: str) -> PeerLog:
        follower = self._peers.get(peer)
        if follower is not None:
            follower.look()
            if not follower.lost:
                return follower
            self.fold()  # what it has still said
            follower.close()
            del self._peers[peer]
        self._peers[peer] = PeerLog(peer)
        return self._peers[peer]

    def poll(self) -> list[Received]:
        """The requests whose blocks have arrived, or will not. Never blocks; call it once per scheduler step."""
        self.fold()
        told, self._told = self._told, []
        return told

    def fold(self) -> None:
        """Take in what the prefill instances have logged. Not public."""
        if self._closed:
            return
        for peer in self._peers.values():
            if not peer.lost and any(room.peer is peer for room in self._rooms.values()):
                peer.look()
            for finished in peer.finished:
                room = self._rooms.get(finished.ticket)
                if room is None or room.peer is not peer:
                    continue
                if finished.outcome == Outcome.DONE:
                    self._arrived(room)
                else:
                    self._fail(room, Outcome(finished.outcome), finished.reason)
            peer.finished.clear()
        now = time.monotonic()
        for room in list(self._rooms.values()):
            if room.peer.lost:
                self._fail(room, Outcome.FAILED, room.peer.lost)
            elif now > room.deadline:
                self._fail(room, Outcome.TIMED_OUT, "it has not arrived in time")
        if self._quarantined and now >= self._next_look:
            self._next_look = now + _LOOK_AT_CLAIMS_S
            self._free_quarantined()

    def _arrived(self, room: _Room) -> None:
        # Every pusher has answered, and the prefill instance has counted that: none of them writes again.
        manager = self._manager
        request = request_named(manager.state, room.request_id)
        if len(request.table) != room.first:
            self._fail(room, Outcome.FAILED, "its block table was changed while it received")
            return
        manager.reassign(room.own, room.request_id, manager.block_table(room.own).tolist())
        del self._rooms[room.ticket]
        self._tickets.revoke(room.slot)
        self._tickets.free(room.slot)
        self._told.append(Received(room.request_id, Outcome.DONE, "", table_of(request)))
        manager.release(room.own)

    def _fail(self, room: _Room, outcome: Outcome, reason: str) -> None:
        self._quarantine(room)
        self._told.append(Received(room.request_id, outcome, reason, self._manager.block_table(room.request_id)))
        _log.warning(
            "receive_%s ledger=%s request=%s", outcome.name.lower(), self._manager.name, logged(room.request_id)
        )

    def _quarantine(self, room: _Room) -> None:
        del self._rooms[room.ticket]
        self._tickets.revoke(room.slot)
        self._quarantined[room.ticket] = room
        self._next_look = 0.0

    def _free_quarantined(self) -> None:
        writing = claimed(self._quarantined)
        for ticket, room in list(self._quarantined.items()):
            if ticket not in writing:
                self._manager.release(room.own, ReleaseReason.FAILED)
                del self._quarantined[ticket]
                self._tickets.free(room.slot)

    @property
    def quarantined_blocks(self) -> int:
        """Blocks of requests that have failed which some pusher may still be writing."""
        return sum(len(self._manager.block_table(room.own)) for room in self._quarantined.values())

    # For the manager

    def busy(self) -> bool:
        """Whether somebody may write blocks of the device pool."""
        return bool(self._rooms or self._quarantined)

    def uses(self, request_id: str) -> bool:
        """Whether a request is receiving. Not public."""
        return any(room.request_id == request_id for room in self._rooms.values())

    def released(self, request_id: str) -> None:
        """Quarantine the blocks of a request that is released before they have arrived. Not public."""
        for room in list(self._rooms.values()):
            if room.request_id == request_id:
                self._quarantine(room)

    def disown(self) -> None:
        """See :mod:`kvledger.manager.forks`. Not public."""
        self._closed = True

    def close(self, *, keep: bool = False) -> None:
        """Take all tickets back. With ``keep`` the next engine of this ledger has to know what may still be written."""
        if self._closed:
            return
        self._closed = True
        self._manager.detach(self)
        for room in self._rooms.values():
            self._tickets.revoke(room.slot)
        for peer in self._peers.values():
            peer.close()
        self._tickets.close(remove=not keep)
