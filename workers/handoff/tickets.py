"""Tickets: the right to write into blocks of another instance's device pool, and taking it back for certain.

A decode instance gives a ticket for the blocks it has reserved. A pusher *claims* the ticket in its own signals,
then looks whether the ticket still stands on the decode instance's board, and only then writes; after each layer it
gives the claim up. The decode instance revokes a ticket on its board, and then looks at the claims of all pushers.
Each side stores, fences, and only then reads what the other has stored, so at least one of them sees the other:
either the pusher finds the ticket revoked and writes nothing, or the decode instance sees the claim and waits.
Once no living process claims a revoked ticket, nobody will ever write those blocks.
"""

from __future__ import annotations

import os
from collections.abc import Collection

from ipc import LedgerError, memory
from ipc.fence import make_fence
from ipc.ownership import identity_of, remove_object, stamped
from ipc.signals import Signals
from workers.processes.presence import may_live, owner_of

SLOTS = 2047
"""Tickets that may be out at once."""
CLAIM = 24
"""Word of a pusher's signals: the ticket with which it is writing; 0: none."""
_WORDS = SLOTS + 1
_PUSHER = r".+\.pushes\.rank\d+\.\d+\.signals"


class Tickets:
    """The board of one decode instance: a word per ticket, written by its engine alone.

    An odd word is a ticket that stands, the even number below it the same ticket revoked, 0 a free slot. The first
    word names the board itself: a new engine has a new one.

    Args:
        ledger: of the decode instance.
        create: make a new board.
        inherit: write on the board that a dead engine has left, to revoke what it has issued.

    Raises:
        ipc.LedgerNotFound: there is no board to attach to.
        ipc.SharedMemoryFull
    """

    def __init__(self, ledger: str, *, create: bool = False, inherit: bool = False) -> None:
        self.name = board_name(ledger)
        self._identity = identity_of(ledger)
        if create:
            content = _random().to_bytes(8, "little")
            self._map = memory.create(self.name, 8 * _WORDS, content, identity=self._identity)
        else:
            self._map = memory.attach(self.name, write=inherit, identity=self._identity)
        if len(self._map) != 8 * _WORDS:
            self._map.close()
            raise LedgerError(f"{self.name} is no board of this version")
        self._words = memoryview(self._map).cast("Q")
        self._release, self._acquire = make_fence()
        self._free = list(range(SLOTS, 0, -1))

    @property
    def id(self) -> int:
        """Random number of this board."""
        return self._words[0]

    def issue(self) -> tuple[int, int] | None:
        """A new ticket, as ``(slot, ticket)``; ``None``: too many are out."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._words[slot] = _random()
        return slot, self._words[slot]

    def revoke(self, slot: int) -> None:
        """Take a ticket back: nobody begins to write with it any more; who writes already is seen by its claim."""
        self._words[slot] &= ~1
        self._fence()

    def free(self, slot: int) -> None:
        """Free the slot of a ticket that is revoked and that nobody claims."""
        self._words[slot] = 0
        self._free.append(slot)

    def stands(self, slot: int, ticket: int) -> bool:
        """Whether a ticket may be used. A pusher asks after it has claimed the ticket, never before."""
        self._fence()
        return 0 < slot < _WORDS and ticket & 1 == 1 and self._words[slot] == ticket

    def revoke_all(self) -> set[int]:
        """Revoke everything, as the successor of the engine that issued it; the tickets, also those revoked before."""
        for slot in range(1, _WORDS):
            self._words[slot] &= ~1
        self._fence()
        return {word | 1 for word in self._words[1:] if word}

    def _fence(self) -> None:
        self._release()
        self._acquire()

    def close(self, *, remove: bool = False) -> None:
        """Unmap, and remove if asked to."""
        self._words.release()
        self._map.close()
        if remove:
            remove_object(self.name, self._identity)


def board_name(ledger: str) -> str:
    """Name of a decode instance's board."""
    return f"/{ledger}.tickets"


def claimed(tickets: Collection[int]) -> dict[int, int]:
    """Find the pushers of this machine that still write with one of these revoked tickets: ticket → process id."""
    found: dict[int, int] = {}
    for own in stamped(_PUSHER) if tickets else ():
        try:
            signals = Signals(f"/{own.name}", read_only=True, identity=own.identity)
        except LedgerError:  # gone with its process, or another user's, who cannot open our pools
            continue
        try:
            if (claim := signals.words[CLAIM]) in tickets and may_live(signals):
                found[claim] = owner_of(signals).pid
        finally:
            signals.close()
    return found


def _random() -> int:
    return int.from_bytes(os.urandom(8), "little") >> 1 | 1
