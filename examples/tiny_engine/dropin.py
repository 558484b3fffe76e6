"""The same engine on FastDeploy's block manager API: ``kvledger.adapters.fastdeploy.PrefixCacheManager``.

Calls and their order are those of FastDeploy's scheduler: a guard, match (which waits for the swap-in), allocate,
cache, release, recycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from examples.tiny_engine.blocks import Request
from kvledger import OutOfBlocks
from kvledger.adapters.fastdeploy import PrefixCacheManager


class DropInBlocks:
    """:class:`examples.tiny_engine.blocks.BlockManager` over the drop-in."""

    def __init__(self, manager: PrefixCacheManager, *, caching: bool = True) -> None:
        self._manager = manager
        self._caching = caching
        self.block_size: int = manager.cache_config.block_size
        self.device_blocks: int = manager.num_gpu_blocks
        self.hit_blocks = 0
        self._tasks: dict[str, Any] = {}
        """By request: what FastDeploy's scheduler would hold."""

    def admit(self, request: Request) -> bool:
        """Match all tokens but the last, which is always computed; then allocate the rest."""
        size, manager = self.block_size, self._manager
        needed = manager.get_required_block_num(len(request.tokens), size)
        if not manager.can_allocate_gpu_blocks(needed):
            return False
        task = SimpleNamespace(
            request_id=request.name, prompt_token_ids=request.tokens[:-1], block_tables=[], cached_block_num=0
        )
        matched = 0
        if self._caching:
            try:
                task.block_tables, matched, _ = manager.request_match_blocks(task, size)
            except OutOfBlocks:
                return False
        self._tasks[request.name] = task
        if not self._allocate(task, needed - len(task.block_tables)):
            self.release(request)
            return False
        self.hit_blocks += matched // size
        request.computed = matched
        request.table = np.array(task.block_tables, np.int32)
        return True

    def _allocate(self, task: Any, blocks: int) -> bool:
        if not self._manager.can_allocate_gpu_blocks(blocks):
            return False
        task.block_tables += self._manager.allocate_gpu_blocks(blocks)
        return True

    def grow(self, requests: Sequence[Request]) -> bool:
        """One block for each, or for none."""
        size = self.block_size
        counts = [self._manager.get_required_block_num(len(r.tokens), size) - len(r.table) for r in requests]
        if not self._manager.can_allocate_gpu_blocks(sum(counts)):
            return False
        for request, count in zip(requests, counts, strict=True):
            self._allocate(self._tasks[request.name], count)
            request.table = np.array(self._tasks[request.name].block_tables, np.int32)
        return True

    def ready(self, request: Request) -> bool:
        """Always: matching and allocating have waited."""
        return True

    def publish(self, request: Request) -> None:
        """After the step; FastDeploy calls it before."""
        if self._caching:
            task = self._tasks[request.name]
            if request.computed > len(task.prompt_token_ids):
                task.prompt_token_ids = request.tokens[: request.computed]
            self._manager.update_cache_blocks(task, self.block_size, request.computed)

    def release(self, request: Request, *, preempted: bool = False) -> None:
        """What is cached belongs to the tree; the rest is given back by its ids."""
        task = self._tasks.pop(request.name)
        if self._caching:
            self._manager.release_block_ids(task)
        self._manager.recycle_gpu_blocks(task.block_tables[task.cached_block_num :])

    def poll(self) -> list[tuple[str, int, np.ndarray]]:
        """Nobody waits, so nobody is told anything."""
        self._manager.poll()
        return []

    def moving(self) -> bool:
        """From the ledger behind it."""
        return bool(self._manager.manager.state.transfers)
