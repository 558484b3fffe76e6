"""The scheduler of ``benchmarks.serving`` over the drop-in, with real workers: chunked prefill, decoding, preemption.

Every byte of every block table is verified after each step.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serving
from benchmarks.serving import Running, Scheduler, serve_all
from kvledger.run import sample, traces
from kvledger.run.pattern import WrongBytes
from kvledger.run.traces import TraceRequest
from tests.adapters.fastdeploy_engine import manager

TRACES = Path(os.environ.get("KVLEDGER_TRACES", Path(__file__).parents[3] / "shared" / "traces"))


def served(it: Any, requests: Sequence[TraceRequest], budget: int, most: int, kill_at: int = -1) -> Scheduler:
    scheduler = Scheduler(it, budget, most)

    def kill() -> None:
        if scheduler.steps == kill_at:
            os.kill(it.launched.workers(it.manager)[0].pid, signal.SIGKILL)

    serve_all(scheduler, requests, kill)
    assert scheduler.served == len(requests)
    return scheduler


@pytest.mark.parametrize("policy", ["write_back", "write_through", "write_through_selective"])
def test_the_sample(policy: str) -> None:
    requests = [entry for entry in sample.generate(100, seed=5).requests if not entry.namespace]
    with manager(210, 400, 2, block_size=16, write_policy=policy) as it:
        done = served(it, requests, budget=640, most=16, kill_at=40)
        stats = it.manager.stats()
        assert done.engine.verified_bytes > 3 * 10**6 and done.hits > 1000 and done.host_hits > 100
        assert stats["swapped_in_blocks"] > 0 and done.preempted > 0


@pytest.mark.skipif(not TRACES.is_dir(), reason="the Mooncake traces are not here")
def test_the_conversation_trace() -> None:
    requests = traces.load(TRACES / "conversation_trace.jsonl").requests[:1000]
    with manager(400, 2000, 2, block_size=4) as it:
        done = served(it, [entry for entry in requests if len(entry.tokens) <= 4 * 300], budget=256, most=16)
        assert done.hits > 500 and done.host_hits > 200 and done.engine.verified_bytes > 10**7


def test_the_command_hits_as_kvledger_run_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    # no answers in it, whose blocks the two would cache at different times
    path = tmp_path / "trace.jsonl"
    with open(path, "w") as file:
        for number, entry in enumerate(sample.generate(150, seed=3).requests):
            file.write(json.dumps({"timestamp": number, "tokens": entry.tokens.tolist()}) + "\n")
    sizes = ["--gpu-blocks", "300", "--cpu-blocks", "500", "--running", "4", "--layers", "2", "--block-bytes", "64"]
    done, other = serving.main([str(path), *sizes])
    assert done.served == other.requests == 150 and done.blocks == other.blocks
    assert (done.hits, done.host_hits) == (other.device_hit_blocks, other.host_hit_blocks)
    assert done.hits > 1000 and done.host_hits > 300 and other.stats["host_evicted_blocks"] > 300
    assert done.engine.verified_bytes > other.verified_bytes > 10**6
    assert f"{done.hits:,}" in capsys.readouterr().out


def test_a_wrong_byte_is_seen_and_its_request_named() -> None:
    requests = [entry for entry in sample.generate(20, seed=5).requests if not entry.namespace]
    with manager(320, 400, 2, block_size=16) as it:
        scheduler = Scheduler(it, 160, 8)
        scheduler.waiting.append(Running(requests[0], 16))
        scheduler.step()
        wrong = scheduler.running[0].task.block_tables[3]
        it.manager.pools[1].tensor(1, "kv").view(np.uint8)[wrong, 5] ^= 1
        with pytest.raises(
            WrongBytes, match=f"request {requests[0].number}: block {wrong}, position 3 .*rank 1, layer 1"
        ):
            scheduler.step()
