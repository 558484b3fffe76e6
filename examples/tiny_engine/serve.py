"""Putting it together: pools, workers, block manager, engine, and some requests to serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from examples.tiny_engine.attention import kv_tensors
from examples.tiny_engine.dropin import DropIn
from examples.tiny_engine.engine import Completion, Engine
from examples.tiny_engine.model import Model, ModelConfig
from kvledger import CacheConfig, CacheManager, HostPolicy, Marks
from kvledger.adapters.fastdeploy import PrefixCacheManager

MODEL_RANKS = (1, 2, 4)
"""How many ranks the model's key heads can be split over."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What must make no difference to the tokens."""

    drop_in: bool = False
    """FastDeploy's ``PrefixCacheManager`` API instead of ``CacheManager``."""
    caching: bool = True
    device_blocks: int = 256
    host_blocks: int = 0
    host_policy: HostPolicy = HostPolicy.OFF
    ranks: int = 1
    block_size: int = 8
    running: int = 8
    budget: int = 64
    chunk: int = 24
    marks: str = ""
    """A file for what the engine does with its blocks."""


@dataclass
class Session:
    """A running engine and what it runs on."""

    manager: CacheManager
    engine: Engine


@contextmanager
def session(model: Model, mode: Mode, name: str | None = None) -> Iterator[Session]:
    """A ledger with its pools and workers, and an engine on it; gone at the end.

    Raises:
        kvledger.ConfigError, ipc.LedgerError, workers.WorkerFailed
    """
    opened = _drop_in if mode.drop_in else _ledger
    with opened(model.config, mode, name or f"tiny-{os.getpid()}") as (manager, calls):
        marks = Marks(manager, mode.marks) if mode.marks else None
        if marks is not None and isinstance(calls, CacheManager):
            calls = marks.manager
        engine = Engine(
            model,
            calls,
            manager.pools,
            caching=mode.caching,
            running=mode.running,
            budget=mode.budget,
            chunk=mode.chunk,
            marks=marks,
        )
        yield Session(manager, engine)


@contextmanager
def _ledger(config: ModelConfig, mode: Mode, name: str) -> Iterator[tuple[CacheManager, CacheManager]]:
    cache = CacheConfig(
        block_size=mode.block_size,
        device_blocks=mode.device_blocks,
        host_blocks=mode.host_blocks,
        host_policy=mode.host_policy,
        ranks=mode.ranks,
        layers=config.layers,
        tensors=kv_tensors(config.kv_heads // mode.ranks, mode.block_size, config.head_dim),
        backend="paddle",
    )
    with CacheManager.create(name, cache) as manager:
        yield manager, manager


@contextmanager
def _drop_in(config: ModelConfig, mode: Mode, name: str) -> Iterator[tuple[CacheManager, DropIn]]:
    """As FastDeploy's engine starts it."""
    cache = SimpleNamespace(
        total_block_num=mode.device_blocks,
        prefill_kvcache_block_num=mode.device_blocks,
        num_cpu_blocks=mode.host_blocks,
        block_size=mode.block_size,
        write_policy="write_through" if mode.host_policy == HostPolicy.WRITE_THROUGH else "write_back",
        model_cfg=SimpleNamespace(num_hidden_layers=config.layers),
        kv_tensors=kv_tensors(config.kv_heads // mode.ranks, mode.block_size, config.head_dim),
        kv_backend="paddle",
    )
    with PrefixCacheManager(SimpleNamespace(cache_config=cache), mode.ranks) as manager:
        manager.launch_cache_manager(cache, mode.ranks, list(range(mode.ranks)), "127.0.0.1", name, "", True)
        yield manager.manager, DropIn(manager)


@dataclass(frozen=True)
class Prompts:
    """Requests that share beginnings, and some that go on with what others were answered."""

    first: list[list[int]]
    questions: list[list[int]]
    """Appended to prompt ``i`` and its answer: a second turn."""

    def second(self, answers: dict[str, Completion]) -> list[list[int]]:
        """The second turns, after the first have been answered as ``"0"``, ``"1"``, …"""
        return [self.first[i] + answers[str(i)].tokens + question for i, question in enumerate(self.questions)]


def prompts(vocabulary: int, requests: int, seed: int) -> Prompts:
    """The same for the same numbers."""
    rng = np.random.default_rng(seed)

    def text(least: int, most: int) -> list[int]:
        return [*map(int, rng.integers(0, vocabulary, rng.integers(least, most)))]

    shared = [text(20, 60) for _ in range(max(requests // 6, 1))]
    first = [shared[i % len(shared)] + text(1, 40) for i in range(requests)]
    return Prompts(first, [text(3, 12) for _ in range(requests // 2)])


def serve(run: Session, work: Prompts, generate: int = 16) -> list[Completion]:
    """Serve both turns; returns all completions in order."""
    for i, prompt in enumerate(work.first):
        run.engine.submit(str(i), prompt, generate)
    answers = dict(run.engine.run())
    for i, prompt in enumerate(work.second(answers)):
        run.engine.submit(f"{i} again", prompt, generate)
    run.engine.run()
    return [run.engine.done[name] for name in _names(work)]


def _names(work: Prompts) -> list[str]:
    return [str(i) for i in range(len(work.first))] + [f"{i} again" for i in range(len(work.questions))]
