"""What FastDeploy's requests say about their content, in the ledger's terms."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from statemachine.content import Item, words_of


def tokens_of(task: Any) -> npt.NDArray[np.int32]:
    """Prompt and generated tokens of a request so far, ``int32[tokens]``.

    A prompt that is an int32 array and has no generated tokens is used as it is.
    """
    prompt = task.prompt_token_ids
    output = getattr(task, "output_token_ids", None)
    words = np.frombuffer(words_of(prompt), np.int32)
    if output is None or not len(output):
        return words
    return np.concatenate([words, np.frombuffer(words_of(output), np.int32)])


def items_of(task: Any) -> list[Item]:
    """Images and sounds of a request. Their hashes may be texts of any kind; equal texts are equal items."""
    inputs = getattr(task, "multimodal_inputs", None)
    if not inputs or not inputs.get("mm_positions") or "mm_hashes" not in inputs:
        return []
    return [
        Item(hashlib.sha256(str(name).encode()).digest(), position.offset, position.length)
        for name, position in zip(inputs["mm_hashes"], inputs["mm_positions"], strict=True)
    ]


def item_around(inputs: Any, tokens: int) -> tuple[bool, int]:
    """Whether a prefix of so many tokens ends inside an item, and inside which one (else 0)."""
    for index, position in enumerate((inputs or {}).get("mm_positions") or ()):
        if position.offset < tokens < position.offset + position.length:
            return True, index
    return False, 0
