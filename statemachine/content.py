"""Content words: what makes two KV blocks equal, decided once, at the boundary.

A prompt becomes little-endian int32 words. A real token is its own id (0 to 2³¹ − 1). The positions of a multimodal
item carry words made from the item's hash, with the sign bit set, so that they can never equal a token; what tells two
items apart for certain is :mod:`statemachine.items`. LoRA adapter, cache salt and weight version form a *namespace*
that selects a prefix tree of its own.
"""

from __future__ import annotations

import hashlib
import sys
from array import array as packed
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from statemachine.errors import CommandRejected, InvalidCommand
from statemachine.items import Item as Item

Tokens: TypeAlias = "npt.NDArray[Any] | Sequence[int] | memoryview | bytearray | Any"
"""Token ids: a NumPy array of any integer type, a buffer of integers, or any sequence of ints."""

_PATTERN_BYTES = 16
"""Four words with the sign bit set."""
_SIGN = np.uint32(1 << 31)
_VERSIONED = b"\xff\xff\xff\xff"
"""No length of a :func:`namespace_key` begins like this."""
_WORD = np.dtype("<i4")


class InvalidTokens(CommandRejected):
    """Something in a prompt is no token id, or an item does not fit in it."""


def words_of(tokens: Tokens, *, items: Sequence[Item] = ()) -> memoryview:
    """The content words of a prompt, as bytes.

    An int32 array (or other buffer) without items is used as it is, without a copy: do not change it during the call
    that it is passed to. A list or a tuple costs 6 ns per token to convert; its elements are whatever Python
    takes for an index.

    Raises:
        InvalidTokens: a token is negative, beyond int32 or no integer; items overlap or reach outside the prompt.
    """
    array = tokens if _is_plain(tokens) else _token_array(tokens)
    try:
        some = bool(items)
    except Exception as error:  # as above
        raise InvalidTokens(f"items are a sequence of Item: {error}") from error
    if some:
        array = array.copy()
        _overwrite(array, items)
    return array.data.cast("B")


def _is_plain(tokens: Tokens) -> TypeGuard[npt.NDArray[np.int32]]:
    """Whether nothing has to be converted: valid int32, the way engines keep prompts."""
    return (
        type(tokens) is np.ndarray
        and tokens.dtype is _WORD
        and tokens.ndim == 1
        and tokens.flags.c_contiguous
        and (not len(tokens) or bool(np.minimum.reduce(tokens) >= 0))
    )


def _token_array(tokens: Tokens) -> npt.NDArray[np.int32]:
    if (type(tokens) is list or type(tokens) is tuple) and tokens and type(tokens[0]) is not bool:
        words = _listed(tokens)
        if words is not None:
            return words
    try:
        array = tokens if isinstance(tokens, np.ndarray) else np.asarray(tokens)
    except Exception as error:  # an object may raise anything while it is being converted
        raise InvalidTokens(f"a prompt must be a flat sequence of token ids: {error}") from error
    if array.ndim != 1:
        raise InvalidTokens(f"a prompt has one dimension, this one has {array.ndim}")
    if not len(array):
        return np.empty(0, _WORD)
    if array.dtype.kind not in "iu":
        raise InvalidTokens(f"token ids are integers, not {array.dtype}")
    # one pass: as unsigned, what is negative is large too
    unsigned = array.view(f"{array.dtype.byteorder}u{array.dtype.itemsize}")
    if int(unsigned.max()) >= 1 << min(8 * array.dtype.itemsize - (array.dtype.kind == "i"), 31):
        position = int(np.flatnonzero((array < 0) | (array > 0x7FFFFFFF))[0])
        raise InvalidTokens(f"token {array[position]} at position {position} is not from 0 to 2^31 - 1")
    return np.ascontiguousarray(array, _WORD)


def _listed(tokens: list[int] | tuple[int, ...]) -> npt.NDArray[np.int32] | None:
    """Tokens in a list, in a quarter of the time that NumPy takes; ``None``: it has to say what is wrong with them."""
    try:
        words = np.frombuffer(packed("I", tokens), _WORD)
    except Exception:  # an element that is no integer, or raises what it likes
        return None
    return words if _is_plain(words) else None


def _is_item(item: object) -> bool:
    return isinstance(item, Item) and isinstance(item.hash, bytes) and type(item.offset) is type(item.length) is int


def _overwrite(array: npt.NDArray[np.int32], items: Sequence[Item]) -> None:
    end = 0
    if not isinstance(items, Sequence) or not all(map(_is_item, items)):
        raise InvalidTokens("items are a sequence of Item(hash: bytes, offset: int, length: int)")
    for item in sorted(items, key=lambda item: item.offset):
        if not item.hash:
            raise InvalidTokens(f"the hash of the item at {item.offset} is empty: it has to tell it from all others")
        if item.length < 1 or item.offset < end or item.offset + item.length > len(array):
            raise InvalidTokens(
                f"an item at {item.offset} with {item.length} positions overlaps another one or does not fit in "
                f"{len(array)} tokens"
            )
        end = item.offset + item.length
        pattern = np.frombuffer(hashlib.sha256(item.hash).digest()[:_PATTERN_BYTES], "<u4") | _SIGN
        array[item.offset : end] = np.resize(pattern, item.length).astype("<u4").view(_WORD)


def namespace_key(*, lora: str = "", salt: str = "", weights: str = "") -> bytes:
    """The namespace of an adapter, a cache salt and a weight version; empty if there is none of them.

    Raises:
        InvalidCommand: they are no texts.
    """
    if type(lora) is type(salt) is type(weights) is str and not (lora or salt or weights):
        return b""
    try:
        parts = [part.encode() for part in (lora, salt, weights)]
    except (AttributeError, UnicodeEncodeError) as error:
        raise InvalidCommand(f"lora, salt and weights are texts: {error}") from error
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def adapter_of(namespace: bytes, weights: str) -> str | None:
    """The LoRA adapter of a namespace under these weights, empty for none; ``None``: it names anything else."""
    version = versioned(weights, b"")
    if not namespace.startswith(version):
        return None
    namespace = namespace[len(version) :]
    length = int.from_bytes(namespace[:4], "little")
    try:
        adapter = namespace[4 : 4 + length].decode()
    except UnicodeDecodeError:
        return None
    return adapter if namespace_key(lora=adapter) == namespace else None


def parts_of(namespace: bytes) -> tuple[str, str, str] | None:
    """Adapter, salt and weight version of a namespace; ``None``: it is one that the engine made up itself."""
    version = ""
    try:
        if namespace.startswith(_VERSIONED):
            version, namespace = _part(namespace, len(_VERSIONED))
        if not namespace:
            return "", "", version
        lora, rest = _part(namespace, 0)
        salt, rest = _part(rest, 0)
        weights, rest = _part(rest, 0)
    except (UnicodeDecodeError, IndexError):
        return None
    return None if rest or (weights and version) else (lora, salt, weights or version)


def _part(data: bytes, start: int) -> tuple[str, bytes]:
    """The text that begins there with its length, and what follows it."""
    begin = start + 4
    end = begin + int.from_bytes(data[start:begin], "little")
    if len(data) < max(begin, end):
        raise IndexError(end)
    return data[begin:end].decode(), data[end:]


def versioned(weights: str, namespace: bytes) -> bytes:
    """A namespace under one version of the model's weights; no two pairs of them come to the same.

    Without a version it stays as it is, unless it looks like one with a version.
    """
    if not weights and not namespace.startswith(_VERSIONED):
        return namespace
    version = weights.encode()
    return _VERSIONED + len(version).to_bytes(4, "little") + version + namespace


assert sys.byteorder == "little", "kvledger runs on little-endian machines (x86-64, aarch64)"
