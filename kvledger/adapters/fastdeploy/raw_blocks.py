"""Device blocks that a scheduler allocates without saying for whom.

They belong to pseudo-requests of the drop-in until a request caches them or the scheduler recycles them. No
pseudo-request grows far beyond :data:`MOST` blocks, so that finding one block in it stays cheap.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterable, Sequence

from kvledger.manager.manager import CacheManager

MOST = 64
_log = logging.getLogger(__name__)


class RawBlocks:
    """The blocks that were handed out and are not cached."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._holder: dict[int, str] = {}
        """By block: the pseudo-request that has it."""
        self._sizes: dict[str, int] = {}
        self._current = ""
        self._number = 0
        self.dropped = 0
        """Recycled ids that nobody had been given, or that had been given back before."""

    def __contains__(self, block: int) -> bool:
        return block in self._holder

    def __len__(self) -> int:
        return len(self._holder)

    def has(self, blocks: Iterable[int]) -> bool:
        """Whether all of them are here."""
        return self._holder.keys() >= set(blocks)

    def allocate(self, count: int) -> list[int]:
        """So many blocks, ready to be written. Raises :class:`kvledger.OutOfBlocks`."""
        if not count:
            return []
        manager = self._manager
        if self._sizes.get(self._current, MOST) >= MOST:
            self._number += 1
            self._current = f"(raw blocks {self._number})"
            manager.match(self._current, ())
            self._sizes[self._current] = 0
        key = self._current
        blocks: list[int] = manager.allocate({key: count})[key].tolist()
        if not manager.ready(key):
            manager.wait(key)
        self._sizes[key] += count
        self._holder.update(dict.fromkeys(blocks, key))
        return blocks

    def move(self, request: str, blocks: Sequence[int]) -> None:
        """Append blocks to a request's block table, in this order. All of them have to be here."""
        holder = self._holder
        keys = list(map(holder.__getitem__, blocks))
        if keys.count(keys[0]) == len(keys):
            self._move(keys[0], request, blocks)
        else:
            for key, group in itertools.groupby(blocks, holder.__getitem__):
                self._move(key, request, list(group))

    def _move(self, key: str, request: str, blocks: Sequence[int]) -> None:
        self._manager.reassign(key, request, blocks)
        self._forget(key, blocks)

    def recycle(self, blocks: Iterable[int]) -> None:
        """Free blocks; ids that are not here are dropped, counted and reported."""
        groups: dict[str, dict[int, None]] = {}
        wrong = []
        for block in blocks:
            key = self._holder.get(block, "")
            if not key or block in groups.get(key, ()):
                wrong.append(block)
            else:
                groups.setdefault(key, {})[block] = None
        for key, group in groups.items():
            self._manager.give_back(key, list(group))
            self._forget(key, group)
        self.drop(wrong)

    def drop(self, blocks: Sequence[int]) -> None:
        """Count and report blocks that were recycled, but are not out."""
        if blocks:
            self.dropped += len(blocks)
            _log.warning("blocks %s were recycled, but are not out: dropped", blocks[:8])

    def release_all(self) -> None:
        """Free everything."""
        for key in self._sizes:
            self._manager.release(key)
        self._sizes.clear()
        self._holder.clear()
        self._current = ""

    def _forget(self, key: str, blocks: Collection[int]) -> None:
        for block in blocks:
            del self._holder[block]
        self._sizes[key] -= len(blocks)
        if not self._sizes[key] and key != self._current:
            self._manager.release(key)
            del self._sizes[key]
