"""Block tables as vLLM's scheduler hands them around: objects with ``get_block_ids``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks


class Block(NamedTuple):
    """One block where vLLM wants an object for it (connectors do)."""

    block_id: int
    block_hash: Any = None
    is_null: bool = False


class Blocks(KVCacheBlocks):
    """Blocks of one group, kept as ids; the objects are made for who asks."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    @property
    def blocks(self) -> tuple[Sequence[Block], ...]:
        """By group, the blocks in token order."""
        return ([Block(id) for id in self.ids],)

    def __add__(self, other: KVCacheBlocks) -> Blocks:
        """These blocks, then the others."""
        return Blocks(self.ids + other.get_block_ids()[0])

    def get_block_ids(self, allow_none: bool = False, *, group_ids: Sequence[int] | None = None) -> Any:
        """By group, the ids in token order; ``None`` if there is none and the caller allows it."""
        if allow_none and not self.ids:
            return None
        return (self.ids,) if group_ids is None else tuple(self.ids for _ in group_ids)

    def get_unhashed_block_ids(self) -> list[int]:
        """Blocks that are not cached under a hash: none is, kvledger hashes nothing."""
        return self.ids

    def get_unhashed_block_ids_all_groups(self) -> list[list[int]]:
        """By group, the same."""
        return [self.ids]

    def new_empty(self) -> Blocks:
        """No blocks."""
        return Blocks([])


class Found(Blocks):
    """What a lookup found: so many leading blocks. Whoever wants their ids asks once they are the request's."""

    def __init__(self, count: int) -> None:
        super().__init__([])
        self.count = count


class Held(NamedTuple):
    """A request whose name is free and whose blocks are not yet: a step that still writes them is under way."""

    name: str
