"""kvledger itself, log on, everything as shipped."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from benchmarks.peers import Tokens
from kvledger import CacheConfig, CacheManager


class _Request:
    __slots__ = ("key", "left", "output", "prompt", "published")

    def __init__(self, key: str, prompt: Any, output: Any, left: int) -> None:
        self.key, self.prompt, self.output = key, prompt, output
        self.left = left
        """Tokens that fit into its last block."""
        self.published = 0
        """Of the output."""


class Ledger:
    """A :class:`CacheManager` without workers; prompts are int32 arrays, or lists."""

    def __init__(self, block_size: int, blocks: int, setting: str) -> None:
        self.manager = CacheManager.create(
            f"contest-{os.getpid()}", CacheConfig(block_size=block_size, device_blocks=blocks)
        )
        self._as_list = setting == "list"
        self._publishes = setting != "int32, at the end"
        self._block_size = block_size

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> _Request:
        left = -len(prompt) % self._block_size
        if self._as_list:
            return _Request(key, prompt.tolist(), output.tolist(), left)
        return _Request(key, np.array(prompt), np.array(output), left)

    def admit(self, handle: _Request) -> int:
        return self.manager.admit(handle.key, handle.prompt).device_blocks

    def cache(self, handle: _Request) -> None:
        self.manager.cache(handle.key)

    def grow(self, handles: list[_Request]) -> None:
        self.manager.allocate({handle.key: 1 for handle in handles})

    def step(self, handles: list[_Request]) -> None:
        full = []
        for handle in handles:
            if not handle.left:
                full.append(handle)
                handle.left = self._block_size
            handle.left -= 1
        if not full:
            return
        self.manager.allocate({handle.key: 1 for handle in full})
        for handle in full if self._publishes else ():  # the block before is written: publish it
            end = handle.published + self._block_size
            self.manager.cache(handle.key, generated=handle.output[handle.published : end])
            handle.published = end

    def finish(self, handle: _Request) -> None:
        if handle.published < len(handle.output):
            self.manager.cache(handle.key, generated=handle.output[handle.published :])
        self.manager.release(handle.key)

    def close(self) -> None:
        self.manager.close()


def make(block_size: int, blocks: int, setting: str, longest: int, requests: int) -> Ledger:
    """``setting`` is the type of the prompts, ``int32`` or ``list``; ``int32, at the end``: steps publish nothing."""
    return Ledger(block_size, blocks, setting)
