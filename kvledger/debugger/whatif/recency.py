"""A set of places in time order that answers "where is the n-th most recent?" for many n at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]

_BUCKET = 256


class Recency:
    """Places are handed out in ascending order and taken back in any order.

    Counts per bucket of 256 places and one flag per place: adding and removing touch what they name, a query reads the
    counts and one bucket per rank.
    """

    def __init__(self) -> None:
        self._flags = np.zeros((64, _BUCKET), np.uint8)
        self._counts = np.zeros(64, np.int64)
        self.end = 0
        """The next place."""
        self.live = 0
        """Places handed out and not taken back."""

    def push(self, count: int) -> Places:
        """The next ``count`` places, ascending."""
        start, self.end = self.end, self.end + count
        while self.end > self._flags.size:
            self._flags = np.concatenate([self._flags, np.zeros_like(self._flags)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        places = np.arange(start, self.end)
        self._flags.reshape(-1)[start : self.end] = 1
        np.add.at(self._counts, places // _BUCKET, 1)
        self.live += count
        return places

    def remove(self, places: Places) -> None:
        """Take places back."""
        self._flags.reshape(-1)[places] = 0
        np.subtract.at(self._counts, places // _BUCKET, 1)
        self.live -= len(places)

    def newest_without(self, kept: Places) -> Places:
        """For each ``kept[i]``: the most recent place that is not among the ``kept[i]`` most recent; -1: none."""
        rank = self.live - np.asarray(kept, np.int64) - 1  # counted from the oldest
        found = np.full(len(rank), -1, np.int64)
        inside = np.flatnonzero(rank >= 0)
        if len(inside):
            rank = np.minimum(rank[inside], self.live - 1)
            buckets = -(-self.end // _BUCKET)
            upto = np.cumsum(self._counts[:buckets])
            bucket = np.searchsorted(upto, rank, side="right")
            within = rank - upto[bucket] + self._counts[bucket] + 1
            reached = np.cumsum(self._flags[bucket], axis=1, dtype=np.int16)
            found[inside] = bucket * _BUCKET + np.argmax(reached == within[:, None], axis=1)
        return found

    @property
    def sparse(self) -> bool:
        """Whether most places are unused: time to :meth:`renumber`."""
        return self.end > 4 * self.live + 64 * _BUCKET

    def renumber(self) -> Places:
        """Close the gaps. Returns how many places were live before each old place, ``int64[old end + 1]``."""
        flags = self._flags.reshape(-1)[: self.end]
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(flags, dtype=np.int64)])
        live = self.live
        self.__init__()  # type: ignore[misc]
        self.push(live)
        return before
