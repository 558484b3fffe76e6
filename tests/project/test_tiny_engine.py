"""The end-to-end proof: a real model's tokens are the same whatever the block manager does, if it does it right."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("paddle")

from examples.tiny_engine.__main__ import app
from examples.tiny_engine.engine import Completion, Engine
from examples.tiny_engine.model import Model, ModelConfig
from examples.tiny_engine.serve import Mode, Session, prompts, serve, session
from kvledger import BlockTable, CacheManager, HostPolicy
from kvledger.debugger import open_source
from kvledger.debugger.verify.engine import check_engine, read_marks
from statemachine.events import Direction
from workers.processes.acknowledgements import Acknowledgement, Status
from workers.processes.supervisor import Supervisor

NAME = f"tiny-{os.getpid()}"
WORK = prompts(ModelConfig().vocabulary, 18, seed=1)
SWAPPING = Mode(device_blocks=28, host_blocks=120, host_policy=HostPolicy.EXCLUSIVE, ranks=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(ModelConfig())


@pytest.fixture(scope="module")
def expected(model: Model) -> list[Completion]:
    """Served one by one, prompts in one piece, nothing cached, every block always there."""
    with session(model, Mode(caching=False, device_blocks=64, running=1, budget=512, chunk=512), NAME) as run:
        completions = serve(run, WORK)
        assert run.engine.smallest_gap > 1e-6, "greedy decoding would hang on rounding"
        assert run.engine.preemptions == run.engine.cached_tokens == 0
    assert len({tuple(completion.tokens) for completion in completions}) == len(completions)
    return completions


def difference(found: list[Completion], expected: list[Completion]) -> float:
    """Of the logits; infinite where a token differs."""
    if [completion.tokens for completion in found] != [completion.tokens for completion in expected]:
        return float("inf")
    scores = [np.array([completion.scores for completion in side]) for side in (found, expected)]
    return float(np.abs(scores[0] - scores[1]).max())


def many_small_chunks(run: Session) -> bool:
    return run.engine.cached_tokens == 0


def hits_without_eviction(run: Session) -> bool:
    return run.engine.cached_tokens > 400 and not run.manager.stats()["device_evicted_blocks"]


def evictions_and_preemptions(run: Session) -> bool:
    return run.manager.stats()["device_evicted_blocks"] > 50 and run.engine.preemptions > 0


def swaps(run: Session) -> bool:
    stats = run.manager.stats()
    return stats["swapped_out_blocks"] > 50 and stats["swapped_in_blocks"] > 0


def backups(run: Session) -> bool:
    stats = run.manager.stats()
    return stats["backed_up_blocks"] > 50 and stats["swapped_in_blocks"] > 0


THROUGH = replace(SWAPPING, host_policy=HostPolicy.WRITE_THROUGH)


@pytest.mark.parametrize(
    ("mode", "exercised"),
    [
        (Mode(caching=False, chunk=5, budget=17), many_small_chunks),
        (Mode(), hits_without_eviction),
        (Mode(chunk=7, budget=20, block_size=4, device_blocks=512), hits_without_eviction),
        (Mode(device_blocks=40), evictions_and_preemptions),
        (Mode(ranks=2), hits_without_eviction),
        (SWAPPING, swaps),
        (replace(SWAPPING, ranks=4), swaps),
        (THROUGH, backups),
        (Mode(drop_in=True, caching=False), many_small_chunks),
        (Mode(drop_in=True), hits_without_eviction),
        (Mode(drop_in=True, device_blocks=40), evictions_and_preemptions),
        (replace(SWAPPING, drop_in=True), swaps),
        (replace(THROUGH, drop_in=True), backups),
    ],
)
def test_the_tokens_are_the_same_in_every_mode(
    model: Model, expected: list[Completion], mode: Mode, exercised: Callable[[Session], bool]
) -> None:
    with session(model, mode, NAME) as run:
        found = serve(run, WORK)
        assert exercised(run), run.manager.stats()
        assert run.engine.smallest_gap > 1e-6
        assert run.manager.available_blocks() == mode.device_blocks
    assert difference(found, expected) < 1e-9


@pytest.mark.parametrize("mode", [SWAPPING, THROUGH, replace(SWAPPING, drop_in=True)])
def test_workers_killed_in_between(
    model: Model, expected: list[Completion], mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.step
    steps = 0

    with session(model, mode, NAME) as run:

        def step(self: Engine) -> int:
            nonlocal steps
            computed = real(self)
            steps += computed > 0
            if computed and steps % 20 == 10 and run.manager._ranks is not None:
                with suppress(KeyError):  # it is dead already
                    os.kill(run.manager._ranks.supervisor.pid(steps // 20 % 2), signal.SIGKILL)
            return computed

        monkeypatch.setattr(Engine, "step", step)
        found = serve(run, WORK)
        assert run.manager.state.workers[0] > 1 and run.manager.state.workers[1] > 1
        assert run.manager.stats()["swapped_in_blocks"] > 0
    assert difference(found, expected) < 1e-9


def test_swap_ins_that_fail_are_computed_again(
    model: Model, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Supervisor.acknowledgements
    failed = 0
    with session(model, SWAPPING, NAME) as run:

        def acknowledgements(self: Supervisor) -> Iterator[Acknowledgement]:
            nonlocal failed
            for answer in real(self):
                transfer = run.manager.state.transfers.get(answer.transfer)
                swap_in = transfer is not None and transfer.direction == Direction.SWAP_IN
                if swap_in and answer.transfer % 2 and answer.rank == 1:
                    failed += 1
                    answer = answer._replace(valid=answer.valid // 2, status=Status.FAILED)
                yield answer

        monkeypatch.setattr(Supervisor, "acknowledgements", acknowledgements)
        found = serve(run, WORK)
    assert failed > 0
    assert difference(found, expected) < 1e-9


def test_planted_permuted_block_table(
    model: Model, expected: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = CacheManager.block_table

    def block_table(self: CacheManager, request_id: str) -> BlockTable:
        table = real(self, request_id)
        if request_id == "7 again":
            assert self.cached_blocks(request_id) > 2
            table[[0, 1]] = table[[1, 0]]
        return table

    monkeypatch.setattr(CacheManager, "block_table", block_table)
    with session(model, Mode(), NAME) as run:
        found = serve(run, WORK)
    place = len(WORK.first) + 7
    assert difference(found[:place], expected[:place]) < 1e-9
    assert difference(found[place : place + 1], expected[place : place + 1]) == float("inf")


def test_planted_stale_block(model: Model, expected: list[Completion], monkeypatch: pytest.MonkeyPatch) -> None:
    """A swap-in that is reported but did not happen on one rank: the block holds what it held before."""
    real = CacheManager.poll
    with session(model, SWAPPING, NAME) as run:

        def poll(self: CacheManager) -> object:
            for node in self.state.nodes.values():
                if node.host is not None and node.host.ready:
                    self.pools[1].host[node.host.ids[0]] = self.pools[1].host[0].copy()
            return real(self)

        monkeypatch.setattr(CacheManager, "poll", poll)
        found = serve(run, WORK)
        assert swaps(run)
    assert difference(found, expected) == float("inf")


def test_requests_that_make_no_sense_are_refused(model: Model) -> None:
    with session(model, Mode(device_blocks=4), NAME) as run:
        for prompt, generate, text in (([], 1, "at least one token"), ([1], 0, "at least one more"), ([1], 40, "6 bl")):
            with pytest.raises(ValueError, match=text):
                run.engine.submit("a", prompt, generate)
        run.engine.submit("b", [1, 2, 3], 2)
        assert len(run.engine.run()["b"].tokens) == 2


def test_command_line() -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["--requests", "6", "--device-blocks", "30"])
    assert done.exit_code == 0 and "identical" in done.output
    for arguments in (["--ranks", "3"], ["--device-blocks", "3"], ["--requests", "0"], ["--block-size", "-1"]):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 2 and "Traceback" not in done.output + done.stderr, done.output


def test_what_it_does_with_its_blocks_is_what_the_ledger_granted(
    model: Model, expected: list[Completion], tmp_path: Path
) -> None:
    marks = tmp_path / "tiny.marks"
    with session(model, Mode(device_blocks=40, marks=str(marks)), NAME) as run:
        assert difference(serve(run, WORK), expected) < 1e-3
        with open_source(NAME) as source:
            assert check_engine(source, read_marks(marks, NAME), source.last) == []
    assert {"computed", "read", "commit"} <= {mark.what for mark in read_marks(marks, NAME)}
