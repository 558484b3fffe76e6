"""SGLang's prefix trees with its paged allocator and its table of token slots, as its scheduler drives them.

Prompts are ``array('q')``, which is what its keys hold; it hashes nothing. A finished request inserts once: SGLang
itself inserts again to split at the prompt's end, which is not needed here, because the prompt was inserted before.
"""

from __future__ import annotations

import logging
import sys
from array import array
from typing import Any
from unittest.mock import MagicMock

import torch
from transformers.utils import is_torchvision_available

is_torchvision_available()  # transformers remembers that it is not there, before something pretends to be it
# SGLang's configurations of vision models import torchvision, whose wheels do not go with a CPU build of torch. Nothing
# that is used here needs it, so something empty takes its place.
for _name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(_name, MagicMock())

from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from benchmarks.peers import Tokens


class _Handle:
    __slots__ = ("allocated", "length", "lock", "output", "prompt", "protected", "row", "tokens")

    def __init__(self, prompt: Any, output: Any) -> None:
        self.prompt = prompt
        self.output = output
        self.tokens = prompt
        """What is to be inserted."""
        self.row = 0
        self.allocated = 0
        """Slots in its row; the last page is its own as a whole."""
        self.length = len(prompt)
        """Tokens in its row, up to the last change of the running batch."""
        self.protected = 0
        """Leading tokens whose slots belong to the tree."""
        self.lock: Any = None


class SGLang:
    """One tree over one pool of token slots on the CPU."""

    def __init__(self, page_size: int, pages: int, setting: str, longest: int, requests: int) -> None:
        core, _, kind = setting.partition(", ")
        self._as_list = kind == "list"
        self._page = page_size
        self._within = torch.arange(page_size)
        self._running: list[_Handle] | None = None
        self.allocator = PagedTokenToKVPoolAllocator(
            pages * page_size, page_size, torch.float16, "cpu", kvcache=None, need_sort=False
        )
        self._rows = ReqToTokenPool(requests, longest, "cpu", False)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=self._rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            tree_components=(ComponentType.FULL,),
            tree_core_backend="python" if core == "python" else "rust",
        )
        self.tree = RadixCache(params) if core == "classic" else UnifiedRadixCache(params)
        if core == "rust" and "Rust" not in type(self.tree.tree_core).__name__:
            raise RuntimeError("SGLang fell back to its Python tree")

    def receive(self, key: str, prompt: Tokens, output: Tokens) -> _Handle:
        if self._as_list:
            return _Handle(prompt.tolist(), output.tolist())
        return _Handle(_words(prompt), _words(output))

    def admit(self, handle: _Handle) -> int:
        if self._as_list:
            handle.prompt = handle.tokens = array("q", handle.prompt)
        length = len(handle.prompt)
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(handle.prompt, limit=length - 1)))
        node = found.last_device_node
        handle.lock = self.tree.lock(node)
        hit = found.device_prefix_len
        handle.row = self._rows.free_slots.pop()
        slots = self._take(-(-(length - hit) // self._page))
        if hit:
            self._rows.write((handle.row, slice(0, hit)), self.tree.path_device_indices(node))
        self._rows.write((handle.row, slice(hit, hit + len(slots))), slots)
        handle.protected, handle.allocated = hit, hit + len(slots)
        return hit // self._page

    def _take(self, pages: int) -> torch.Tensor:
        wanted = pages * self._page
        missing = wanted - self.allocator.available_size()
        if missing > 0:
            self.tree.evict(EvictParams(num_tokens=missing))
        slots = self.allocator.alloc(wanted)
        if slots is None:
            raise MemoryError("SGLang has no room for the request")
        return slots

    def cache(self, handle: _Handle) -> None:
        key = RadixKey(handle.tokens).page_aligned(self._page)
        if len(key) == handle.protected:
            return
        row = self._rows.req_to_token[handle.row]
        inserted = self.tree.insert(
            InsertParams(
                key=key,
                value=row[: len(key)].to(dtype=torch.int64, copy=True),
                prev_prefix_len=handle.protected,
                inserted_len=handle.protected,
            )
        )
        if isinstance(self.tree, RadixCache):  # it leaves the duplicates to its caller
            self.allocator.free_segment(row[handle.protected : inserted.prefix_len], start_pos=handle.protected)
        node = inserted.last_device_node
        self._rows.write(
            (handle.row, slice(handle.protected, len(key))),
            self.tree.path_device_indices(node)[handle.protected :],
        )
        self.tree.unlock(handle.lock)
        handle.lock = self.tree.lock(node)
        handle.protected = len(key)

    def grow(self, handles: list[_Handle]) -> None:
        """A page for each in one allocation and one write, as its decode steps do it token by token."""
        slots = self._take(len(handles)).view(len(handles), self._page)
        rows = torch.tensor([handle.row for handle in handles])
        starts = torch.tensor([handle.allocated for handle in handles])
        self._rows.write((rows[:, None], starts[:, None] + self._within), slots.to(torch.int32))
        for handle in handles:
            handle.allocated += self._page

    def step(self, handles: list[_Handle]) -> None:
        """Its scheduler keeps the lengths of the batch as tensors, and the slots go into the rows in one write."""
        lengths, last = self._batch(handles)
        slots = self.allocator.alloc_decode(lengths + 1, lengths + 1, last)
        if slots is None:
            raise MemoryError("SGLang has no room for another token")
        self._rows.write((self._batch_rows, lengths), slots.to(torch.int32))
        self._last, self._lengths = slots, lengths + 1

    def _batch(self, handles: list[_Handle]) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and last slots of the running batch, which is made once, as long as it is the same."""
        if self._running is not handles:
            self._settle()
            self._running = handles
            self._batch_rows = torch.tensor([handle.row for handle in handles])
            self._lengths = torch.tensor([handle.length for handle in handles])
            self._last = self._rows.req_to_token[self._batch_rows, self._lengths - 1].to(torch.int64)
        return self._lengths, self._last

    def _settle(self) -> None:
        """The batch changes: what its tensors say of each request goes to the requests."""
        if self._running is not None:
            for handle, length in zip(self._running, self._lengths.tolist()):
                handle.length = length
                handle.allocated = max(handle.allocated, length)
            self._running = None

    def finish(self, handle: _Handle) -> None:
        self._settle()
        if self._as_list:
            handle.output = array("q", handle.output)
        handle.tokens = handle.prompt + handle.output
        self.cache(handle)
        row = self._rows.req_to_token[handle.row]
        self.allocator.free_segment(row[handle.protected : handle.allocated], start_pos=handle.protected)
        self.tree.unlock(handle.lock)
        self._rows.free_slots.append(handle.row)

    def close(self) -> None:
        """Nothing outlives the process."""


def _words(tokens: Tokens) -> array[int]:
    words = array("q")
    words.frombytes(tokens.astype("int64").tobytes())
    return words


def make(block_size: int, blocks: int, setting: str, longest: int, requests: int) -> Any:
    """``setting`` is the tree (``rust``, ``python``, ``classic``), with ``, list`` if prompts come as lists."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return SGLang(block_size, blocks, setting, longest, requests)
