"""What the tests of the drop-in share: configurations and requests shaped like FastDeploy's, and a launch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from kvledger.adapters.fastdeploy import PrefixCacheManager

_ports = itertools.count()


def config(gpu: int = 8, cpu: int = 0, **cache: Any) -> SimpleNamespace:
    """So many blocks of two tokens."""
    settings = {
        "total_block_num": gpu,
        "prefill_kvcache_block_num": gpu,
        "num_cpu_blocks": cpu,
        "block_size": 2,
        "bytes_per_layer_per_block": 64,
        "enable_prefix_caching": True,
        "enable_hierarchical_cache": True,
        "cache_dtype": "bfloat16",
        "model_cfg": SimpleNamespace(num_hidden_layers=2),
        "kv_backend": "numpy",
        **cache,
    }
    model = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    return SimpleNamespace(
        cache_config=SimpleNamespace(**settings),
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        speculative_config=None,
        quant_config=None,
    )


def request(req_id: str, prompt: Any, output: Sequence[int] = (), **more: Any) -> SimpleNamespace:
    fields = {"request_id": req_id, "prompt_token_ids": prompt, "output_token_ids": list(output), "block_tables": []}
    return SimpleNamespace(**fields, **more)


def port() -> str:
    """A signal suffix that no other test process uses."""
    return f"{os.getpid()}-{next(_ports)}"


@contextmanager
def manager(gpu: int = 8, cpu: int = 0, tp: int = 1, launch: bool | None = None, **cache: Any) -> Iterator[Any]:
    """A drop-in; with a host tier also its workers. Every block has one owner at the end."""
    settings = config(gpu, cpu, **cache)
    with PrefixCacheManager(settings, tp) as it:
        if launch or (launch is None and cpu):
            it.launch_cache_manager(settings.cache_config, tp, list(range(tp)), "127.0.0.1", port(), "", True)
        yield it


def serve(it: Any, req_id: str, prompt: Any, *, release: bool = True) -> SimpleNamespace:
    """A request the way the scheduler handles it: match, allocate, cache, and, when it ends, release and recycle."""
    task = request(req_id, prompt)
    size = it.cache_config.block_size
    common, tokens, _ = it.request_match_blocks(task, size)
    task.block_tables = list(common)
    missing = it.get_required_block_num(len(prompt), size) - len(common)
    assert it.can_allocate_gpu_blocks(missing)
    task.block_tables += it.allocate_gpu_blocks(missing)
    it.update_cache_blocks(task, size, len(prompt))
    task.matched = tokens
    if release:
        finish(it, task)
    return task


def finish(it: Any, task: SimpleNamespace) -> None:
    it.release_block_ids(task)
    it.recycle_gpu_blocks(task.block_tables[task.cached_block_num :])
