"""Content words, namespaces and block hashes."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statemachine.content import InvalidTokens, Item, namespace_key, words_of
from statemachine.hashing import block_hashes

TOKENS = st.lists(st.integers(0, 127), max_size=40)
IMAGE = bytes(range(16))
OTHER = bytes(range(1, 17))


@given(TOKENS)
def test_equal_prompts_give_equal_words_whatever_type_carries_them(tokens: list[int]) -> None:
    wanted = np.array(tokens, "<i4").tobytes()
    carriers: list[Any] = [
        tokens,
        tuple(tokens),
        array("i", tokens),
        array("q", tokens),
        memoryview(array("I", tokens)),
    ]
    carriers += [np.array(tokens, kind) for kind in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u8")]
    carriers.append(np.repeat(np.array(tokens, np.int32), 2)[::2])
    for carrier in carriers:
        assert words_of(carrier).tobytes() == wanted, carrier


def test_whatever_counts_as_an_index_is_a_token_in_a_list() -> None:
    class Token:
        def __index__(self) -> int:
            return 7

    for tokens in ([Token(), 8], [7, np.int64(8)], [np.uint8(7), 8], (7, 8)):
        assert words_of(tokens).tobytes() == np.array([7, 8], np.int32).tobytes(), tokens


def test_int32_is_not_copied() -> None:
    tokens = np.arange(8, dtype=np.int32)
    words = words_of(tokens)
    tokens[0] = 77
    assert words[0] == 77


@pytest.mark.parametrize(
    "tokens",
    [
        [-1],
        [0, 2**31],
        (0, -1),
        [0, 2**32],
        [0, 2**64],
        [0, 1.0],
        [0, "1"],
        [0, None],
        [0, [1]],
        [2**63],
        [2**64],
        [1.0],
        [True],
        ["1"],
        [[1], [2]],
        [[1], [2, 3]],
        5,
        None,
        np.array([1, -(2**31)], np.int32),
        np.array([2**31], np.uint32),
        np.array([-1], np.int8),
        np.array([2**32], np.int64),
        np.array([-5], ">i8"),
    ],
)
def test_what_is_no_token_is_rejected(tokens: Any) -> None:
    with pytest.raises(InvalidTokens):
        words_of(tokens)


def test_images_never_equal_tokens_and_tell_content_and_position() -> None:
    tokens = np.full(40, 7, np.int32)

    def words(*items: Item) -> bytes:
        return words_of(tokens, items=items).tobytes()

    plain, image = words(), words(Item(IMAGE, 8, 16))
    assert (np.frombuffer(image, np.int32)[8:24] < 0).all()
    assert len({plain, image, words(Item(OTHER, 8, 16)), words(Item(IMAGE, 9, 16)), words(Item(IMAGE, 8, 15))}) == 5
    assert words_of(tokens).tobytes() == plain, "the caller's array was changed"
    shifted = words(Item(IMAGE, 9, 16))
    common = next(i for i in range(40) if image[4 * i : 4 * i + 4] != shifted[4 * i : 4 * i + 4])
    assert common == 8, "a shifted image matches up to where the first one begins"


@pytest.mark.parametrize(
    "items",
    [
        [Item(b"", 0, 4)],
        [Item(IMAGE, -1, 4)],
        [Item(IMAGE, 0, 0)],
        [Item(IMAGE, 8, 3)],
        [Item(IMAGE, 0, 4), Item(IMAGE, 3, 4)],
    ],
)
def test_items_that_do_not_fit_are_rejected(items: list[Item]) -> None:
    with pytest.raises(InvalidTokens):
        words_of(np.arange(10, dtype=np.int32), items=items)


def test_namespaces_differ() -> None:
    names = [namespace_key(), namespace_key(lora="a"), namespace_key(salt="a"), namespace_key(weights="a")]
    names += [namespace_key(lora="a", salt="b"), namespace_key(lora="ab"), namespace_key(salt="ab")]
    assert len(set(names)) == len(names) and names[0] == b""


@given(TOKENS, st.integers(1, 5), st.sampled_from(["sha256", "xxh3"]), st.integers(0, 39))
def test_block_hashes_are_a_chain(tokens: list[int], size: int, algorithm: str, place: int) -> None:
    words = words_of(tokens)
    hashes = block_hashes(words, size, algorithm=algorithm)
    assert len(hashes) == len(tokens) // size and len(set(hashes)) == len(hashes)
    assert hashes != block_hashes(words, size, b"salt", algorithm=algorithm) or not hashes
    if len(hashes) > 1:
        rest = block_hashes(words[4 * size :], size, algorithm=algorithm, parent=hashes[0])
        assert rest == hashes[1:]
    if place < len(hashes) * size:
        changed = list(tokens)
        changed[place] += 1
        other = block_hashes(words_of(changed), size, algorithm=algorithm)
        same = place // size
        assert other[:same] == hashes[:same] and not set(other[same:]) & set(hashes[same:])
    if algorithm == "sha256":
        assert block_hashes(b"", 4) == []


def test_block_hashes_stay_the_same() -> None:
    """They name blocks in stores: a change would lose every stored block."""
    assert block_hashes(words_of([1, 2]), 2)[0].hex() == SHA256
    assert block_hashes(words_of([1, 2]), 2, algorithm="xxh3")[0].hex() == XXH3


SHA256 = "7eaed0f864f5a2d16d4761492ab74e76"
XXH3 = "b6e7e93e79ba8e7e90393340ab285a07"
