"""A small engine on the real state machine: chat traffic on two tiers, recorded as a ``.kvlog`` file.

Everything is deterministic, the clock included: the same incident gives the same file, byte for byte.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from ipc import KvlogWriter, Record
from ipc.record import TXN_BEGIN, TXN_END
from statemachine import decide
from statemachine.apply import apply, genesis
from statemachine.commands import Admit, Cache, Command, FinishTransfer, Release
from statemachine.errors import OutOfBlocks
from statemachine.events import AllocationRefused, Event, HostPolicy, LedgerOpened, Outcome, ReleaseReason
from statemachine.records import codec

BLOCK = 4
"""Tokens per block."""
_BEGUN_NS = 1_767_265_200 * 10**9
"""2026-01-01 11:00 UTC."""
_STEP_NS = 25_000_000


class Engine:
    """Decides, applies and records, as :class:`kvledger.CacheManager` does."""

    def __init__(
        self,
        path: Path,
        device: int,
        host: int,
        staging: int,
        policy: HostPolicy,
        backup_after: int = 1,
        chunked_multimodal: bool = True,
        groups: str = "",
    ) -> None:
        opened = LedgerOpened(
            BLOCK, device, host, staging, policy, 1, "", "", backup_after, chunked_multimodal, "", groups
        )
        self.name = path.stem
        self._writer = KvlogWriter(path, schema_hash=codec.SCHEMA_HASH)
        self.state = genesis(opened)
        self.sequence = 0
        self.step = 0
        self.now = _BEGUN_NS
        self.watch: Callable[[Event], bool] | None = None
        """Set by a planted bug: which event is the guilty one."""
        self.guilty = 0
        """Its number, once it is written."""
        self._write([opened])

    @property
    def next_sequence(self) -> int:
        """Number of the next event."""
        return self.sequence + 1

    def next_step(self) -> None:
        """Begin the next step of the scheduler."""
        self.step += 1
        self.now = _BEGUN_NS + self.step * _STEP_NS

    def do(self, command: Command) -> list[Event]:
        """Run one command. Raises :class:`OutOfBlocks` after recording the refusal."""
        try:
            events = decide.decide(self.state, command)
        except OutOfBlocks as refused:
            self._write([refused.event])
            raise
        for event in events:
            apply(self.state, event)
        if events:
            self._write(events)
            if isinstance(events[-1], AllocationRefused):  # a sound state machine raises instead
                raise OutOfBlocks(events[-1], 0)
        return events

    def _write(self, events: list[Event]) -> None:
        records = []
        for index, event in enumerate(events):
            self.sequence += 1
            if self.watch is not None and self.watch(event):
                self.guilty, self.watch = self.sequence, None
            flags = TXN_BEGIN * (not index) | TXN_END * (index == len(events) - 1)
            kind, subject, args, payload = codec.encode(event)
            args = args.ljust(codec.ARGS_BYTES, b"\0")
            records.append(Record(self.sequence, self.now, kind, flags, self.step, subject, args, payload))
        self._writer.write(records)
        self.now += 40_000

    def close(self) -> None:
        """End the recording."""
        self._writer.close()


class Chat:
    """Sessions of several turns on two shared system prompts; each turn sends the whole conversation again."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._prompts = [self._text(12), self._text(8)]
        self._sessions: list[list[int]] = []

    def _text(self, length: int) -> list[int]:
        return [self._rng.randrange(100, 1000) for _ in range(length)]

    def turns(self, count: int) -> Iterator[list[int]]:
        """The prompts of so many requests."""
        rng = self._rng
        for _ in range(count):
            if len(self._sessions) < 3 or rng.random() < 0.3:
                self._sessions.append([*rng.choice(self._prompts)])
                del self._sessions[:-6]
            session = rng.choice(self._sessions)
            session += self._text(rng.randrange(4, 13))
            yield list(session[:72])


def serve(engine: Engine, turns: Iterator[list[int]], in_flight: int = 4) -> None:
    """Serve requests as a scheduler would: at most so many at once, and copies that take two steps."""
    running: list[str] = []
    begun: dict[int, int] = {}
    for number, prompt in enumerate(turns, 1):
        engine.next_step()
        _finish(engine, begun, engine.step - 2)
        while len(running) >= in_flight:
            engine.do(Release(running.pop(0), ReleaseReason.FINISHED, False))
        key = f"chat-{number}"
        words = memoryview(array("i", prompt)).cast("B")
        attempt = 0
        while True:
            try:
                engine.do(Admit(key, words, b"", (len(prompt) - 1) // BLOCK, -(-len(prompt) // BLOCK)))
                break
            except OutOfBlocks:
                attempt += 1
                _finish(engine, begun, engine.step)
                if running:
                    engine.do(Release(running.pop(0), ReleaseReason.PREEMPTED, False))
                if key in engine.state.numbers:  # only a broken state machine knows a request that it has refused
                    key = f"chat-{number}-retry-{attempt}"
        for transfer in engine.state.transfers:
            begun.setdefault(transfer, engine.step)
        for id in sorted(engine.state.requests[engine.state.numbers[key]].waits_for):
            engine.do(FinishTransfer(id, Outcome.DONE, len(engine.state.transfers[id].targets)))
        engine.do(Cache(key, len(prompt) // BLOCK, b""))
        running.append(key)
    _finish(engine, begun, engine.step)
    for key in running:
        engine.do(Release(key, ReleaseReason.FINISHED, False))


def _finish(engine: Engine, begun: dict[int, int], step: int) -> None:
    """The copies that began up to a step have arrived on every rank."""
    for id, transfer in list(engine.state.transfers.items()):
        if begun.get(id, engine.step) <= step:
            engine.do(FinishTransfer(id, Outcome.DONE, len(transfer.targets)))
