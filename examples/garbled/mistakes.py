"""Mistakes of those who use the cache: the log is sound, and the answers are slow, wrong or another user's.

Each function serves traffic with one mistake in it; nothing of kvledger is changed. Each returns the number of the
event with which the mistake begins.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from examples.garbled.engine import BLOCK, Engine
from kvledger import CacheManager, Marks
from statemachine.commands import Admit, Cache, Extend, FinishTransfer, Release
from statemachine.content import namespace_key
from statemachine.events import HostPolicy, Outcome, ReleaseReason


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


class _Computing:
    """The part of an engine that computes: it writes KV into the blocks of its own copy of each block table."""

    def __init__(self, engine: Engine, marks: Marks) -> None:
        self.engine = engine
        self.marks = marks
        self.tables: dict[str, list[int]] = {}
        self.written: dict[str, int] = {}

    def begin(self, key: str, prompt: list[int]) -> None:
        """Admit a request, and take its block table over."""
        self.engine.next_step()
        self.marks.step = self.engine.step
        words = memoryview(array("i", prompt)).cast("B")
        self.engine.do(Admit(key, words, b"", (len(prompt) - 1) // BLOCK, -(-len(prompt) // BLOCK)))
        request = self.engine.state.requests[self.engine.state.numbers[key]]
        self.tables[key] = list(request.table)
        self.written[key] = request.leaf.end * BLOCK

    def compute(self, key: str, stop: int) -> None:
        """Write the KV of the tokens up to ``stop``."""
        start = self.written[key]
        blocks = self.tables[key][start // BLOCK : -(-stop // BLOCK)]
        self.marks.computed(key, start, stop, blocks, row=list(self.tables).index(key))
        self.written[key] = stop

    def publish(self, key: str, blocks: int) -> None:
        """Let others find what is computed."""
        self.marks.called("cache", (key,), {})
        self.engine.do(Cache(key, blocks, b""))

    def release(self, key: str, reason: ReleaseReason = ReleaseReason.FINISHED) -> None:
        """End a request."""
        self.marks.called("release", (key,), {})
        self.engine.do(Release(key, reason, False))

    def whole(self, key: str, prompt: list[int]) -> None:
        """A request from its beginning to its end, without any mistake."""
        self.begin(key, prompt)
        for id in [*self.engine.state.transfers]:
            self.engine.do(FinishTransfer(id, Outcome.DONE, len(self.engine.state.transfers[id].targets)))
        self.compute(key, len(prompt))
        self.publish(key, len(prompt) // BLOCK)
        self.release(key)
        del self.tables[key]


def before_ready(computing: _Computing) -> int:
    """A request whose beginning is still being copied from the host is computed at once."""
    computing.whole("first", [*range(100, 141)])
    computing.whole("other", [*range(500, 561)])  # which pushes the first one out to the host
    computing.begin("again", [*range(100, 141)])
    computing.compute("again", 41)
    return computing.engine.sequence


def ahead(computing: _Computing) -> int:
    """A prompt is published before its step, and that step never comes: the client has gone."""
    computing.begin("gone", [*range(100, 141)])
    computing.compute("gone", 16)
    computing.publish("gone", 10)
    published = computing.engine.sequence
    computing.release("gone", ReleaseReason.ABORTED)
    computing.begin("served", [*range(100, 141)])
    computing.compute("served", 41)
    return published


def stale(computing: _Computing) -> int:
    """Between two chunks a request goes on with blocks that another has cached; the engine keeps its old table."""
    computing.begin("fast", [*range(100, 141)])
    computing.begin("slow", [*range(100, 149)])
    computing.compute("slow", 8)
    computing.compute("fast", 41)
    computing.publish("fast", 10)
    computing.engine.do(Extend("slow", 12))
    computing.written["slow"] = 40
    changed = computing.engine.sequence
    computing.marks.read("slow", computing.tables["slow"], row=1)
    return changed


def other_released(computing: _Computing) -> int:
    """The engine ends one request and releases another one, which goes on."""
    computing.begin("ended", [*range(100, 141)])
    computing.begin("running", [*range(300, 341)])
    computing.compute("ended", 41)
    computing.compute("running", 20)
    computing.release("running")
    released = computing.engine.sequence
    computing.compute("running", 41)
    return released


MISTAKES: dict[str, tuple[Callable[[Engine], int], int]] = {
    "timestamp": (timestamp, 96),
    "tenants": (tenants, 40),
}
"""Mistakes with what is asked of the cache, and how many device blocks it has."""

COMPUTING: dict[str, tuple[Callable[[_Computing], int], int]] = {
    "before_ready": (before_ready, 20),
    "ahead": (ahead, 0),
    "stale": (stale, 0),
    "other_released": (other_released, 0),
}
"""Mistakes with blocks, and how many host blocks the cache has. What was computed is noted beside the recording."""


def record(name: str, path: Path) -> int:
    """Serve traffic with a mistake in it, and record that. Returns the event with which the mistake begins."""
    if name in COMPUTING:
        compute, host = COMPUTING[name]
        engine = Engine(path, 24, host, host // 2, HostPolicy.EXCLUSIVE if host else HostPolicy.OFF)
        marks = path.with_suffix(".marks")
        marks.unlink(missing_ok=True)
        with Marks(cast(CacheManager, engine), marks) as marks_of_it:
            begun = compute(_Computing(engine, marks_of_it))
        engine.close()
        return begun
    serve, device = MISTAKES[name]
    engine = Engine(path, device, 0, 0, HostPolicy.OFF)
    begun = serve(engine)
    engine.close()
    return begun
