"""What FastDeploy's requests say about their content, in the ledger's terms."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from statemachine.content import InvalidTokens, Item, words_of


def tokens_of(task: Any) -> npt.NDArray[np.int32]:
    """Prompt and generated tokens of a request so far, ``int32[tokens]``.

    A prompt that is an int32 array and has no generated tokens is used as it is. Placeholders inside an item may be
    below 0, as FastDeploy's processors write them: the item's content counts there.

    Raises:
        InvalidTokens: something else is no token id.
    """
    prompt = task.prompt_token_ids
    output = getattr(task, "output_token_ids", None)
    try:
        words = np.frombuffer(words_of(prompt), np.int32)
    except InvalidTokens:
        items = items_of(task)
        if not items:
            raise
        words = np.frombuffer(words_of(_without_placeholders(prompt, items)), np.int32)
    if output is None or not len(output):
        return words
    return np.concatenate([words, np.frombuffer(words_of(output), np.int32)])


def _without_placeholders(prompt: Any, items: list[Item]) -> npt.NDArray[Any]:
    array = np.array(prompt)
    for item in items:
        inside = array[max(item.offset, 0) : item.offset + item.length]
        inside[inside < 0] = 0
    return array


def items_of(task: Any) -> list[Item]:
    """Images and sounds of a request. Their hashes may be texts of any kind; equal texts are equal items.

    Raises:
        InvalidTokens: hashes and positions are not as many, or a position has no whole offset and length.
    """
    inputs = getattr(task, "multimodal_inputs", None)
    if not inputs or not inputs.get("mm_positions") or "mm_hashes" not in inputs:
        return []
    whole = operator.index
    try:
        return [
            Item(hashlib.sha256(str(name).encode()).digest(), whole(position.offset), whole(position.length))
            for name, position in zip(inputs["mm_hashes"], inputs["mm_positions"], strict=True)
        ]
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidTokens(f"mm_hashes and mm_positions do not describe items: {error}") from error


def item_around(inputs: Any, tokens: int) -> tuple[bool, int]:
    """Whether a prefix of so many tokens ends inside an item, and inside which one (else 0)."""
    for index, position in enumerate((inputs or {}).get("mm_positions") or ()):
        if position.offset < tokens < position.offset + position.length:
            return True, index
    return False, 0
