"""From what a caller passes to what a command carries: words, limits, namespaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from kvledger.config import CacheConfig
from kvledger.manager.arguments import expect_count
from statemachine.content import Item, Tokens, words_of
from statemachine.items import item_records
from statemachine.state.nodes import Request


def prompt_of(
    config: CacheConfig, tokens: Tokens, items: Sequence[Item], max_blocks: SupportsIndex | None
) -> tuple[memoryview, int, bytes]:
    """``(words, most blocks to match, records of the items)``."""
    words = words_of(tokens, items=items)
    most = max(len(words) // 4 - 1, 0) // config.block_size
    if max_blocks is not None:
        most = expect_count("max_blocks", max_blocks)
    return words, most, item_records(items) if items else b""


def full_blocks(words: memoryview | bytes, block_bytes: int) -> int:
    """Where the last full block ends, in bytes."""
    return len(words) - len(words) % block_bytes


class LiveRequest:
    """What the engine has said of a live request, beside what the state knows."""

    def __init__(self, request: Request, tail: bytes | None, computed: int = 0) -> None:
        self.request = request
        self.tail = tail
        """The words after those that the state has; ``None``: a call was interrupted, nobody can tell."""
        self.sampled = False
        """The last known token was told as generated: its KV is not written before the next step."""
        self.items = b""
        """Records of the images and sounds that begin in these words."""
        self.computed = computed
        """So many tokens were said to be computed; what counts is :func:`kvledger.manager.tokens.computed_tokens`."""
