"""The transfer worker's loop body, step by step in this process: what it copies, and when it may answer."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from ipc import LogReader, LogWriter
from ipc.ownership import remove_objects
from statemachine.events import Direction, EpochStarted, Event, Outcome, TransferFinished, TransferStarted, WorkerJoined
from statemachine.records import codec
from tests.waiting import PATIENCE_S
from workers.pools.backends import create_pools
from workers.pools.interface import Ended
from workers.pools.layout import PoolLayout
from workers.pools.numpy import NumpyPools
from workers.processes.acknowledgements import Acknowledgement, EpochSeen, Status, answer_of, log_name
from workers.transfer import TransferWorker

LAYOUT = PoolLayout(ranks=1, layers=2, block_bytes=16, device_blocks=4, host_blocks=4)


class Engine:
    """The engine's side of one worker: its log, its pools, and what it hears."""

    def __init__(self, name: str) -> None:
        self.log = LogWriter.create(name, schema_hash=codec.SCHEMA_HASH, segment_bytes=64 << 10)
        (pools,) = create_pools(name, LAYOUT)
        assert isinstance(pools, NumpyPools)
        self.pools = pools
        self.pools.device[:] = np.arange(4, dtype=np.uint8)[None, :, None] + 1
        self.worker = TransferWorker(name, 0, 1, 1, LAYOUT, 1)
        self._answers = LogReader(log_name(name, 0, 1))

    def order(self, *events: Event) -> None:
        for event in events:
            self.log.append([codec.encode(event)])

    def answers(self) -> list[Acknowledgement | EpochSeen]:
        self.worker.step()
        return [answer_of(record) for record in self._answers.poll()]

    def close(self) -> None:
        self._answers.close()
        self.worker.close()
        self.log.close(unlink=True)


@pytest.fixture
def engine() -> Iterator[Engine]:
    name = f"step-{os.getpid()}"
    engine = Engine(name)
    yield engine
    engine.close()
    remove_objects(name)


def swap_out(transfer: int, source: int, target: int) -> TransferStarted:
    none, zero = array("Q"), array("I")
    ids = array("i", [source]), array("i", [target])
    return TransferStarted(transfer, Direction.SWAP_OUT, 0, 0, array("Q", [1]), array("I", [1]), none, zero, *ids)


JOINED = WorkerJoined(0, 1, 1)


def test_it_copies_once_it_has_joined(engine: Engine) -> None:
    engine.order(swap_out(1, 2, 0))
    assert engine.answers() == [] and not engine.pools.host.any()
    engine.order(JOINED)
    assert engine.answers() == [Acknowledgement(0, 1, 1, Status.OK, "")]
    assert (engine.pools.host[0] == 3).all() and not engine.pools.host[1:].any()


def test_what_had_ended_before_it_joined_is_not_copied(engine: Engine) -> None:
    """Its blocks are somebody else's by now."""
    engine.order(swap_out(1, 2, 0), TransferFinished(1, Outcome.FAILED, 0, 0), swap_out(2, 3, 1), JOINED)
    assert engine.answers() == [Acknowledgement(0, 2, 1, Status.OK, "")]
    assert not engine.pools.host[0].any() and (engine.pools.host[1] == 4).all()


class Slow:
    """Copies that end when they are asked about for the third time, as those of a GPU do."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.asked = 0

    def start(self, transfer: TransferStarted) -> None:
        self.started.append(transfer.transfer)

    def ended(self) -> list[Ended]:
        self.asked += 1
        if self.asked < 3:
            return []
        started, self.started = self.started, []
        return [Ended(transfer, 1) for transfer in started]

    def busy(self) -> bool:
        return bool(self.started)

    def close(self) -> None:
        pass


def test_an_epoch_is_acknowledged_after_all_that_was_ordered_before_it(engine: Engine) -> None:
    engine.worker.copies = Slow()
    engine.order(JOINED, swap_out(1, 2, 0), EpochStarted(2, 2))
    assert engine.answers() == [Acknowledgement(0, 1, 1, Status.OK, ""), EpochSeen(0, 2)]


def test_a_worker_that_no_engine_knows_leaves(engine: Engine) -> None:
    engine.order(swap_out(1, 2, 0), EpochStarted(2, 1), JOINED)
    assert engine.answers() == [] and engine.worker.superseded and not engine.pools.host.any()


def test_a_worker_that_was_tidied_away_before_it_began_leaves_quietly() -> None:
    """Its engine had died, and the next one has removed the signals that were meant for it."""
    command = [sys.executable, "-m", "workers.transfer", f"step-{os.getpid()}", "0", "1", "1", "1", ""]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
