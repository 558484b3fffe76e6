"""A scheduler as FastDeploy has it, over the drop-in, with real workers: chunked prefill, decoding, preemption.

Every byte of every block table is verified after each step.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipc import LogReader
from kvledger import OutOfBlocks, sample, traces
from kvledger.pattern import PatternEngine, Seeds, chain
from kvledger.traces import TraceRequest
from statemachine.check import check
from statemachine.content import words_of
from statemachine.encoding import state_digest
from statemachine.replay import replay
from tests.fastdeploy_engine import manager, request

TRACES = Path(os.environ.get("KVLEDGER_TRACES", Path(__file__).parents[2] / "shared" / "traces"))


class Running:
    """A request that is being served."""

    def __init__(self, entry: TraceRequest, size: int) -> None:
        inputs = {
            "mm_positions": [SimpleNamespace(offset=item.offset, length=item.length) for item in entry.items],
            "mm_hashes": [item.hash.hex() for item in entry.items],
        }
        self.entry = entry
        self.task = request(str(entry.number), entry.tokens, multimodal_inputs=inputs)
        words = bytes(words_of(entry.tokens, items=entry.items)) + entry.output.tobytes()
        self.seeds: Seeds = chain(memoryview(words), 4 * size, b"")
        self.total = len(entry.tokens) + len(entry.output)
        self.computed = 0
        self.scheduled = 0


class Scheduler:
    """Steps over waiting and running requests, the way ``ResourceManagerV1`` does it."""

    def __init__(self, it: Any, chunk: int, most: int) -> None:
        self.it = it
        self.size: int = it.cache_config.block_size
        self.engine = PatternEngine(it.manager.pools)
        self.chunk = chunk
        self.most = most
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.preempted = self.hits = self.host_hits = 0

    def step(self) -> None:
        for run in list(self.running):
            while run in self.running and not self._schedule(run):
                self._preempt(self.running[-1])
        while self.waiting and len(self.running) < self.most and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        for run in self.running:  # the step itself: everything is computed, then attended to
            first, stop = run.computed // self.size, run.scheduled // self.size
            table = np.array(run.task.block_tables[first:stop], np.int32)
            self.engine.write(table, run.seeds[first:stop])
            run.computed = run.scheduled
        for run in self.running:
            stop = run.computed // self.size
            table = np.array(run.task.block_tables[:stop], np.int32)
            self.engine.verify(run.task.request_id, table, run.seeds[:stop], 0)
        for run in [run for run in self.running if run.computed == run.total]:
            self._free(run)

    def _admit(self, run: Running) -> bool:
        try:
            common, tokens, hit = self.it.request_match_blocks(run.task, self.size)
        except OutOfBlocks:
            assert self.running
            return False
        run.task.block_tables = list(common)
        run.computed = run.scheduled = tokens
        if not self._schedule(run):
            assert self.running
            self._give_up(run)
            return False
        self.hits += hit["gpu_cache_blocks"]
        self.host_hits += hit["cpu_cache_blocks"]
        return True

    def _schedule(self, run: Running) -> bool:
        """The next chunk: of the prompt, then the generated tokens."""
        prompt = len(run.entry.tokens)
        after = min(run.computed + self.chunk, prompt if run.computed < prompt else run.total)
        missing = self.it.get_required_block_num(after, self.size) - len(run.task.block_tables)
        if missing > 0:
            if not self.it.can_allocate_gpu_blocks(missing):
                return False
            run.task.block_tables += self.it.allocate_gpu_blocks(missing)
        if after > prompt:
            run.task.output_token_ids = run.entry.output[: after - prompt].tolist()
        self.it.update_cache_blocks(run.task, self.size, after)  # before the step has run
        run.scheduled = after
        return True

    def _preempt(self, run: Running) -> None:
        self.preempted += 1
        self._give_up(run)
        self.running.remove(run)
        self.waiting.appendleft(run)

    def _give_up(self, run: Running) -> None:
        self.it.release_block_ids(run.task)
        self.it.recycle_gpu_blocks(run.task.block_tables[run.task.cached_block_num :])
        run.task.block_tables = []
        run.task.output_token_ids = []
        run.computed = run.scheduled = 0

    def _free(self, run: Running) -> None:
        self.running.remove(run)
        self.it.release_block_ids(run.task)
        self.it.recycle_gpu_blocks(run.task.block_tables[run.task.cached_block_num :])


def serve_all(it: Any, requests: list[TraceRequest], chunk: int, most: int, kill_at: int = -1) -> Scheduler:
    scheduler = Scheduler(it, chunk, most)
    coming = deque(requests)
    steps = 0
    while coming or scheduler.waiting or scheduler.running:
        while coming and len(scheduler.waiting) < 4:
            scheduler.waiting.append(Running(coming.popleft(), scheduler.size))
        scheduler.step()
        steps += 1
        if steps == kill_at:
            os.kill(it.launched.workers(it.manager)[0].pid, signal.SIGKILL)
    assert not it.req_leaf_map and it.dropped_recycles == 0 and not check(it.manager.state)
    assert it.manager.available_blocks() + sum(len(t.held) for t in it.manager.state.transfers.values()) == (
        it.num_gpu_blocks
    )
    reader = LogReader(it.ledger)
    replayed = replay(reader, check_every=2_000)
    reader.close()
    assert state_digest(replayed.state) == it.manager.digest()
    return scheduler


@pytest.mark.parametrize("policy", ["write_back", "write_through", "write_through_selective"])
def test_the_sample(policy: str) -> None:
    requests = [entry for entry in sample.generate(100, seed=5).requests if not entry.namespace]
    with manager(320, 400, 2, block_size=16, write_policy=policy) as it:
        done = serve_all(it, requests, chunk=160, most=8, kill_at=40)
        stats = it.manager.stats()
        assert done.engine.verified_bytes > 5 * 10**6 and done.hits > 1000 and done.host_hits > 100
        assert stats["swapped_in_blocks"] > 0 and done.preempted > 0


@pytest.mark.skipif(not TRACES.is_dir(), reason="the Mooncake traces are not here")
def test_the_conversation_trace() -> None:
    requests = traces.load(TRACES / "conversation_trace.jsonl").requests[:1000]
    with manager(400, 2000, 2, block_size=4) as it:
        done = serve_all(it, [entry for entry in requests if len(entry.tokens) <= 4 * 300], chunk=64, most=16)
        assert done.hits > 500 and done.host_hits > 200 and done.engine.verified_bytes > 10**7
