"""Request traces: the project's own token traces, and Mooncake's JSONL traces. For users: docs/traces.md.

Own format, one JSON object per line: ``timestamp`` (ms), ``tokens`` (ids), ``output`` (generated ids), and
optionally ``images`` (objects with ``hash`` in hex, ``offset``, ``length``), ``lora``, ``salt``, and ``final`` (the
session ends here).

Mooncake format (the traces of kvcache-ai/Mooncake): ``timestamp``, ``input_length``, ``output_length``, ``hash_ids``;
each id is one cacheable block, here of four tokens: the id as 16 little-endian bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from statemachine.content import InvalidTokens, Item, namespace_key, words_of

MOONCAKE_BLOCK_SIZE = 4
_LARGEST_ID = 2**31 - 2


class TraceError(ValueError):
    """A trace cannot be read: which file, which line, why."""


class TraceRequest(NamedTuple):
    """One request of a trace."""

    number: int
    timestamp_ms: float
    tokens: npt.NDArray[np.int32]
    """The prompt, ``int32[tokens]``."""
    items: tuple[Item, ...]
    namespace: bytes
    output: npt.NDArray[np.int32]
    """What is generated, if it is to be cached."""
    output_length: int
    final: bool
    """Nobody continues it."""


class Trace(NamedTuple):
    """A whole trace, validated."""

    name: str
    requests: list[TraceRequest]
    block_size: int | None
    """Tokens per block where the format gives it."""
    capped: bool
    """Whether at least one token of a prompt is left to compute."""


def load(path: Path) -> Trace:
    """Read and validate a trace completely.

    Raises:
        TraceError: with file, line and reason.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    requests: list[TraceRequest] = []
    parents: dict[int, int] = {}
    mooncake: bool | None = None
    last = -1.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TraceError("not a JSON object")
            if mooncake is None:
                mooncake = "hash_ids" in entry
            timestamp = _number(entry, "timestamp")
            if timestamp < last:
                raise TraceError(f"timestamp {timestamp:g} is before the previous one, {last:g}")
            last = timestamp
            read = _mooncake if mooncake else _own
            requests.append(read(entry, len(requests), timestamp, parents))
        except (TraceError, InvalidTokens) as error:
            raise TraceError(f"{path}, line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}, line {number}: not JSON: {error}") from None
    if not requests:
        raise TraceError(f"{path}: there is no request in it")
    return Trace(str(path), requests, MOONCAKE_BLOCK_SIZE if mooncake else None, not mooncake)


def _mooncake(entry: dict[str, Any], index: int, timestamp: float, parents: dict[int, int]) -> TraceRequest:
    ids = entry.get("hash_ids")
    if not isinstance(ids, list) or not ids:
        raise TraceError("hash_ids must be a list with at least one id")
    _whole(entry, "input_length")
    parent = -1
    for id in ids:
        if type(id) is not int or not 0 <= id <= _LARGEST_ID:
            raise TraceError(f"hash id {id!r} is not a whole number from 0 to {_LARGEST_ID}")
        if parents.setdefault(id, parent) != parent:
            raise TraceError(f"hash id {id} follows {parent} here and {parents[id]} in another place")
        parent = id
    if len(set(ids)) != len(ids):
        raise TraceError("a hash id stands twice in one path")
    words = np.zeros((len(ids), MOONCAKE_BLOCK_SIZE), np.int32)
    words[:, 0] = ids
    return TraceRequest(
        index, timestamp, words.reshape(-1), (), b"", np.empty(0, np.int32), _whole(entry, "output_length"), False
    )


def _own(entry: dict[str, Any], index: int, timestamp: float, parents: dict[int, int]) -> TraceRequest:
    unknown = entry.keys() - {"timestamp", "tokens", "output", "images", "lora", "salt", "final"}
    if unknown:
        raise TraceError(f"unknown fields {sorted(unknown)}")
    tokens = _token_ids(entry, "tokens")
    if not len(tokens):
        raise TraceError("tokens must be a list with at least one id")
    output = _token_ids(entry, "output")
    images = entry.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise TraceError("images must be a list of objects")
    items = tuple(_image(image) for image in images)
    words_of(tokens, items=items)
    names = {}
    for name in ("lora", "salt"):
        names[name] = entry.get(name, "")
        if not isinstance(names[name], str):
            raise TraceError(f"{name} must be a text")
    final = entry.get("final", False)
    if not isinstance(final, bool):
        raise TraceError("final must be true or false")
    return TraceRequest(index, timestamp, tokens, items, namespace_key(**names), output, len(output), final)


def _token_ids(entry: dict[str, Any], name: str) -> npt.NDArray[np.int32]:
    ids = entry.get(name, [])
    if not isinstance(ids, list) or any(type(id) is not int for id in ids):
        raise TraceError(f"{name} must be a list of token ids")
    return np.frombuffer(words_of(ids), np.int32)


def _image(image: dict[str, Any]) -> Item:
    try:
        digest = bytes.fromhex(image["hash"])
    except (KeyError, TypeError, ValueError):
        raise TraceError("an image needs a hash of hexadecimal digits") from None
    return Item(digest, _whole(image, "offset"), _whole(image, "length"))


def _number(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e18:
        raise TraceError(f"{name} must be a number from 0, not {value!r:.80}")
    return float(value)


def _whole(entry: dict[str, Any], name: str) -> int:
    value = entry.get(name)
    if type(value) is not int or not 0 <= value <= _LARGEST_ID:
        raise TraceError(f"{name} must be a whole number from 0 to {_LARGEST_ID}, not {value!r:.80}")
    return value
