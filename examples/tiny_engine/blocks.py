"""Who says which blocks a request has: the one place where the engine meets its block manager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kvledger import CacheManager, OutOfBlocks, ReleaseReason


@dataclass(eq=False)
class Request:
    """A request in the engine. ``computed``: its leading tokens whose keys and values are in the pool."""

    name: str
    tokens: list[int]
    """The prompt, then what was generated."""
    length: int
    """Tokens when it is done."""
    prompt_length: int = 0
    computed: int = 0
    table: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Block ids in token order, ``int32[blocks]``."""
    known: int = 0
    """Leading tokens whose content the block manager has been told."""
    scores: list[float] = field(default_factory=list)
    """The logit of each generated token."""


class BlockManager(Protocol):
    """What the engine asks of a block manager."""

    block_size: int
    device_blocks: int

    def admit(self, request: Request) -> bool:
        """Give a request its prompt's blocks, cached ones first; sets ``table`` and ``computed``. False: no room."""

    def grow(self, requests: Sequence[Request]) -> bool:
        """Give each request blocks for all its tokens; sets ``table``. False: no room, and nobody got any."""

    def ready(self, request: Request) -> bool:
        """Whether the request's blocks may be read and written now."""

    def publish(self, request: Request) -> None:
        """The first ``computed`` tokens are in the pool: whole blocks of them may be used by others."""

    def release(self, request: Request, *, preempted: bool = False) -> None:
        """The request has ended, or gives its blocks up for now."""

    def poll(self) -> list[tuple[str, int, np.ndarray]]:
        """``(name, computed, table)`` of requests of whose cached tokens some could not be brought."""

    def moving(self) -> bool:
        """Whether blocks are being copied: there may be room when that ends."""


class LedgerBlocks:
    """:class:`BlockManager` over kvledger's ``CacheManager``. ``caching=False``: nothing is published or matched."""

    def __init__(self, manager: CacheManager, *, caching: bool = True) -> None:
        self._manager = manager
        self._caching = caching
        self.block_size = manager.config.block_size
        self.device_blocks = manager.config.device_blocks
        self.hit_blocks = 0

    def admit(self, request: Request) -> bool:
        """Match and allocate in one transaction."""
        prompt = np.array(request.tokens, np.int32)
        try:
            admission = self._manager.admit(request.name, prompt, max_blocks=None if self._caching else 0)
        except OutOfBlocks:
            return False
        hits = admission.device_blocks + admission.host_blocks
        self.hit_blocks += hits
        request.table = admission.block_table
        request.computed = hits * self.block_size  # host blocks too: ready() says when they are there
        request.known = len(prompt)
        return True

    def grow(self, requests: Sequence[Request]) -> bool:
        """One call for the whole step."""
        counts = {r.name: -(-len(r.tokens) // self.block_size) - len(r.table) for r in requests}
        try:
            self._manager.allocate(counts)
        except OutOfBlocks:
            return False
        for request in requests:
            request.table = self._manager.block_table(request.name)
        return True

    def ready(self, request: Request) -> bool:
        """Not before the copies into its blocks, and out of them, have ended."""
        return self._manager.ready(request.name)

    def publish(self, request: Request) -> None:
        """Tokens that were generated are told as they are computed, so that what is told is always computed."""
        if not self._caching:
            return
        if request.computed <= request.known:
            self._manager.cache(request.name, request.computed // self.block_size)
        else:
            told = request.tokens[request.known : request.computed]
            self._manager.cache(request.name, request.computed // self.block_size, generated=told)
            request.known = request.computed

    def release(self, request: Request, *, preempted: bool = False) -> None:
        """What was published stays in the cache."""
        self._manager.release(request.name, ReleaseReason.PREEMPTED if preempted else ReleaseReason.FINISHED)

    def poll(self) -> list[tuple[str, int, np.ndarray]]:
        """Also lets the manager hear its workers: once per step."""
        progress = [entry for entry in self._manager.poll() if entry.shortened]
        return [(entry.request_id, entry.cached_blocks * self.block_size, entry.block_table) for entry in progress]

    def moving(self) -> bool:
        """From the manager's state."""
        return bool(self._manager.state.transfers)
