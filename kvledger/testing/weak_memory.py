"""Shared memory whose stores become visible late, and out of order if asked to: what processors do, but from a seed.

Every simulated process has a copy of its own of every object it maps, and the project's real code runs on that copy.
Stores are found by comparing the copy with what it held before, wait in the process's store buffer, and reach the
others when the schedule says so:

* ``TSO`` (x86-64): in the order of the program; whoever looks sees them at once.
* ``WEAK`` (aarch64): in any order (stores to one word keep theirs), and a process may go on reading old words until it
  passes a fence.

A fence empties the process's own buffer and makes it read everything anew; so does the end of the process.
The model is the one of LOG.md's experiments; *A Tutorial Introduction to the ARM and POWER Relaxed Memory Models*
(Maranget, Sarkar, Sewell) explains the machine behind it.
"""

from __future__ import annotations

import random
from enum import Enum

import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]
_STALE_AT_MOST = 64
"""So many late words of one copy are kept late; the oldest ones after that arrive."""


class Order(Enum):
    """When stores become visible."""

    TSO = "tso"
    WEAK = "weak"


class Mapped(bytearray):
    """What stands in for ``mmap.mmap``: one process's copy of an object."""

    maps = 0
    """How often it is mapped. A copy lives as long as its process, but where nobody can store nobody has to look."""
    unmapped: list[Mapped]
    """Where it goes when it is mapped no more."""

    def close(self) -> None:
        """``munmap``."""
        self.maps -= 1
        if not self.maps:
            self.unmapped.append(self)


class SharedObject:
    """An object in the simulated ``/dev/shm``."""

    def __init__(self, name: str, size: int, owner: int, mode: int) -> None:
        self.name = name
        self.owner = owner
        self.mode = mode
        self.words: _Words = np.zeros(0, np.uint64)
        """What is visible to everybody."""
        self.copies: list[Copy] = []
        self.resize(size)

    def resize(self, size: int) -> None:
        """Reserve the space; it is zero."""
        self.size = size
        self.words = np.zeros(-(-size // 8), np.uint64)

    def write(self, data: bytes, offset: int) -> None:
        """What the kernel writes, into an object that nobody has mapped: visible at once."""
        self.words.view(np.uint8)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


class Copy:
    """What one process sees of an object."""

    def __init__(self, shared: SharedObject, length: int) -> None:
        self.shared = shared
        self.writable = False
        self.map = Mapped(shared.words.tobytes()[:length])
        self.before = bytearray(self.map)
        self.words: _Words = np.frombuffer(self.map, np.uint64)
        self.words_before: _Words = np.frombuffer(self.before, np.uint64)
        self.stale: dict[int, None] = {}
        """Words whose newest value has not arrived here."""
        self.pending: dict[int, int] = {}
        """Own stores that are still in the buffer, by word."""
        shared.copies.append(self)

    def arrive(self, word: int) -> None:
        """The newest visible value of a word, unless a store of this process to it is on its way."""
        self.stale.pop(word, None)
        if word not in self.pending:
            self.words[word] = self.words_before[word] = self.shared.words[word]


class Buffer:
    """The stores of one process that are not visible yet, and its copies."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stores: list[tuple[Copy, int, np.uint64]] = []
        self._copies: dict[SharedObject, Copy] = {}
        self._writable: list[tuple[Mapped, bytearray, Copy]] = []
        self._unmapped: list[Mapped] = []

    def map(self, shared: SharedObject, length: int, *, write: bool) -> Mapped:
        """The process's copy of an object, the same one each time: everybody maps as much of it."""
        copy = self._copies.get(shared)
        if copy is None:
            copy = self._copies[shared] = Copy(shared, length)
            copy.map.unmapped = self._unmapped
        if write and not copy.writable:
            copy.writable = True
            self._writable.append((copy.map, copy.before, copy))
        copy.map.maps += 1
        return copy.map

    def collect(self) -> None:
        """Notice what the process has stored since the last time."""
        for map, before, copy in self._writable:
            if map != before:
                for word in np.flatnonzero(copy.words != copy.words_before).tolist():
                    value = copy.words[word]
                    copy.words_before[word] = value
                    copy.stale.pop(word, None)
                    copy.pending[word] = copy.pending.get(word, 0) + 1
                    self._stores.append((copy, word, value))
        if self._unmapped:
            self._unmapped.clear()
            for map, _, copy in self._writable:
                copy.writable = map.maps > 0
            self._writable = [entry for entry in self._writable if entry[2].writable]

    def drain(self, rng: random.Random) -> None:
        """One store becomes visible."""
        if not self._stores:
            return
        chosen = 0
        if self._order is Order.WEAK and len(self._stores) > 1:
            chosen = int(rng.random() * len(self._stores))
            copy, word, _ = self._stores[chosen]
            chosen = next(i for i, store in enumerate(self._stores) if store[0] is copy and store[1] == word)
        self._publish(*self._stores.pop(chosen))

    def _publish(self, copy: Copy, word: int, value: np.uint64) -> None:
        shared = copy.shared
        shared.words[word] = value
        left = copy.pending[word] - 1
        if left:
            copy.pending[word] = left
        else:
            del copy.pending[word]
        for other in shared.copies:
            if other is copy:
                continue
            if self._order is Order.TSO:
                other.arrive(word)
            else:
                other.stale[word] = None
                if len(other.stale) > _STALE_AT_MOST:
                    other.arrive(next(iter(other.stale)))

    def refresh(self, rng: random.Random) -> None:
        """One word that is late arrives here."""
        late = [copy for copy in self._copies.values() if copy.stale]
        if late:
            copy = late[int(rng.random() * len(late))]
            copy.arrive(list(copy.stale)[int(rng.random() * len(copy.stale))])

    def fence(self) -> None:
        """All own stores are visible, and nothing old is read after this."""
        self.collect()
        while self._stores:
            self._publish(*self._stores.pop(0))
        for copy in self._copies.values():
            if copy.stale:
                for word in list(copy.stale):
                    copy.arrive(word)

    def leave(self) -> None:
        """The process is gone: what it stored stays, nobody sees its copies any more."""
        self.fence()
        for shared, copy in self._copies.items():
            shared.copies.remove(copy)
        self._copies.clear()
        self._writable.clear()
