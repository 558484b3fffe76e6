"""kvledger in the calls that count tokens, log on: how an engine uses it. Prompts and tokens are Python's."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks.peers import Tokens
from kvledger import CacheConfig, CacheManager


class _Request:
    __slots__ = ("key", "known", "output", "prompt")

    def __init__(self, key: str, prompt: list[int], output: list[int]) -> None:
        self.key, self.prompt, self.output = key, prompt, output
        self.known = len(prompt)


class InTokens:
    """A :class:`CacheManager` without workers.

    Args:
        setting: ``batches``: the calls of a step name all its requests. ``one by one``: three calls per request and
            step, which is vLLM's pattern. With ``, in a step`` a step is one transaction.
    """

    def __init__(self, block_size: int, blocks: int, setting: str) -> None:
        self.manager = CacheManager.create(
            f"pattern-{os.getpid()}", CacheConfig(block_size=block_size, device_blocks=blocks)
        )
        way, _, step = setting.partition(", ")
        self._batches, self._in_a_step = way == "batches", bool(step)

    def turn(self, number: int) -> AbstractContextManager[None]:
        """What is around all calls of a scheduler step."""
        return self.manager.step(number) if self._in_a_step else nullcontext()

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> _Request:
        return _Request(key, prompt.tolist(), output.tolist())

    def admit(self, handle: _Request) -> int:
        return self.manager.admit(handle.key, handle.prompt).device_blocks

    def cache(self, handle: _Request) -> None:
        self.manager.commit({handle.key: handle.known})

    def grow(self, handles: list[_Request]) -> None:
        raise NotImplementedError("whoever counts tokens grows by tokens: step()")

    def step(self, handles: list[_Request]) -> None:
        manager = self.manager
        if not self._batches:
            for handle in handles:
                manager.append(handle.key, handle.output[handle.known - len(handle.prompt)])
                handle.known += 1
                manager.grow({handle.key: handle.known})
                manager.commit({handle.key: handle.known})
            return
        known = {}
        for handle in handles:
            manager.append(handle.key, handle.output[handle.known - len(handle.prompt)])
            handle.known += 1
            known[handle.key] = handle.known
        manager.grow(known)
        manager.commit(known)

    def finish(self, handle: _Request) -> None:
        self.manager.release(handle.key)

    def close(self) -> None:
        self.manager.close()


def make(block_size: int, blocks: int, setting: str, longest: int, requests: int) -> Any:
    """``setting``: see :class:`InTokens`."""
    return InTokens(block_size, blocks, setting)
