"""The managers that take part in a comparison, one adapter per file, all behind the same four calls.

An adapter is driven by :mod:`benchmarks.contest`, each in a process of its own. It is written from the public interface
of its package, with that package's fastest documented setting and the type of prompt that it likes best. Whatever a
manager does for its answer counts: hashing, comparing, evicting, block tables, and for kvledger the log.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class Contestant(Protocol):
    """One manager with one pool of blocks.

    ``handle`` stands for a request and is whatever :meth:`receive` returned.
    """

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> Any:
        """A request as its engine would have it (not timed): the prompt in the preferred type, a copy of its own."""

    def admit(self, handle: Any) -> int:
        """Find the cached prefix, make room, and give the request its block table. Returns the blocks that hit."""

    def cache(self, handle: Any) -> None:
        """The prompt is computed: publish it."""

    def grow(self, handles: list[Any]) -> None:
        """One scheduler step in which each of these requests begins another block."""

    def step(self, handles: list[Any]) -> None:
        """One scheduler step in which each of these requests gets one more token, published if that is its way."""

    def finish(self, handle: Any) -> None:
        """Publish what was generated, and release the request."""

    def close(self) -> None:
        """Give everything back."""


class Entry(NamedTuple):
    """How to make a contestant: ``module.make(block_size, blocks, setting, longest, requests)``."""

    name: str
    module: str
    setting: str
    peer: str
    """Distribution it needs; empty: it is kvledger."""


ENTRIES = (
    Entry("kvledger", "benchmarks.peers.ledger", "int32", ""),
    Entry("kvledger, list", "benchmarks.peers.ledger", "list", ""),
    Entry("kvledger, interpreted", "benchmarks.peers.ledger", "int32", ""),
    Entry("vLLM xxhash", "benchmarks.peers.vllm", "xxhash", "vllm"),
    Entry("vLLM sha256", "benchmarks.peers.vllm", "sha256", "vllm"),
    Entry("SGLang Rust", "benchmarks.peers.sglang", "rust", "sglang"),
    Entry("SGLang Rust, list", "benchmarks.peers.sglang", "rust, list", "sglang"),
    Entry("SGLang Python", "benchmarks.peers.sglang", "python", "sglang"),
    Entry("SGLang classic", "benchmarks.peers.sglang", "classic", "sglang"),
)
"""``SGLang Rust`` is its default, ``Python`` the same tree in Python, ``classic`` its older ``RadixCache``."""

BEST = tuple(entry for entry in ENTRIES if entry.name in ("kvledger", "vLLM xxhash", "SGLang Rust"))
"""kvledger and each peer in its best setting."""

NOT_COMPARED = (
    "FastDeploy: its wheels are not on PyPI (the distributions of that name there are other or much older software)",
    "SGLang's C++ tree: no longer part of its wheel",
)


def make(entry: Entry, block_size: int, blocks: int, *, longest: int = 140_000, requests: int = 64) -> Contestant:
    """A fresh manager with so many blocks, for so many requests of up to ``longest`` tokens at a time.

    Raises whatever a package that does not work here raises.
    """
    contestant: Contestant = import_module(entry.module).make(block_size, blocks, entry.setting, longest, requests)
    return contestant
