"""Mistakes of those who use the cache: the log is sound, and the answers are slow, wrong or another user's.

Each function serves traffic with one mistake in it; nothing of kvledger is changed. Each returns the number of the
event with which the mistake begins.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.garbled.engine import BLOCK, Engine
from statemachine.commands import Admit, Cache, Release
from statemachine.content import namespace_key
from statemachine.events import HostPolicy, ReleaseReason


class _Agents:
    """Agents that call a model again and again: one long system prompt, then what each of them has said so far."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.system = self.text(32)
        self._said: list[list[int]] = [[] for _ in range(4)]

    def text(self, length: int) -> list[int]:
        return [self._rng.randrange(100, 1000) for _ in range(length)]

    def calls(self, count: int) -> Iterator[tuple[int, list[int]]]:
        """The number of an agent and what it says, so many times."""
        for number in range(count):
            agent = number % len(self._said)
            self._said[agent] = (self._said[agent] + self.text(6))[-48:]
            yield agent, list(self._said[agent])


def _serve(engine: Engine, key: str, prompt: list[int], namespace: bytes = b"") -> None:
    """A request from its beginning to its end in one step."""
    engine.next_step()
    words = memoryview(array("i", prompt)).cast("B")
    engine.do(Admit(key, words, namespace, (len(prompt) - 1) // BLOCK, -(-len(prompt) // BLOCK)))
    engine.do(Cache(key, len(prompt) // BLOCK, b""))
    engine.do(Release(key, ReleaseReason.FINISHED, False))


def timestamp(engine: Engine) -> int:
    """From the 60th request on the system prompt holds the time of day, four tokens from its fifth on."""
    agents = _Agents(11)
    begun = 0
    for number, (_, said) in enumerate(agents.calls(120), 1):
        system = agents.system
        if number >= 60:
            begun = begun or engine.sequence + 1
            system = [*system[:5], 2026, 1, 1, number, *system[9:]]
        _serve(engine, f"call-{number}", system + said)
    return begun


def tenants(engine: Engine) -> int:
    """Two tenants take turns on a cache that has room for the working set of one of them."""
    rng = random.Random(13)
    prompts = {salt: [[rng.randrange(100, 1000) for _ in range(40)] for _ in range(3)] for salt in ("A", "B")}
    for number in range(1, 61):
        salt = "AB"[number // 3 % 2]
        _serve(engine, f"{salt}-{number}", prompts[salt][number % 3], namespace_key(salt=salt))
    return 1


MISTAKES: dict[str, tuple[Callable[[Engine], int], int]] = {
    "timestamp": (timestamp, 96),
    "tenants": (tenants, 40),
}
"""The mistakes, and how many device blocks their caches have."""


def record(name: str, path: Path) -> int:
    """Serve traffic with a mistake in it, and record that. Returns the event with which the mistake begins."""
    serve, device = MISTAKES[name]
    engine = Engine(path, device, 0, 0, HostPolicy.OFF)
    begun = serve(engine)
    engine.close()
    return begun
