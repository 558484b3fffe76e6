"""The generated sample: chat traffic with all that makes a prefix cache interesting.

Sessions of several turns on shared system prompts, branches (a turn asked again with another end), long documents that
several sessions ask about, and images. The same seed gives the same requests.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from kvledger.run.traces import Trace, TraceRequest
from statemachine.content import Item, namespace_key

VOCABULARY = 128_000
_IMAGE_TOKENS = 64
_IMAGE_PLACEHOLDER = 151_655
_LORA = "adapter-1"


class _Session:
    """A conversation: what has been said so far."""

    def __init__(self, rng: random.Random, tokens: list[int], lora: str) -> None:
        self.tokens = tokens
        self.items: list[Item] = []
        self.lora = lora
        self.turns = rng.choice((1, 2, 2, 3, 4, 6))


def _text(rng: random.Random, length: int) -> list[int]:
    # squared: low ids are frequent, as they are in real vocabularies
    return [int(rng.random() ** 2 * VOCABULARY) for _ in range(length)]


def _image(rng: random.Random) -> bytes:
    """Hash of a small real image, ``uint8[32, 32, 3]``."""
    pixels = np.frombuffer(rng.randbytes(32 * 32 * 3), np.uint8).reshape(32, 32, 3)
    return hashlib.sha256(pixels.tobytes()).digest()


def generate(requests: int = 400, seed: int = 0) -> Trace:
    """A trace of so many requests."""
    rng = random.Random(seed)
    prompts = [_text(rng, rng.randrange(100, 400)) for _ in range(4)]
    documents = [_text(rng, rng.randrange(1500, 3000)) for _ in range(3)]
    images = [_image(rng) for _ in range(6)]
    sessions: list[_Session] = []
    made: list[TraceRequest] = []
    now = 0.0
    while len(made) < requests:
        now += rng.expovariate(1 / 250)
        if not sessions or rng.random() < 0.35:
            tokens = [*rng.choice(prompts)]
            if rng.random() < 0.15:
                tokens += rng.choice(documents)
            sessions.append(_Session(rng, tokens, _LORA if rng.random() < 0.1 else ""))
        session = rng.choice(sessions[-24:])
        before = len(session.tokens)
        if rng.random() < 0.2:
            session.items.append(Item(rng.choice(images), len(session.tokens), _IMAGE_TOKENS))
            session.tokens += [_IMAGE_PLACEHOLDER] * _IMAGE_TOKENS
        session.tokens += _text(rng, rng.randrange(10, 120))
        output = _text(rng, rng.randrange(5, 150))
        session.turns -= 1
        final = session.turns <= 0
        made.append(
            TraceRequest(
                len(made),
                round(now, 3),
                np.array(session.tokens, np.int32),
                tuple(session.items),
                namespace_key(lora=session.lora),
                np.array(output, np.int32),
                len(output),
                final,
            )
        )
        if final:
            sessions.remove(session)
        elif rng.random() < 0.15:  # the user takes the last question back: the next turn branches off before it
            del session.tokens[before:]
            session.items = [item for item in session.items if item.offset < before]
        else:
            session.tokens += output
    return Trace(f"sample (seed {seed})", made, None, True)


def write(trace: Trace, path: Path) -> None:
    """Write a trace in the project's own format."""
    with open(path, "w") as file:
        for request in trace.requests:
            entry: dict[str, Any] = {
                "timestamp": request.timestamp_ms,
                "tokens": request.tokens.tolist(),
                "output": request.output.tolist(),
            }
            if request.items:
                entry["images"] = [{**item._asdict(), "hash": item.hash.hex()} for item in request.items]
            if request.namespace:
                entry["lora"] = _LORA
            if request.final:
                entry["final"] = True
            file.write(json.dumps(entry) + "\n")
