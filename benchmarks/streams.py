"""Request streams: what arrives, in which order, and what must be finished before.

Every stream is drawn from a seed: each contestant is given exactly the same requests, with the same number of blocks in
the pool and the same number of requests in flight. Lengths in tokens scale with the block size only where the stream is
about the number of blocks of a path (agentic, one-shot).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
_VOCABULARY = 128_000


class Request(NamedTuple):
    """One request of a stream."""

    prompt: Tokens
    output: Tokens
    after: int
    """The request that has to be finished before this one begins; -1: none."""


class Stream(NamedTuple):
    """A whole stream."""

    requests: list[Request]
    blocks: int
    """Of the pool: a fraction of what the stream could fill, so that every manager has to evict."""
    in_flight: int
    """Requests that run at the same time."""


def chat(block_size: int, quick: bool) -> Stream:
    """Conversations of five turns on eight system prompts; 24 of them at a time, a turn after the one before."""
    rng = np.random.default_rng(1)
    systems = [_tokens(rng, 1000) for _ in range(8)]
    requests: list[Request] = []
    sessions: list[tuple[Tokens, int, int]] = []  # what was said, its last request, turns left
    while len(requests) < (60 if quick else 600):
        while len(sessions) < 24:
            sessions.append((systems[int(rng.integers(8))], -1, 5))
        said, last, turns = sessions.pop(int(rng.integers(8)))
        prompt = np.concatenate([said, _tokens(rng, int(rng.integers(50, 250)))])
        output = _tokens(rng, int(rng.integers(64, 256)))
        requests.append(Request(prompt, output, last))
        if turns > 1:
            sessions.append((np.concatenate([prompt, output]), len(requests) - 1, turns - 1))
    return Stream(requests, 80_000 // block_size, 16)


def mixed(block_size: int, quick: bool) -> Stream:
    """Lengths from 1 k to 128 k, evenly on a logarithmic scale; they begin like one of a dozen documents."""
    rng = np.random.default_rng(2)
    documents = [_tokens(rng, 131_072) for _ in range(12)]
    requests = []
    for _ in range(20 if quick else 150):
        length = int(1024 * 128 ** rng.random())
        document = documents[min(int(rng.exponential(2.5)), 11)]
        shared = int(length * rng.uniform(0.5, 1.0))
        prompt = np.concatenate([document[:shared], _tokens(rng, length - shared)])
        requests.append(Request(prompt, _tokens(rng, int(rng.integers(64, 256))), -1))
    return Stream(requests, 1_000_000 // block_size, 4)


def agentic(block_size: int, quick: bool) -> Stream:
    """Agents whose paths grow from 1,000 to 1,500 blocks on one set of instructions; their turns overlap.

    Every third turn also asks a side question on the same path, which runs beside the turns that follow. Turns do not
    end with blocks, so paths are cut in many places.
    """
    rng = np.random.default_rng(3)
    instructions = _tokens(rng, 300 * block_size)
    requests: list[Request] = []
    agents: list[tuple[Tokens, int, int]] = []  # its path, its last request, turns made
    while len(requests) < (24 if quick else 240):
        if len(agents) < 4:
            agents.append((np.concatenate([instructions, _tokens(rng, 700 * block_size)]), -1, 0))
        path, last, turns = agents.pop(0)
        prompt = np.concatenate([path, _tokens(rng, int(rng.integers(4, 20) * block_size + rng.integers(block_size)))])
        output = _tokens(rng, int(rng.integers(1, 6) * block_size + rng.integers(block_size)))
        requests.append(Request(prompt, output, last))
        turn = len(requests) - 1
        if turns % 3 == 2:
            side = np.concatenate([prompt, _tokens(rng, int(rng.integers(2, 10)) * block_size)])
            requests.append(Request(side, _tokens(rng, 2 * block_size), last))
        path = np.concatenate([prompt, output])
        if len(path) < 1500 * block_size:
            agents.append((path, turn, turns + 1))
    return Stream(requests, 12_000, 6)


def one_shot(block_size: int, quick: bool) -> Stream:
    """Prompts of 1,250 blocks, the mean of the agentic ones, that share nothing."""
    rng = np.random.default_rng(4)
    requests = []
    for _ in range(20 if quick else 160):
        prompt = _tokens(rng, 1250 * block_size + int(rng.integers(block_size)))
        requests.append(Request(prompt, _tokens(rng, int(rng.integers(1, 6) * block_size)), -1))
    return Stream(requests, 12_000, 6)


def long(block_size: int, quick: bool) -> Stream:
    """Every prompt of 128 k tokens, half of it one of four documents."""
    rng = np.random.default_rng(5)
    documents = [_tokens(rng, 65_536) for _ in range(4)]
    requests = []
    for number in range(6 if quick else 40):
        prompt = np.concatenate([documents[number % 4], _tokens(rng, 65_536)])
        requests.append(Request(prompt, _tokens(rng, 128), -1))
    return Stream(requests, 1_000_000 // block_size, 2)


STREAMS: dict[str, Callable[[int, bool], Stream]] = {
    "chat": chat,
    "mixed": mixed,
    "agentic": agentic,
    "one-shot": one_shot,
    "128 k": long,
}


def _tokens(rng: np.random.Generator, count: int) -> Tokens:
    return rng.integers(0, _VOCABULARY, count, np.int32)
