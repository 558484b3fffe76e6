"""What has become of every content of a log so far: asked for, published, lost, to whom and when.

A content is a block with everything before it in its prompt. It is remembered by 64 bits of its chained hash, and its
own tokens by 64 bits too: two contents that share these are taken for one.
"""

from __future__ import annotations

import bisect
from collections.abc import Container
from enum import IntEnum
from typing import NamedTuple

import xxhash

from statemachine.hashing import ALGORITHMS, block_hashes
from statemachine.items import NO_ITEMS, BlockItems
from statemachine.state.nodes import Node
from statemachine.state.state import State

_MOST_SIBLINGS = 64
_START = ALGORITHMS["xxh3"](b"")


class Step(IntEnum):
    """The last thing that happened to a content."""

    ASKED = 0
    """A living request has it in its prompt, and has not published it."""
    PUBLISHED = 1
    DROPPED = 2
    """The request that had it ended and had not published it."""
    EVICTED = 3
    LOST = 4
    """Cleared, on a tier that was lost, or its copy failed."""


class Fate(NamedTuple):
    """The last thing that happened to a content."""

    step: Step
    sequence: int
    time_ns: int
    by: int
    """The request that asked for it, published it, dropped it, or for which room was made."""


class Memory:
    """Remembers contents; their keys are given out by :meth:`keys`."""

    def __init__(self) -> None:
        self.fates: dict[tuple[int, bytes], Fate] = {}
        """By key and namespace."""
        self.names: dict[int, str] = {}
        """Of all requests."""
        self._spaces: dict[int, bytes] = {}
        """Key → the namespace in which it was published last."""
        self._ends: dict[int, tuple[int, bytes]] = {}
        """By run: the position where it ends, and the hash of its last block."""
        self._tokens: dict[int, int] = {}
        """A block's own content → the request that brought it last."""
        self._children: dict[int, list[tuple[bytes, int]]] = {}
        """Key of a block → the contents that followed it, sorted, and who brought them."""

    def keys(self, state: State, words: bytes, parent: Node, items: BlockItems = NO_ITEMS) -> list[int]:
        """Keys of the blocks of ``words``, which follow run ``parent``."""
        end = self._end(state, parent)
        hashes = block_hashes(
            words, state.opened.block_size, algorithm="xxh3", parent=end, items=items, first=parent.end
        )
        return [_key(hash) for hash in hashes]

    def end_key(self, state: State, node: Node) -> int:
        """The key of the last block of a run."""
        return _key(self._end(state, node))

    def run_keys(self, state: State, node: Node) -> list[int]:
        """Keys of the blocks of a run."""
        assert node.parent is not None
        return self.keys(state, node.words, node.parent, node.items)

    def _end(self, state: State, node: Node) -> bytes:
        below: list[Node] = []
        while node.parent is not None and self._ends.get(node.id, _UNKNOWN)[0] != node.end:
            below.append(node)
            node = node.parent
        hash = self._ends[node.id][1] if node.parent is not None else _START
        for run in reversed(below):
            hash = block_hashes(
                run.words, state.opened.block_size, algorithm="xxh3", parent=hash, items=run.items, first=run.start
            )[-1]
            self._ends[run.id] = run.end, hash
        return hash

    def forget_runs(self, living: Container[int]) -> None:
        """Only these runs are left."""
        self._ends = {run: end for run, end in self._ends.items() if run in living}

    def note(self, key: int, namespace: bytes, fate: Fate) -> None:
        """Something happened to a content."""
        self.fates[key, namespace] = fate
        if fate.step == Step.PUBLISHED:
            self._spaces[key] = namespace

    def bring(self, parent: int, content: bytes, request: int) -> None:
        """A request has a block with this content behind the block ``parent``."""
        self._tokens[xxhash.xxh3_64_intdigest(content)] = request
        siblings = self._children.setdefault(parent, [])
        place = bisect.bisect_left(siblings, content, key=_content)
        if place < len(siblings) and siblings[place][0] == content:
            siblings[place] = content, request
        elif len(siblings) < _MOST_SIBLINGS:
            siblings.insert(place, (content, request))

    def elsewhere(self, key: int, namespace: bytes) -> bytes | None:
        """Another namespace in which a content was published; ``None``: there is none."""
        space = self._spaces.get(key)
        return None if space == namespace else space

    def seen(self, content: bytes) -> int:
        """The request that last brought the same tokens, behind whatever beginning; 0: nobody did."""
        return self._tokens.get(xxhash.xxh3_64_intdigest(content), 0)

    def departure(self, parent: int, content: bytes) -> tuple[int, int, bytes]:
        """How many tokens a block shares with the nearest one that followed the same block, who brought that, and it.

        Request 0: none followed it.
        """
        siblings = self._children.get(parent, [])
        place = bisect.bisect_left(siblings, content, key=_content)
        near = siblings[max(place - 1, 0) : place + 1]
        return max(((_shared(content, other), request, other) for other, request in near), default=(0, 0, b""))


def _content(sibling: tuple[bytes, int]) -> bytes:
    return sibling[0]


def _key(hash: bytes) -> int:
    return int.from_bytes(hash[:8], "little")


def _shared(one: bytes, other: bytes) -> int:
    """Leading tokens that two blocks have in common."""
    low, high = 0, min(len(one), len(other)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[: 4 * middle] == other[: 4 * middle] else (low, middle - 1)
    return low


_UNKNOWN = (-1, b"")
