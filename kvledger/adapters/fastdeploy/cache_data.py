"""``CacheStatus`` and ``BlockNode``: one cached block, the way FastDeploy's code looks at it."""

from __future__ import annotations

from enum import Enum
from typing import Any


class CacheStatus(Enum):
    """Where a cached block is."""

    GPU = 0
    SWAP2CPU = 1
    SWAP2GPU = 2
    CPU = 3


class BlockNode:
    """A node of the prefix tree with one block; attributes are named as in the original, misspelling included."""

    def __init__(
        self,
        node_id: int,
        input_ids: Any,
        input_hash_value: Any,
        depth: int,
        block_id: int,
        token_num: int,
        hash_value: Any,
        last_used_time: float | None,
        parent: BlockNode | None = None,
        shared_count: int = 1,
        reverved_dec_block_ids: list[int] | None = None,
        cache_status: CacheStatus = CacheStatus.GPU,
        is_persistent: bool = False,
        persistent_shared_count: int = 0,
    ) -> None:
        self.node_id = node_id
        self.input_ids = input_ids
        self.input_hash_value = input_hash_value
        self.depth = depth
        self.block_id = block_id
        self.token_num = token_num
        self.hash_value = hash_value
        self.last_used_time = last_used_time
        self.parent = parent
        self.shared_count = shared_count
        self.reverved_dec_block_ids = [] if reverved_dec_block_ids is None else reverved_dec_block_ids
        self.cache_status = cache_status
        self.is_persistent = is_persistent
        self.persistent_shared_count = persistent_shared_count
        self.children: Any = {}
        self.req_id_set: set[str] = set()

    @property
    def has_in_gpu(self) -> bool:
        """Whether it is on the device and not on its way."""
        return self.cache_status == CacheStatus.GPU

    @property
    def is_cpu_leaf_node(self) -> bool:
        """On the host, and nothing continues it."""
        return self.cache_status == CacheStatus.CPU and not self.children

    @property
    def is_gpu_leaf_node(self) -> bool:
        """On the device, and nothing on the device continues it."""
        return self.has_in_gpu and not any(child.has_in_gpu for child in self.children.values())

    def increment_shared_count(self) -> None:
        """One user more."""
        self.shared_count += 1

    def decrement_shared_count(self) -> None:
        """One user less."""
        self.shared_count -= 1

    def __lt__(self, other: BlockNode) -> bool:
        """Used longer ago; at a tie, deeper."""
        if self.last_used_time != other.last_used_time:
            return (self.last_used_time or 0.0) < (other.last_used_time or 0.0)
        return self.depth > other.depth

    def __repr__(self) -> str:
        return f"<block {self.block_id} at depth {self.depth}, {self.cache_status.name}, {self.shared_count} users>"
