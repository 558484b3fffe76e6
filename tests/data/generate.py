"""Writes the corpus of logs that every later version must replay to the same digests.

``python -m tests.data.generate`` adds a folder for the event table of the code at hand, named by its hash: one log per
host policy with every kind of event, a ledger as it lies in shared memory, and ``digests.json``. Those of earlier
tables are never written again; where the encoding of a state has changed, their last state's digest in the new one
joins the older ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
from array import array
from pathlib import Path

from examples.garbled.engine import Engine
from kvledger.debugger import open_source
from statemachine import commands
from statemachine.content import Item, words_of
from statemachine.errors import CommandRejected
from statemachine.events import DigestScope, Direction, HostPolicy, Outcome, ReleaseReason, Tier
from statemachine.items import item_records
from statemachine.records.codec import SCHEMA_HASH
from statemachine.records.snapshot import MAGIC, state_digest
from tests.data import ledgers

FOLDER = Path(__file__).parent
STEPS = 320
GROUPS = "window near 12 9 0 9\nchunk part 13 8 0 0\nscratch ring 6 1 0 0\nstatic words 4 0 0 0"
"""Layer groups whose windows are small, and not of whole blocks."""


def drive(engine: Engine, rng: random.Random) -> None:
    """Requests, copies that fail and time out, refusals, resizes, clears, lost workers and tiers, digests."""
    _try(engine, commands.JoinWorker(0, 1, 4711))
    chunks(engine)
    for number in range(STEPS):
        engine.step += 1
        engine.now += 1_000_000
        _try(engine, _command(engine, rng, number))
        if engine.state.groups:
            _try(engine, settled(engine, rng))
            if engine.state.numbers and not number % 8:
                rejected_drafts(engine, rng.choice(sorted(engine.state.numbers)))
    for id, transfer in list(engine.state.transfers.items()):
        if transfer.quarantined:
            _try(engine, commands.EndQuarantine(id))
        _try(engine, commands.FinishTransfer(id, Outcome.DONE, len(transfer.targets)))
    for key in list(engine.state.numbers):
        _try(engine, commands.Release(key, ReleaseReason.ABORTED, False))
    _try(engine, commands.LoadWeights("step-1200"))
    _try(engine, commands.LoseWorker(0, "killed"))
    _try(engine, commands.LoseTier(Tier.HOST, "not the same memory", "new"))
    _try(engine, commands.Admit("last", memoryview(bytes(range(16))), b"", 99, 4))
    _try(engine, commands.Adopt("last", engine.state.device.pool.free[:1]))
    _try(engine, commands.Depart("last", "2 blocks of its prompt were cached there, 0 here"))
    _try(engine, commands.StartEpoch(2, engine.sequence))
    _try(engine, commands.TakeDigest(engine.sequence, DigestScope.STATE))


def rejected_drafts(engine: Engine, key: str) -> None:
    """A request gets a block for drafts, and gives it back."""
    table = engine.state.requests[engine.state.numbers[key]].table
    _try(engine, commands.Allocate([key], [1]))
    _try(engine, commands.Trim(key, len(table) - 1))


def settled(engine: Engine, rng: random.Random) -> commands.Settle:
    """One or two requests have settled what they have room for, or a little less."""
    keys = sorted(rng.sample(sorted(engine.state.numbers), min(len(engine.state.numbers), rng.randrange(1, 3))))
    size = engine.state.opened.block_size
    room = [len(engine.state.requests[engine.state.numbers[key]].table) * size for key in keys]
    return commands.Settle(keys, [max(tokens - rng.randrange(3) * size, 0) for tokens in room])


def chunks(engine: Engine) -> None:
    """Requests with one prompt: they go on along what others have cached meanwhile, or compute it once more."""
    prompt = memoryview(array("i", range(16))).cast("B")
    for command in (
        commands.Admit("first", prompt, b"", 3, 5),
        commands.Admit("second", prompt, b"", 3, 5),
        commands.Cache("first", 2, b"", 1),
        commands.Extend("second", 3),
        commands.Cache("second", 3, b""),
        commands.Cache("first", 2, b"", 2),
        commands.Reassign("first", "second", array("i")),
        commands.Release("first", ReleaseReason.FINISHED, False),
        commands.Release("second", ReleaseReason.FINISHED, False),
        commands.Admit("third", prompt, b"", 1, 4),
        commands.Admit("fourth", prompt, b"", 4, 4),
        commands.Cache("third", 4, b"", 3),
        commands.Release("fourth", ReleaseReason.FINISHED, False),
        commands.Release("third", ReleaseReason.FINISHED, False),
        commands.Admit("fifth", prompt, b"", 3, 4),
        commands.Cache("fifth", 4, b""),
        commands.Distrust("fifth", 2),
        commands.Release("fifth", ReleaseReason.FINISHED, False),
        commands.Clear(False),
    ):
        engine.step += 1
        if isinstance(command, commands.Reassign):
            command = command._replace(blocks=engine.state.requests[1].table[-1:])  # its last block
        _try(engine, command)


def _try(engine: Engine, command: commands.Command) -> None:
    with contextlib.suppress(CommandRejected):
        engine.do(command)


def _command(engine: Engine, rng: random.Random, number: int) -> commands.Command:
    state, kind = engine.state, rng.randrange(26)
    keys = list(state.numbers)
    if kind < 8 or not keys:
        prompt = [token for _ in range(rng.randrange(1, 7)) for token in rng.choice(([1, 2, 3, 4], [5, 6, 7, 8]))]
        items = [Item(rng.choice((b"image", b"other")), 5, rng.choice((1, 7)))] * rng.randrange(1 + (len(prompt) >= 12))
        words, watermark = words_of(prompt, items=items), rng.choice((0, 0, 3))
        namespace, blocks = rng.choice((b"", b"", b"salt")), len(prompt) // 4 + 1
        static = number % 3 if state.groups else 0
        return commands.Admit(
            f"r{number}", words, namespace, 99, blocks, item_records(items), watermark, static_tokens=static
        )
    key = rng.choice(keys)
    request = state.requests[state.numbers[key]]
    if kind < 9:
        content, at = [3, 4, 5, 6], 4 * (request.leaf.end + len(request.words) // 4 // 4)
        words = words_of(content, items=[Item(b"generated", 2, 1)]).tobytes()
        return commands.Cache(key, request.leaf.end, words, None, item_records([Item(b"generated", at + 2, 1)]))
    if kind < 12:
        blocks = min(len(request.table), request.leaf.end + len(request.words) // state.block_bytes)
        return commands.Cache(key, blocks, b"", max(blocks - 1, 0) if rng.random() < 0.3 else None)
    if kind < 15:
        return commands.Release(key, rng.choice(list(ReleaseReason)), rng.random() < 0.3)
    if kind < 19 and state.transfers:
        transfer = rng.choice(list(state.transfers.values()))
        if transfer.quarantined:
            return commands.EndQuarantine(transfer.id)
        outcome = Outcome.TIMED_OUT if transfer.id % 4 == 1 else rng.choice([*[Outcome.DONE] * 5, *Outcome])
        if outcome == Outcome.CORRUPT and transfer.direction != Direction.SWAP_IN:
            outcome = Outcome.FAILED
        total = len(transfer.targets)
        return commands.FinishTransfer(transfer.id, outcome, total if outcome == Outcome.DONE else rng.randrange(total))
    if kind < 21:
        return commands.Backup(request.leaf.id)
    return rng.choice(
        (
            commands.Allocate([key, rng.choice(keys)], [1, rng.choice((1, 30))]),
            commands.Trim(key, max(request.leaf.end, len(request.table) - 1)),
            commands.Reassign(key, rng.choice(keys), array("i", request.table[-1:])),
            commands.Extend(key, 99),
            commands.Extend(key, 99),
            commands.GiveBack(key, request.table[request.leaf.end :][:1]),
            commands.Distrust(key, rng.randrange(4)),
            commands.Evict(rng.choice(list(Tier)), 9, distrusted=True),
            commands.MakeRoom(2),
            commands.Forget(rng.choice(list(state.nodes) or [0])),
            commands.Evict(rng.choice(list(Tier)), 2),
            commands.Resize(Tier.DEVICE, rng.randrange(12, 17)),
            commands.Clear(True)
            if rng.random() < 0.3
            else commands.TakeDigest(engine.sequence, DigestScope(rng.random() < 0.5)),
        )
    )


def main() -> None:
    folder = FOLDER / f"{SCHEMA_HASH:016x}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    events = {}
    for policy in HostPolicy:
        path = folder / f"{policy.name.lower()}.kvlog"
        host = (0, 0) if policy == HostPolicy.OFF else (10, 5)
        engine = Engine(path, 14, *host, policy, backup_after=2, chunked_multimodal=policy == HostPolicy.OFF)
        drive(engine, random.Random(policy))
        engine.close()
        path.chmod(0o644)
        events[path.name] = {"events": engine.sequence, "digests": {}}
    path = folder / "groups.kvlog"
    engine = Engine(path, 14, 0, 0, HostPolicy.OFF, groups=GROUPS)
    drive(engine, random.Random(7))
    engine.close()
    path.chmod(0o644)
    events[path.name] = {"events": engine.sequence, "digests": {}}
    (folder / "digests.json").write_text(json.dumps(events))
    ledger(folder)
    for told in sorted(FOLDER.glob("*/digests.json")):
        _digest(told)


def ledger(folder: Path) -> None:
    """Pack a ledger of the present table, and note the digest of its state."""
    name = f"corpus-{os.getpid()}"
    digest = ledgers.written(name)
    ledgers.pack(name, folder / "ledger.zip")
    told = json.loads((folder / "digests.json").read_text())
    told["ledger.zip"] = {"digests": {MAGIC.decode(): digest}}
    (folder / "digests.json").write_text(json.dumps(told, indent=1) + "\n")


def _digest(file: Path) -> None:
    """Add the digests of the last states in the present encoding, where they are missing."""
    told = json.loads(file.read_text())
    for name, log in told.items():
        if name == "ledger.zip":
            laid_out = f"corpus-{os.getpid()}"
            ledgers.lay_out(file.parent / name, laid_out)
            with open_source(laid_out) as source:
                digest = state_digest(source.at(source.last)).hex()
            ledgers.remove(laid_out)
        else:
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(shutil.copy(file.parent / name, folder))
                with open_source(str(copy)) as source:
                    digest = state_digest(source.at(source.last)).hex()
        print(f"{file.parent.name}/{name}: {log['digests'].setdefault(MAGIC.decode(), digest)}")
    file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
