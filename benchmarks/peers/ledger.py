"""kvledger itself, log on, everything as shipped."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.peers import Tokens
from kvledger import CacheConfig, CacheManager


class _Request:
    __slots__ = ("key", "output", "prompt")

    def __init__(self, key: str, prompt: Any, output: Any) -> None:
        self.key, self.prompt, self.output = key, prompt, output


class Ledger:
    """A :class:`CacheManager` without workers; prompts are int32 arrays, or lists."""

    def __init__(self, block_size: int, blocks: int, as_list: bool) -> None:
        self.manager = CacheManager.create(
            f"contest-{os.getpid()}", CacheConfig(block_size=block_size, device_blocks=blocks)
        )
        self._as_list = as_list

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> _Request:
        if self._as_list:
            return _Request(key, prompt.tolist(), output.tolist())
        return _Request(key, np.array(prompt), np.array(output))

    def admit(self, handle: _Request) -> int:
        return self.manager.admit(handle.key, handle.prompt).device_blocks

    def cache(self, handle: _Request) -> None:
        self.manager.cache(handle.key)

    def grow(self, handles: list[_Request]) -> None:
        self.manager.allocate({handle.key: 1 for handle in handles})

    def finish(self, handle: _Request) -> None:
        self.manager.cache(handle.key, generated=handle.output)
        self.manager.release(handle.key)

    def close(self) -> None:
        self.manager.close()


def make(block_size: int, blocks: int, setting: str) -> Ledger:
    """``setting`` is the type of the prompts: ``int32`` or ``list``."""
    return Ledger(block_size, blocks, setting == "list")
