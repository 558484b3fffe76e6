"""Who may still write, and what is written: tickets, claims and layer progress on weakly ordered memory, from seeds."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

from ipc import LedgerNotFound, LogWriter, writer
from ipc.ownership import remove_objects
from ipc.signals import Signals
from kvledger.testing.schedule import Schedule
from kvledger.testing.system import System, installed
from kvledger.testing.weak_memory import Order
from workers.handoff import shared_memory
from workers.handoff.progress import LayerProgress
from workers.handoff.pushes import PushStarted, log_name
from workers.handoff.shared_memory import MappedPool, SharedMemory
from workers.handoff.tickets import Tickets, claimed
from workers.handoff.transport import Refused
from workers.pools.backends import create_pools
from workers.pools.layout import KVTensor, PoolLayout
from workers.pools.memory import PoolMemory
from workers.pools.numpy import NumpyPools
from workers.processes.acknowledgements import signals_name
from workers.processes.presence import Presence

SEEDS = 60
ROUNDS = 8
TENSORS = (KVTensor("key", (16,), "uint8"), KVTensor("value", (16,), "uint8"))
LAYOUT = PoolLayout(ranks=1, layers=1, block_bytes=32, device_blocks=2, host_blocks=1, tensors=TENSORS)
DECODE, PREFILL = "decode", "prefill"
OURS, THEIRS = 1, 2


class LateWrite(AssertionError):
    """A pusher wrote into blocks that had been taken back."""


class EarlyRead(AssertionError):
    """A pusher sent what was not written yet."""


def take_back(seed: int, order: Order) -> int:
    """A decode instance takes blocks back while a pusher may be writing them, and uses them itself.

    Some pushers are killed, with or without a claim. Returns how often one had written before.
    """
    rng = random.Random(seed)
    schedule = Schedule(rng, order)
    orders: list[PushStarted] = []
    begun = ended = arrived = 0
    closed = False

    def decode() -> int:
        nonlocal arrived, closed
        log = LogWriter.create(DECODE, schema_hash=1, segment_bytes=8 << 10, retain_bytes=None)
        (pool,) = create_pools(DECODE, LAYOUT)
        board = Tickets(DECODE, create=True)
        block = NumpyPools(DECODE, 0, LAYOUT).pieces
        for number in range(ROUNDS):
            slot, ticket = board.issue() or (0, 0)
            push = PushStarted(number, 0, ticket, board.id, slot, "", DECODE, LAYOUT.text(), pool.id, *2 * [_ids(1)])
            schedule.current().buffer.fence()  # as the engines' own wire does
            orders.append(push)
            if rng.random() < 0.7:
                while begun < len(orders) and sender.alive:
                    schedule.sleep(1e-6)
                schedule.sleep(1e-6 * rng.randrange(40))
            board.revoke(slot)
            while claimed({ticket}):
                schedule.sleep(1e-6)
            log.append([(1, number, b"", b"")])  # that they are free: it fences
            arrived += any((piece[1] == THEIRS).all() for piece in block)
            for piece in block:
                piece[1] = OURS
            log.append([(1, number, b"", b"")])
            while ended < len(orders) and sender.alive:
                schedule.sleep(1e-6)
            log.append([(1, number, b"", b"")])
            if not all((piece[1] == OURS).all() for piece in block):
                raise LateWrite(f"round {number}: {[*block]}")
            board.free(slot)
        closed = True
        board.close(remove=True)
        log.close(unlink=True)
        remove_objects(DECODE)
        if not sender.alive:
            remove_objects(PREFILL)
        return 0

    def pusher() -> int:
        nonlocal begun, ended
        create_pools(PREFILL, LAYOUT)
        sources = NumpyPools(PREFILL, 0, LAYOUT)
        for piece in sources.pieces:
            piece[:] = THEIRS
        signals = Signals(signals_name(log_name(PREFILL), 0, 1), create=True)
        presence = Presence.announce(signals)
        assert presence is not None
        channel = SharedMemory(0, sources, signals)
        destination: MappedPool | None = None
        while not closed:
            if begun == len(orders):
                schedule.sleep(1e-6)
                continue
            push = orders[begun]
            schedule.current().buffer.fence()
            begun += 1
            try:
                destination = destination or channel.attach(push)
                destination.send(push, 0)
            except Refused:
                pass
            ended += 1
        if destination is not None:
            destination.close()
        signals.close(remove=True)
        presence.close()
        remove_objects(PREFILL)
        return 0

    copy = shared_memory._copy

    def slowly(*arguments: Any) -> None:
        schedule.sleep(1e-6 * rng.randrange(60))
        copy(*arguments)

    schedule.spawn(DECODE, decode)
    sender = schedule.spawn("pusher", pusher)
    if rng.random() < 0.3:
        sender.strike_at = rng.randrange(100, 600)
    with installed(System(schedule, {}), (writer, "LEAST_SEGMENT_BYTES", 8 << 10), (shared_memory, "_copy", slowly)):
        schedule.run()
    return arrived


def write_layers(seed: int, order: Order) -> None:
    """A rank writes layer after layer, and says so; a pusher reads what it was told is there."""
    rng = random.Random(seed)
    schedule = Schedule(rng, order)
    sent = 0
    ready = False

    def rank() -> int:
        nonlocal ready
        create_pools(PREFILL, LAYOUT)
        block = NumpyPools(PREFILL, 0, LAYOUT).pieces[0][1]
        word = LayerProgress(PREFILL, 0, create=True)
        schedule.current().buffer.fence()  # as starting the pusher does
        ready = True
        for step in range(1, ROUNDS + 1):
            block[:] = step
            word.wrote(step, 1)
            while sent < step:
                schedule.sleep(1e-6)
        word.close(remove=True)
        remove_objects(PREFILL)
        return 0

    def pusher() -> int:
        nonlocal sent
        while not ready:
            schedule.sleep(1e-6)
        block = NumpyPools(PREFILL, 0, LAYOUT).pieces[0][1]
        word = LayerProgress(PREFILL, 0)
        for step in range(1, ROUNDS + 1):
            while not word.reached(step, 1):
                schedule.sleep(1e-6 * rng.randrange(5))
            if not (block == step).all():
                raise EarlyRead(f"step {step}: {block}")
            sent = step
        word.close()
        return 0

    schedule.spawn("rank", rank)
    schedule.spawn("pusher", pusher)
    with installed(System(schedule, {})):
        schedule.run()


def make_pools(seed: int, order: Order) -> int:
    """A rank's process asks for its pools while its engine makes them. Returns how often it has asked."""
    schedule = Schedule(random.Random(seed), order)
    asked = 0
    found = False

    def engine() -> int:
        create_pools(PREFILL, LAYOUT)
        while not found:
            schedule.sleep(1e-6)
        remove_objects(PREFILL)
        return 0

    def rank() -> int:
        nonlocal asked, found
        while not found:
            asked += 1
            try:
                PoolMemory(PREFILL, 0, LAYOUT)
                found = True
            except LedgerNotFound:
                schedule.sleep(0.0)
        return 0

    schedule.spawn("engine", engine)
    schedule.spawn("rank", rank)
    with installed(System(schedule, {})):
        schedule.run()
    return asked


def _ids(block: int) -> array[int]:
    return array("i", [block])


@pytest.mark.parametrize("order", Order)
def test_blocks_that_were_taken_back_are_written_by_nobody(order: Order) -> None:
    arrived = sum(take_back(seed, order) for seed in range(SEEDS))
    assert SEEDS < arrived < SEEDS * (ROUNDS - 1), "both have to happen often: the pusher was in time, or it was not"


@pytest.mark.parametrize("order", Order)
def test_only_what_is_written_is_sent(order: Order) -> None:
    for seed in range(SEEDS):
        write_layers(seed, order)


@pytest.mark.parametrize("order", Order)
def test_a_pool_is_whole_or_not_there(order: Order) -> None:
    assert sum(make_pools(seed, order) for seed in range(5 * SEEDS)) > 8 * SEEDS
