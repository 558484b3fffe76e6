"""Which contents requests bring along: block hashes that a search can find again, a few bytes of each.

A block is *brought* when a request has it in its prompt, or generates it, and finds it cached nowhere. Whatever is
cached was brought before, so that a content which is cached no more is found where it was brought last.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from statemachine.events import BlocksCached, Event, RequestMatched, RequestReleased
from statemachine.hashing import ALGORITHMS, block_hashes
from statemachine.items import BlockItems
from statemachine.state.nodes import Node
from statemachine.state.state import State

_BYTES = 4
LEAST_DIGITS = 2 * _BYTES
"""Hexadecimal digits of a hash that are needed to look for it."""


def hash_number(digits: str) -> int:
    """The first :data:`LEAST_DIGITS` digits of a hash, as the number that stands for it. Others may share it."""
    return int(digits[:LEAST_DIGITS], 16)


class Origins:
    """Collects the hashes that the events of a stretch bring.

    Args:
        before: the state that the first event meets, with contents that nobody brings any more: they count as brought
            in the first stretch.
    """

    def __init__(self, before: State | None) -> None:
        self._found = bytearray()
        self._ends: dict[int, tuple[int, bytes]] = {}
        """By run: the position where it ends, and the hash of its last block."""
        self._known: dict[int, tuple[int, list[bytes]]] = {}
        """By living request: the hashes of what it brought, and the position of the first."""
        if before is not None:
            self._everything(before)

    def _everything(self, state: State) -> None:
        for node in state.nodes.values():
            assert node.parent is not None
            self._hashed(state, node.words, node.parent, node.items)
        for request in state.requests.values():
            self._hashed(state, request.words, request.leaf, request.items)

    def add(self, event: Event, state: State) -> None:
        """An event of the present stretch, and the state after it."""
        if isinstance(event, RequestMatched):
            request = state.requests[event.request]
            leaf = request.leaf
            self._known[event.request] = leaf.end, self._hashed(state, event.words, leaf, request.items)
        elif isinstance(event, BlocksCached):
            request = state.requests[event.request]
            leaf = request.leaf
            if event.words:
                if leaf.parent is None:  # known, and nothing of it is cached yet
                    self._hashed(state, request.words, leaf, request.items)
                else:
                    self._hashed(state, leaf.words + request.words, leaf.parent, request.items)
            elif event.request in self._known:
                start, hashes = self._known[event.request]
                if start < leaf.end <= start + len(hashes):
                    self._ends[leaf.id] = leaf.end, hashes[leaf.end - start - 1]
        elif isinstance(event, RequestReleased):
            self._known.pop(event.request, None)

    def _hashed(self, state: State, words: bytes, parent: Node, items: BlockItems) -> list[bytes]:
        if not words:
            return []
        size = state.opened.block_size
        hashes = block_hashes(words, size, parent=self._end(state, parent), items=items, first=parent.end)
        self._found += b"".join([hash[:_BYTES] for hash in hashes])
        return hashes

    def _end(self, state: State, node: Node) -> bytes:
        """The hash of the last block of a run; of a root, what stands for its namespace."""
        below: list[Node] = []
        while node.parent is not None and self._ends.get(node.id, _UNKNOWN)[0] != node.end:
            below.append(node)
            node = node.parent
        hash = self._ends[node.id][1] if node.parent is not None else ALGORITHMS["sha256"](node.words)
        for run in reversed(below):
            size = state.opened.block_size
            hash = block_hashes(run.words, size, parent=hash, items=run.items, first=run.start)[-1]
            self._ends[run.id] = run.end, hash
        return hash

    def end_stretch(self, state: State | None) -> npt.NDArray[np.uint32]:
        """The numbers of what the stretch that ends here brought, ascending."""
        numbers = np.unique(np.frombuffer(bytes(self._found), ">u4")).astype(np.uint32)
        self._found.clear()
        self._ends = {id: end for id, end in self._ends.items() if state is not None and id in state.nodes}
        return numbers


_UNKNOWN = (-1, b"")
