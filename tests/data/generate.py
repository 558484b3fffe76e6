"""Writes the corpus of logs that every later version must replay to the same digests.

``python -m tests.data.generate`` adds a folder for the event table of the code at hand, named by its hash: one log per
host policy with every kind of event, and ``digests.json``. Folders of earlier tables are never written again.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from array import array
from pathlib import Path

from examples.garbled.engine import Engine
from statemachine import commands
from statemachine.codec import SCHEMA_HASH
from statemachine.encoding import state_digest
from statemachine.errors import CommandRejected
from statemachine.events import Direction, HostPolicy, Outcome, ReleaseReason, Tier

FOLDER = Path(__file__).parent
STEPS = 260


def drive(engine: Engine, rng: random.Random) -> None:
    """Requests, copies that fail and time out, refusals, resizes, clears, lost workers and tiers, digests."""
    _try(engine, commands.JoinWorker(0, 1, 4711))
    for number in range(STEPS):
        engine.step += 1
        engine.now += 1_000_000
        _try(engine, _command(engine, rng, number))
    for id, transfer in list(engine.state.transfers.items()):
        if transfer.quarantined:
            _try(engine, commands.EndQuarantine(id))
        _try(engine, commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets)))
    for key in list(engine.state.keys):
        _try(engine, commands.Release(key, ReleaseReason.ABORTED, False))
    _try(engine, commands.LoseWorker(0, "killed"))
    _try(engine, commands.LoseTier(Tier.HOST, "not the same memory", "new"))
    _try(engine, commands.Admit("last", memoryview(bytes(range(16))), b"", 99, 4))
    _try(engine, commands.StartEpoch(2, engine.sequence))
    _try(engine, commands.TakeDigest(engine.sequence, True))


def _try(engine: Engine, command: commands.Command) -> None:
    with contextlib.suppress(CommandRejected):
        engine.do(command)


def _command(engine: Engine, rng: random.Random, number: int) -> commands.Command:
    state, kind = engine.state, rng.randrange(24)
    keys = list(state.keys)
    if kind < 8 or not keys:
        prompt = [token for _ in range(rng.randrange(1, 7)) for token in rng.choice(([1, 2, 3, 4], [5, 6, 7, 8]))]
        words = memoryview(array("i", prompt)).cast("B")
        return commands.Admit(f"r{number}", words, rng.choice((b"", b"", b"salt")), 99, len(prompt) // 4 + 1)
    key = rng.choice(keys)
    request = state.requests[state.keys[key]]
    if kind < 12:
        blocks = min(len(request.table), request.leaf.end + len(request.words) // state.block_bytes)
        return commands.Cache(key, blocks, b"")
    if kind < 15:
        return commands.Release(key, rng.choice(list(ReleaseReason)), rng.random() < 0.3)
    if kind < 19 and state.transfers:
        transfer = rng.choice(list(state.transfers.values()))
        if transfer.quarantined:
            return commands.EndQuarantine(transfer.id)
        outcome = rng.choice([*[Outcome.DONE] * 5, *Outcome])
        if outcome == Outcome.CORRUPT and transfer.direction != Direction.SWAP_IN:
            outcome = Outcome.FAILED
        total = len(transfer.targets)
        return commands.FinishTransfer(transfer.id, outcome, total if outcome == Outcome.DONE else rng.randrange(total))
    return rng.choice(
        (
            commands.Allocate([key, rng.choice(keys)], [1, rng.choice((1, 30))]),
            commands.Trim(key, max(request.leaf.end, len(request.table) - 1)),
            commands.Reassign(key, rng.choice(keys), array("i", request.table[-1:])),
            commands.Evict(rng.choice(list(Tier)), 2),
            commands.Resize(Tier.DEVICE, rng.randrange(12, 17)),
            commands.Clear(True) if rng.random() < 0.3 else commands.TakeDigest(engine.sequence, rng.random() < 0.5),
        )
    )


def main() -> None:
    folder = FOLDER / f"{SCHEMA_HASH:016x}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    digests = {}
    for policy in HostPolicy:
        path = folder / f"{policy.name.lower()}.kvlog"
        host = (0, 0) if policy == HostPolicy.OFF else (10, 5)
        engine = Engine(path, 14, *host, policy)
        drive(engine, random.Random(policy))
        engine.close()
        path.chmod(0o644)
        digests[path.name] = {"events": engine.sequence, "digest": state_digest(engine.state).hex()}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")
    print(f"{folder.name}: {digests}")


if __name__ == "__main__":
    main()
