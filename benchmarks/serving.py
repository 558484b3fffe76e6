"""A scheduler as FastDeploy has it, over the drop-in, serves a whole trace with real workers; every byte is verified.

``python -m benchmarks.serving [TRACE]`` (default: the sample): chunked prefill, continuous batching, preemption. After
each step every block table of every running request is read through and compared, on all ranks and layers. Then the
ledger's log is replayed, and ``kvledger run`` serves the same requests with the same capacities.

A request decodes until its slot, or its blocks, are wanted by a later one, as those of ``kvledger run``: at most
``--running`` are held, and they end in the order of their arrival.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ipc import LogReader
from kvledger import OutOfBlocks
from kvledger.adapters.fastdeploy import PrefixCacheManager
from kvledger.run import sample, traces
from kvledger.run.pattern import PatternEngine, Seeds, WrongBytes, chain
from kvledger.run.run import Run, RunOptions, Summary
from kvledger.run.traces import Trace, TraceRequest
from statemachine.check import check
from statemachine.content import words_of
from statemachine.events import HostPolicy
from statemachine.records.replay import replay
from statemachine.records.snapshot import state_digest

_WAITING = 4
"""So many requests are known ahead of the one that is admitted next."""


class Running:
    """A request that is being served."""

    def __init__(self, entry: TraceRequest, size: int) -> None:
        inputs = {
            "mm_positions": [SimpleNamespace(offset=item.offset, length=item.length) for item in entry.items],
            "mm_hashes": [item.hash.hex() for item in entry.items],
        }
        self.entry = entry
        self.task = SimpleNamespace(
            request_id=str(entry.number),
            prompt_token_ids=entry.tokens,
            output_token_ids=[],
            block_tables=[],
            multimodal_inputs=inputs,
        )
        words = bytes(words_of(entry.tokens, items=entry.items)) + entry.output.tobytes()
        self.seeds: Seeds = chain(memoryview(words), 4 * size, b"")
        self.total = len(entry.tokens) + len(entry.output)
        self.computed = 0
        self.scheduled = 0


class Scheduler:
    """Steps over waiting and running requests, the way ``ResourceManagerV1`` does it.

    Args:
        it: the drop-in, launched.
        budget: so many tokens are computed in one step at most, by all requests together.
        most: so many requests run at once.
        hold: whether a request whose tokens are all computed goes on decoding until its slot or blocks are wanted.
    """

    def __init__(self, it: Any, budget: int, most: int, hold: bool = False) -> None:
        self.it = it
        self.size: int = it.cache_config.block_size
        self.engine = PatternEngine(it.manager.pools)
        self.budget = self._left = budget
        self.most = most
        self.hold = hold
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.served = self.steps = self.preempted = self.blocks = self.hits = self.host_hits = 0

    def step(self) -> None:
        """Schedule, compute, attend."""
        self.steps += 1
        self._left = self.budget
        for run in list(self.running):
            while run in self.running and not self._schedule(run):
                if not self._end_oldest():
                    self._preempt(self.running[-1])
        while self.waiting and self._left:
            if len(self.running) >= self.most and not self._end_oldest():
                break
            if self._admit(self.waiting[0]):
                self.running.append(self.waiting.popleft())
            elif not self._end_oldest():
                assert self.running, "a request does not fit into the empty pool"
                break
        for run in self.running:  # the step itself: everything is computed, then attended to
            first, stop = run.computed // self.size, run.scheduled // self.size
            if stop > first:
                self.engine.write(np.array(run.task.block_tables[first:stop], np.int32), run.seeds[first:stop])
            run.computed = run.scheduled
        self._attend()
        if not self.hold:
            while self._end_oldest():
                pass

    def _attend(self) -> None:
        parts = [(run, np.array(run.task.block_tables, np.int32)[: run.computed // self.size]) for run in self.running]
        if not parts:
            return
        tables = np.concatenate([table for _, table in parts])
        seeds = np.concatenate([run.seeds[: len(table)] for run, table in parts])
        try:
            self.engine.verify("batch", tables, seeds, 0)
        except WrongBytes:
            for run, table in parts:  # whose
                self.engine.verify(run.task.request_id, table, run.seeds[: len(table)], self.it.manager.next_sequence)
            raise

    def _admit(self, run: Running) -> bool:
        try:
            common, tokens, hit = self.it.request_match_blocks(run.task, self.size)
        except OutOfBlocks:
            return False
        run.task.block_tables = list(common)
        run.computed = run.scheduled = tokens
        if not self._schedule(run):
            self._give_up(run)
            return False
        self.blocks += len(run.entry.tokens) // self.size
        self.hits += hit["gpu_cache_blocks"]
        self.host_hits += hit["cpu_cache_blocks"]
        return True

    def _schedule(self, run: Running) -> bool:
        """The next chunk: of the prompt, then the generated tokens."""
        prompt = len(run.entry.tokens)
        after = min(run.computed + self._left, prompt if run.computed < prompt else run.total)
        if after == run.computed and run.computed:
            return True
        missing = self.it.get_required_block_num(after, self.size) - len(run.task.block_tables)
        if missing > 0:
            if not self.it.can_allocate_gpu_blocks(missing):
                return False
            run.task.block_tables += self.it.allocate_gpu_blocks(missing)
        if after > prompt:
            run.task.output_token_ids = run.entry.output[: after - prompt].tolist()
        self.it.update_cache_blocks(run.task, self.size, after)  # before the step has run
        self._left -= after - run.computed
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

    def _end_oldest(self) -> bool:
        """End the first request that is all computed; false if there is none."""
        for run in self.running:
            if run.computed == run.total:
                self.running.remove(run)
                self.it.release_block_ids(run.task)
                self.it.recycle_gpu_blocks(run.task.block_tables[run.task.cached_block_num :])
                self.served += 1
                return True
        return False


def serve_all(scheduler: Scheduler, requests: Iterable[TraceRequest], every_step: Callable[[], None]) -> None:
    """Serve all of them; then no block is lost, no recycle was wrong, and the replayed log gives the same state."""
    it = scheduler.it
    coming = deque(requests)
    while coming or scheduler.waiting or len(scheduler.running):
        while coming and len(scheduler.waiting) < _WAITING:
            scheduler.waiting.append(Running(coming.popleft(), scheduler.size))
        scheduler.hold &= bool(coming or scheduler.waiting)
        scheduler.step()
        every_step()
    assert not it.req_leaf_map and it.dropped_recycles == 0 and not check(it.manager.state)
    in_flight = sum(len(transfer.held_in(0)) for transfer in it.manager.state.transfers.values())
    assert it.manager.available_blocks() + in_flight == it.num_gpu_blocks
    reader = LogReader(it.ledger)
    replayed = replay(reader, check_every=5_000)
    reader.close()
    assert state_digest(replayed.state) == it.manager.digest()


def beside(trace: Trace, options: argparse.Namespace) -> Summary:
    """The same requests through ``CacheManager``, as ``kvledger run`` serves them."""
    run = Run(
        trace,
        RunOptions(
            device_blocks=options.gpu_blocks,
            host_blocks=options.cpu_blocks,
            host_policy=HostPolicy.EXCLUSIVE,
            ranks=options.ranks,
            layers=options.layers,
            block_bytes=options.block_bytes,
            in_flight=options.running,
        ),
    )
    return run.execute(f"serving-run-{os.getpid()}")


def main(arguments: list[str] | None = None) -> tuple[Scheduler, Summary]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="default: the sample, 400 requests")
    parser.add_argument("--gpu-blocks", type=int, default=5000)
    parser.add_argument("--cpu-blocks", type=int, default=25000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--block-bytes", type=int, default=1024)
    parser.add_argument("--step-blocks", type=int, default=16, help="blocks that are computed per step")
    parser.add_argument("--running", type=int, default=64, help="requests that run at once")
    options = parser.parse_args(arguments)
    trace = traces.load(options.trace) if options.trace else sample.generate(400)
    # the original knows no adapters and salts, and no hint that nobody will continue a request
    wanted = [request._replace(final=False) for request in trace.requests if not request.namespace]
    trace = trace._replace(requests=wanted)
    size = trace.block_size or 16
    cache = SimpleNamespace(
        total_block_num=options.gpu_blocks,
        num_cpu_blocks=options.cpu_blocks,
        block_size=size,
        bytes_per_layer_per_block=options.block_bytes,
        model_cfg=SimpleNamespace(num_hidden_layers=options.layers),
        kv_backend="numpy",
    )
    ranks = options.ranks
    with PrefixCacheManager(SimpleNamespace(cache_config=cache), ranks) as it:
        it.launch_cache_manager(cache, ranks, [*range(ranks)], "127.0.0.1", f"serving-{os.getpid()}", "", True)
        scheduler = Scheduler(it, options.step_blocks * size, options.running, hold=True)
        begun = time.perf_counter()
        serve_all(scheduler, trace.requests, lambda: None)
        seconds = time.perf_counter() - begun
        stats = it.manager.stats()
    other = beside(trace, options)
    print(f"{trace.name}: {scheduler.served:,} requests in {scheduler.steps:,} steps, {scheduler.blocks:,} blocks")
    print(f"{'':24} {'drop-in':>14} {'kvledger run':>14}")
    for name, here, there in (
        ("blocks hit on device", scheduler.hits, other.device_hit_blocks),
        ("blocks hit on host", scheduler.host_hits, other.host_hit_blocks),
        ("blocks swapped out", stats["swapped_out_blocks"], other.stats["swapped_out_blocks"]),
        ("blocks swapped in", stats["swapped_in_blocks"], other.stats["swapped_in_blocks"]),
        ("host blocks evicted", stats["host_evicted_blocks"], other.stats["host_evicted_blocks"]),
        ("requests preempted", scheduler.preempted, other.early_releases),
        ("bytes verified", scheduler.engine.verified_bytes, other.verified_bytes),
        ("events", stats["events"], other.events),
    ):
        print(f"{name:24} {here:14,} {there:14,}")
    print(f"{'seconds':24} {seconds:14.1f} {other.seconds:14.1f}")
    return scheduler, other


if __name__ == "__main__":
    main()
