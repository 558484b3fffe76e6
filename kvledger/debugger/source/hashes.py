"""Block hashes, the names that blocks have outside: which content one stands for, and where it is and was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvledger.debugger.source.source import Entry, Source, SourceError
from kvledger.recordings.origins import LEAST_DIGITS, hash_number
from statemachine.apply import apply, genesis
from statemachine.decide.derive import path_words
from statemachine.errors import Contradiction
from statemachine.events import BlocksCached, Event, RequestMatched, Tier
from statemachine.hashing import HASH_BYTES, block_hashes
from statemachine.items import NO_ITEMS, BlockItems, within
from statemachine.mentions import mentions
from statemachine.records.replay import MISFITS, misfit_text
from statemachine.state import tree
from statemachine.state.nodes import Node, Request
from statemachine.state.state import State


class Content(NamedTuple):
    """What a block hash stands for: a block's own content and all that is before it."""

    hash: bytes
    namespace: bytes
    words: bytes
    """From the root of the namespace down to the block."""
    block_bytes: int
    items: BlockItems = NO_ITEMS
    """The images and sounds that begin there."""

    @property
    def position(self) -> int:
        """Place of the block in its path, from 0."""
        return len(self.words) // self.block_bytes - 1

    @property
    def own_words(self) -> bytes:
        """The words of the block itself."""
        return self.words[-self.block_bytes :]

    def found(self, state: State) -> tuple[Node, int] | None:
        """The run that holds it in a state, and the place in that run."""
        path = tree.find(state, state.roots.get(self.namespace), memoryview(self.words), self.position + 1, self.items)
        if path.leaf is None or path.device + path.host != self.position + 1:
            return None
        return path.leaf, self.position - path.leaf.start

    def blocks(self, state: State) -> dict[Tier, int]:
        """The block ids that hold it, by tier; empty where nothing does."""
        found = self.found(state)
        if found is None:
            return {}
        node, offset = found
        return {tier: copy.ids[offset] for tier, copy in zip(Tier, node.copies) if copy is not None}

    def present(self, state: State) -> bool:
        """Whether it is cached, or a live request is yet to cache it (where it can be found: not in a cleared tree)."""
        root = state.roots.get(self.namespace)
        return self._in_tree(state) or any(
            request.leaf.end <= self.position and tree.root_of(request.leaf) is root and self._stands_in(request)
            for request in state.requests.values()
        )

    def _in_tree(self, state: State) -> bool:
        """Whether a run holds it, also one whose only copy is still arriving, which nothing can match yet."""
        node = state.roots.get(self.namespace)
        offset = 0
        while node is not None and offset < len(self.words):
            found = tree.step(node, memoryview(self.words), offset, self.items, self.block_bytes)
            if found is None:
                return False
            node, common = found
            offset += common * self.block_bytes
            if common < node.size:
                break
        return offset >= len(self.words)

    def _stands_in(self, request: Request) -> bool:
        words = path_words(request.leaf, 0, self.block_bytes) + request.words
        return words.startswith(self.words) and within(request.items, 0, self.position + 1) == self.items

    def wanted(self, state: State, event: RequestMatched) -> bool:
        """Whether a request, just matched, has this content in its prompt."""
        return event.namespace == self.namespace and self._stands_in(state.requests[event.request])

    def concerned(self, source: Source, start: int, stop: int) -> Iterator[Entry]:
        """The events of a stretch that touch a block which holds this content before or after, or that ask for it."""
        state = source.before(start)
        for entry in source.entries(start, stop):
            event = entry.event
            before = self.blocks(state) if state is not None else {}
            try:
                if state is None:
                    state = genesis(event)
                else:
                    apply(state, event)
            except MISFITS as error:
                raise Contradiction(entry.sequence, f"event {entry.sequence}: {misfit_text(error)}") from error
            after = self.blocks(state)
            found = mentions(event)
            named = any(
                blocks.get(tier) in ids
                for blocks in (before, after)
                for tier, ids in ((Tier.DEVICE, found.device), (Tier.HOST, found.host))
            )
            if named or before != after or (isinstance(event, RequestMatched) and self.wanted(state, event)):
                yield entry


class Found(NamedTuple):
    """What a hash stands for."""

    content: Content
    brought: int | None = None
    """Of what is cached no more, or not yet: the last event that brought it. What the first state of a log that begins
    in the middle holds counts as brought by the event before."""


def hash_of(state: State, node: Node, offset: int) -> bytes:
    """The block hash of a cached block: SHA-256, chained, 128 bits."""
    words = path_words(node, offset + 1, state.block_bytes)
    items = tree.items_of(state.path(node))
    return block_hashes(words, state.opened.block_size, tree.root_of(node).words, items=items)[-1]


def find_hash(
    source: Source, text: str, at: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Found:
    """What a hash stands for: among what is cached after event ``at``, else in what requests brought before it.

    Args:
        text: the hash in hexadecimal, or its first digits, 8 at least.
        progress: called with (events searched, events in all) where the past has to be searched.

    Raises:
        SourceError: it is no hash, or nothing up to ``at`` has it.
    """
    digits = text.lower().removeprefix("0x")
    if not LEAST_DIGITS <= len(digits) <= 2 * HASH_BYTES or any(digit not in "0123456789abcdef" for digit in digits):
        raise SourceError(f"{text!r} is no block hash: {LEAST_DIGITS} to {2 * HASH_BYTES} hexadecimal digits")
    state = source.at(at)
    content = _cached(state, digits)
    if content is not None and content.blocks(state):  # else it may be in a cleared tree that somebody still holds
        return Found(content)
    found = _brought_last(source, digits, at, progress)
    if found is None:
        raise SourceError(f"no block up to event {at} of {source.name} has a hash that begins with {digits}")
    return found


def _brought_last(source: Source, digits: str, at: int, progress: Callable[[int, int], None]) -> Found | None:
    """Searches backwards through the stretches that may bring it, see :mod:`kvledger.recordings.origins`."""
    for start, stop in reversed(source.spans("hash", hash_number(digits))):
        if start > at:
            continue
        found: Found | None = None
        before = source.before(start) if start == source.first_state else None
        if before is not None:
            content = _cached(before, digits) or _in_requests(before, digits)
            found = Found(content, start - 1) if content is not None else None
        for entry, state in source.replay(start, min(stop, at)):
            content = _origins(state, entry.event, digits)
            if content is not None:
                found = Found(content, entry.sequence)
        if found is not None:
            return found
        progress(at - start + 1, at)
    return None


def _cached(state: State, digits: str) -> Content | None:
    size = state.opened.block_size
    stack: list[tuple[Node, bytes, bytes | None]] = [
        (child, root.words, None) for root in state.all_roots() for child in root.children.values()
    ]
    while stack:
        node, namespace, parent = stack.pop()
        hashes = block_hashes(node.words, size, namespace, parent=parent, items=node.items, first=node.start)
        for offset, hash in enumerate(hashes):
            if hash.hex().startswith(digits):
                words = path_words(node, offset + 1, state.block_bytes)
                items = within(tree.items_of(state.path(node)), 0, node.start + offset + 1)
                return Content(hash, namespace, words, state.block_bytes, items)
        stack += [(child, namespace, hashes[-1]) for child in node.children.values()]
    return None


def _in_requests(state: State, digits: str) -> Content | None:
    """Among what live requests have beyond their cached paths."""
    for request in state.requests.values():
        found = _on_path(state, request, digits)
        if found is not None:
            return found
    return None


def _origins(state: State, event: Event, digits: str) -> Content | None:
    """Among what an event, just applied, brings into the log."""
    if isinstance(event, RequestMatched) or (isinstance(event, BlocksCached) and event.words):
        return _on_path(state, state.requests[event.request], digits)
    return None


def _on_path(state: State, request: Request, digits: str) -> Content | None:
    words = path_words(request.leaf, 0, state.block_bytes) + request.words
    hashes = block_hashes(words, state.opened.block_size, request.namespace, items=request.items)
    for position, hash in enumerate(hashes):
        if hash.hex().startswith(digits):
            words = words[: (position + 1) * state.block_bytes]
            return Content(hash, request.namespace, words, state.block_bytes, within(request.items, 0, position + 1))
    return None
