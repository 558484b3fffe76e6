"""vLLM's ``KVCacheManager`` with its block pool and its block hashes, as its scheduler drives them.

Prompts are lists, which is what its requests hold. Hashing is timed as the engine does it, by the request block hasher;
making the ``Request`` object is not. Its statistics and events are off; it publishes blocks as they fill.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("PYTHONHASHSEED", "0")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from benchmarks.peers import Tokens


class _Handle:
    __slots__ = ("output", "request", "written")

    def __init__(self, request: Request, output: list[int]) -> None:
        self.request, self.output = request, output
        self.written = 0
        """Tokens of the output that are in the request."""


class VLLM:
    """One attention group, prefix caching on."""

    def __init__(self, block_size: int, blocks: int, hash_name: str, longest: int) -> None:
        hash_function = get_hash_fn_by_name(hash_name)
        init_none_hash(hash_function)
        self._block_size = block_size
        self._hasher = get_request_block_hasher(block_size, hash_function)
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float16)
        config = KVCacheConfig(
            num_blocks=blocks + 1,  # one of them is its null block
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = KVCacheManager(
            config, max_model_len=longest, scheduler_block_size=block_size, hash_block_size=block_size
        )
        self._sampling = SamplingParams(max_tokens=1 << 20)

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> _Handle:
        return _Handle(Request(key, prompt.tolist(), self._sampling, None), output.tolist())

    def admit(self, handle: _Handle) -> int:
        request = handle.request
        request.block_hashes.extend(self._hasher(request))
        computed, hit, _ = self.manager.get_computed_blocks(request)
        if self.manager.allocate_slots(request, request.num_tokens - hit, hit, computed) is None:
            raise MemoryError("vLLM has no room for the request")
        self.manager.get_block_ids(request.request_id)
        request.num_computed_tokens = request.num_tokens
        return hit // self._block_size

    def cache(self, handle: _Handle) -> None:
        """It published when it allocated."""

    def grow(self, handles: list[_Handle]) -> None:
        for handle in handles:
            self._append(handle, handle.written + self._block_size)

    def step(self, handles: list[_Handle]) -> None:
        for handle in handles:
            self._append(handle, handle.written + 1)

    def _append(self, handle: _Handle, end: int) -> None:
        request = handle.request
        tokens = handle.output[handle.written : end]
        handle.written = end
        request.append_output_token_ids(tokens)
        request.block_hashes.extend(self._hasher(request))
        if self.manager.allocate_slots(request, len(tokens)) is None:
            raise MemoryError("vLLM has no room for another block")
        request.num_computed_tokens += len(tokens)

    def finish(self, handle: _Handle) -> None:
        if handle.written < len(handle.output):
            self._append(handle, len(handle.output))
        self.manager.free(handle.request)

    def close(self) -> None:
        """Nothing outlives the process."""


def make(block_size: int, blocks: int, setting: str, longest: int, requests: int) -> Any:
    """``setting`` names the hash."""
    return VLLM(block_size, blocks, setting, longest)
