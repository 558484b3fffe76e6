"""The same engine on FastDeploy's block manager: ``kvledger.adapters.fastdeploy.PrefixCacheManager``.

Calls and their order are those of FastDeploy's scheduler: a guard, match (which waits for the swap-in), allocate,
cache, release, recycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvledger import Admission, BlockTable, Growth, OutOfBlocks, ReleaseReason
from kvledger.adapters.fastdeploy import PrefixCacheManager


class DropIn:
    """Those of the calls in tokens that the engine makes, made of FastDeploy's."""

    def __init__(self, manager: PrefixCacheManager) -> None:
        self._manager = manager
        self.config = manager.manager.config
        self._tasks: dict[str, Any] = {}
        """By request: what FastDeploy's scheduler would hold."""

    def step(self, number: int) -> AbstractContextManager[None]:
        """Nothing: FastDeploy's calls wait for copies, so each is a transaction of its own."""
        return nullcontext()

    def poll(self) -> None:
        """Hear the workers."""
        self._manager.poll()

    def admit(self, request_id: str, tokens: list[int], *, max_blocks: int | None = None) -> Admission:
        """Match all tokens but the last, which is always computed; then allocate the rest."""
        size = self.config.block_size
        caching = max_blocks is None
        task = SimpleNamespace(
            request_id=request_id, prompt_token_ids=tokens[:-1], block_tables=[], cached_block_num=0, caching=caching
        )
        task.computed = 0
        if caching:
            task.block_tables, task.computed, _ = self._manager.request_match_blocks(task, size)
        task.tokens = list(tokens)
        self._tasks[request_id] = task
        try:
            self._allocate(task, len(tokens))
        except OutOfBlocks:
            self.release(request_id)
            raise
        return Admission(self.block_table(request_id), task.computed // size, 0, True, task.computed)

    def _allocate(self, task: Any, tokens: int) -> None:
        missing = self._manager.get_required_block_num(tokens, self.config.block_size) - len(task.block_tables)
        if missing > 0:
            task.block_tables += self._manager.allocate_gpu_blocks(missing)

    def grow(self, tokens: Mapping[str, int]) -> Growth:
        """Whoever gets blocks can use them: allocating has waited."""
        for place, (request_id, count) in enumerate(tokens.items()):
            try:
                self._allocate(self._tasks[request_id], count)
            except OutOfBlocks as refusal:
                return Growth({}, [], list(tokens)[place:], refusal, [], {})
        return Growth({}, [], [], None, [], {})

    def computed(self, request_id: str) -> int:
        """As FastDeploy's scheduler counts them."""
        return int(self._tasks[request_id].computed)

    def block_table(self, request_id: str) -> BlockTable:
        """As an array."""
        return np.array(self._tasks[request_id].block_tables, np.int32)

    def append(self, request_id: str, token: int) -> None:
        """Remember it for the time when it is computed."""
        self._tasks[request_id].tokens.append(token)

    def commit(self, computed: Mapping[str, int]) -> None:
        """Cache blocks after the step; FastDeploy does it before."""
        for request_id, count in computed.items():
            task = self._tasks[request_id]
            task.computed = count
            if count > len(task.prompt_token_ids):
                task.prompt_token_ids = task.tokens[:count]
            if task.caching:
                self._manager.update_cache_blocks(task, self.config.block_size, count)

    def release(self, request_id: str, reason: ReleaseReason = ReleaseReason.FINISHED) -> None:
        """Leave to the tree what is cached, and give the rest back by its ids."""
        task = self._tasks.pop(request_id)
        if task.caching:
            self._manager.release_block_ids(task)
        self._manager.recycle_gpu_blocks(task.block_tables[task.cached_block_num :])
