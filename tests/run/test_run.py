"""The main job with real worker processes: what it verifies, what it refuses, what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ipc import KvlogReader, LedgerError, LogReader, SharedMemoryFull
from kvledger import is_compiled
from kvledger.cli import app
from kvledger.manager.manager import CacheManager
from kvledger.manager.ranks import BlockTable
from kvledger.run import sample, traces
from kvledger.run.pattern import PatternEngine, WrongBytes
from kvledger.run.run import Run, RunOptions
from kvledger.run.traces import TraceError
from statemachine.events import HostPolicy, IntArray
from statemachine.records.replay import replay
from statemachine.records.snapshot import state_digest
from tests.waiting import PATIENCE_S, wait_until
from workers import Pools
from workers.pools import numpy as numpy_pools

TIGHT = RunOptions(device_blocks=400, host_blocks=800, layers=2, block_bytes=64, in_flight=4)


def kvledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvledger.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_thousands_of_swapped_blocks_through_real_workers(tmp_path: Path, policy: HostPolicy) -> None:
    record = tmp_path / "run.kvlog"
    options = RunOptions(**{**vars(TIGHT), "host_policy": policy, "record": record})
    summary = Run(sample.generate(300, seed=1), options).execute()
    assert summary.requests == 300 and summary.digest == summary.replay_digest
    assert sum(summary.moved_blocks.values()) > 2000 and summary.host_hit_blocks > 0
    assert summary.verified_bytes > summary.written_bytes > 0
    reader = KvlogReader(record)
    replayed = replay(reader, check_every=200)
    reader.close()
    assert state_digest(replayed.state).hex() == summary.digest and replayed.digests == 1


def test_planted_permuted_table(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CacheManager.block_table

    def permuted(self: CacheManager, key: str) -> BlockTable:
        table = real(self, key)
        if key == "20":
            table[[0, 1]] = table[[1, 0]]
        return table

    monkeypatch.setattr(CacheManager, "block_table", permuted)
    with pytest.raises(WrongBytes, match=r"request 20: block \d+, position \d+ .*after event \d+"):
        Run(sample.generate(60), TIGHT).execute()


def test_planted_eviction_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CacheManager.block_table
    stolen: list[int] = []

    def shared(self: CacheManager, key: str) -> BlockTable:
        table = real(self, key)
        if key == "30":
            stolen.append(int(table[-1]))
        if key == "31":  # as if a block of request 30, which still runs, had been handed out again
            self.pools[0].device[:, stolen[0]] = 7
            self.pools[1].device[:, stolen[0]] = 7
        return table

    monkeypatch.setattr(CacheManager, "block_table", shared)
    trace = sample.generate(60)
    long = [r._replace(tokens=np.resize(r.tokens, 64), items=(), output=np.ones(16, np.int32)) for r in trace.requests]
    with pytest.raises(WrongBytes, match=r"request 3[01]"):
        Run(trace._replace(requests=long), TIGHT).execute()


def test_planted_wrong_swap() -> None:
    """A worker that copies to the wrong place: here the host block changes between its two copies."""
    run = Run(sample.generate(300, seed=1), TIGHT)
    real = CacheManager.poll

    def poll(self: CacheManager) -> object:
        for node in self.state.nodes.values():
            if node.host is not None and node.host.ready:
                self.pools[0].host[node.host.ids[0]] ^= 1
        return real(self)

    CacheManager.poll = poll  # type: ignore[method-assign,assignment]
    try:
        with pytest.raises(WrongBytes, match="rank 0"):
            run.execute()
    finally:
        CacheManager.poll = real  # type: ignore[method-assign]


def test_planted_stale_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that does not wait: its workers stand still while it reads what they should bring."""
    real_admit, real_close = CacheManager.admit, CacheManager.close

    def send(manager: CacheManager, number: signal.Signals) -> None:
        assert manager._ranks is not None
        for rank in range(2):
            os.kill(manager._ranks.supervisor.pid(rank), number)

    def hasty(self: CacheManager, key: str, tokens: object, **options: object) -> object:
        prompt = {name: options[name] for name in ("items", "namespace", "max_blocks")}
        if not self.peek(tokens, **prompt)[1]:  # type: ignore[arg-type]
            return real_admit(self, key, tokens, **options)  # type: ignore[arg-type]
        send(self, signal.SIGSTOP)
        return real_admit(self, key, tokens, **options)._replace(ready=True)  # type: ignore[arg-type]

    def close(self: CacheManager, *, keep: bool = False) -> None:
        send(self, signal.SIGCONT)
        real_close(self, keep=keep)

    monkeypatch.setattr(CacheManager, "admit", hasty)
    monkeypatch.setattr(CacheManager, "close", close)
    with pytest.raises(WrongBytes, match=r"request \d+: block \d+"):
        Run(sample.generate(300, seed=1), TIGHT).execute()


def test_a_failed_run_is_recorded_to_its_end_and_a_refused_one_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "run.kvlog"
    options = RunOptions(**{**vars(TIGHT), "record": record})
    too_large = {"device_blocks": 2**26, "block_bytes": 2**20}
    with pytest.raises(SharedMemoryFull):
        Run(sample.generate(20), RunOptions(**{**vars(options), **too_large})).execute()
    assert not record.exists()
    verify = PatternEngine.verify

    def failing(self: PatternEngine, request: str, *arguments: object) -> None:
        if request == "20":
            raise WrongBytes("planted")
        verify(self, request, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PatternEngine, "verify", failing)
    with pytest.raises(WrongBytes, match="planted"):
        Run(sample.generate(60), options).execute()
    reader = KvlogReader(record)
    state = replay(reader).state
    reader.close()
    assert "20" in state.numbers and reader.damage is None


MALFORMED = {
    '{"timestamp": 0, "hash_ids": [], "input_length": 1, "output_length": 1}': "at least one id",
    '{"timestamp": 0, "hash_ids": [1, 1], "input_length": 1, "output_length": 1}': "follows",
    '{"timestamp": 0, "hash_ids": [2147483647], "input_length": 1, "output_length": 1}': "whole number",
    '{"timestamp": 0, "hash_ids": ["1"], "input_length": 1, "output_length": 1}': "whole number",
    '{"timestamp": 0, "hash_ids": [true], "input_length": 1, "output_length": 1}': "whole number",
    '{"timestamp": "0", "hash_ids": [1], "input_length": 1, "output_length": 1}': "timestamp",
    '{"timestamp": 0, "hash_ids": [1], "input_length": 1}': "output_length",
    '{"timestamp": 9, "hash_ids": [1], "input_length": 1, "output_length": 1}\n'
    '{"timestamp": 8, "hash_ids": [1], "input_length": 1, "output_length": 1}': "line 2: timestamp 8 is before",
    '{"timestamp": 0, "hash_ids": [1, 2], "input_length": 1, "output_length": 1}\n'
    '{"timestamp": 0, "hash_ids": [3, 2], "input_length": 1, "output_length": 1}': "line 2: hash id 2 follows 3",
    "nonsense": "line 1: not JSON",
    "[]": "not a JSON object",
    "": "no request",
    '{"timestamp": 0, "tokens": [1, -1]}': "position 1",
    '{"timestamp": 0, "tokens": [1, 2.5]}': "token ids",
    '{"timestamp": 0, "tokens": []}': "at least one",
    '{"timestamp": 0, "tokens": [1], "images": [{"hash": "0", "offset": 0, "length": 1}]}': "hexadecimal",
    '{"timestamp": 0, "tokens": [1], "final": 1}': "final",
    '{"timestamp": 0, "tokens": [1], "extra": 1}': "unknown fields",
}


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_traces(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError) as error:
        traces.load(path)
    assert str(path) in str(error.value) and MALFORMED[text] in str(error.value)


def test_command_line_errors_are_clear_and_leave_nothing(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense")
    for arguments in (
        [str(bad)],
        [str(tmp_path / "missing")],
        ["--block-bytes", "12"],
        ["--device-blocks", "0"],
        ["--per-request", str(tmp_path / "no" / "folder")],
        ["--record", str(bad)],
        ["--device-blocks", str(2**31 - 1)],
        ["--name", "a/b"],
    ):
        done = kvledger("run", *arguments)
        assert done.returncode == 2, (arguments, done)
        assert done.stderr.strip() and "Traceback" not in done.stderr, (arguments, done.stderr)


def test_two_runs_of_one_seed_have_one_digest_without_data() -> None:
    """With data they differ, and the summary says why: pools have random ids."""
    told = [kvledger("run", "--no-data", "--requests", "60", "--json").stdout for _ in range(2)]
    assert len({json.loads(text)["digest"] for text in told}) == 1
    told = [kvledger("run", "--requests", "20").stdout, kvledger("run", "--no-data", "--requests", "20").stdout]
    assert ["random ids" in text for text in told] == [True, False] and "0.00 GB/s" not in told[0]


def test_requests_that_are_larger_than_the_pool_are_not_called_served() -> None:
    def row(told: str, name: str) -> str:
        return next(line.split("│")[2].strip() for line in told.splitlines() if line.startswith(f"│ {name}"))

    told = kvledger("run", "--no-data", "--device-blocks", "1", "--requests", "10").stdout
    assert row(told, "requests").startswith("10 (0 served, 10 bypassed) in ")
    assert row(told, "bypassed").startswith("10: larger than the device pool")
    told = kvledger("run", "--no-data", "--device-blocks", "300", "--requests", "60").stdout
    assert row(told, "requests").startswith("60 (all served) in ") and "bypassed" not in told
    early = row(told, "left the window early").split()[0]
    summary = json.loads(
        kvledger("run", "--no-data", "--device-blocks", "300", "--requests", "60", "--json").stdout,
    )
    assert (summary["bypassed"], summary["early_releases"]) == (0, int(early)) and summary["early_releases"] > 0
    told = " ".join(kvledger("run", "--help").stdout.replace("│", " ").split())
    assert "larger than the device pool bypasses the cache" in told and "requests in flight are ended early" in told
    assert "docs/traces.md" in told


def test_one_option_alone_decides_about_the_host_tier(tmp_path: Path) -> None:
    def host_tier(*arguments: str) -> tuple[int, str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.kvlog"
        done = kvledger("run", "--no-data", "--requests", "2", "--record", str(path), *arguments)
        assert done.returncode == 0, done.stderr
        reader = KvlogReader(path)
        state = replay(reader).state
        reader.close()
        return state.host.limit, state.policy.name

    assert host_tier() == (2048, "EXCLUSIVE")
    assert host_tier("--host-policy", "off") == host_tier("--host-blocks", "0") == (0, "OFF")
    assert host_tier("--host-policy", "off", "--host-blocks", "0") == (0, "OFF")
    assert host_tier("--host-policy", "write-through") == (2048, "WRITE_THROUGH")
    assert host_tier("--host-blocks", "99") == (99, "EXCLUSIVE")
    for policy, blocks in (("off", "20"), ("exclusive", "0"), ("write-through", "0")):
        done = kvledger("run", "--host-policy", policy, "--host-blocks", blocks)
        assert done.returncode == 2 and done.stderr.startswith("error --host-") and "leave one" in done.stderr


def test_files_that_cannot_be_written_are_refused_before_anything_starts(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")
    for option in ("--per-request", "--record"):
        for path, why in ((there, "exists: remove it"), (tmp_path / "no" / "x", f"there is no folder {tmp_path}/no")):
            name = f"refused-{os.getpid()}"
            done = kvledger("run", "--requests", "2", "--keep", "--name", name, option, str(path))
            assert done.returncode == 2 and done.stderr.startswith(f"error {option}: ") and why in done.stderr
            assert not list(Path("/dev/shm").glob(f"{name}*"))
    assert there.read_text() == "mine"
    done = kvledger("run", "--no-data", "--requests", "5", "--per-request", str(tmp_path / "hits"))
    assert done.returncode == 0 and len((tmp_path / "hits").read_text().splitlines()) == 5


def test_the_sample_is_reproducible_and_survives_its_file(tmp_path: Path) -> None:
    trace = sample.generate(80, seed=3)
    path = tmp_path / "sample.jsonl"
    sample.write(trace, path)
    loaded = traces.load(path)
    for ours, theirs in zip(trace.requests, loaded.requests, strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens) and ours.items == theirs.items
        assert (ours.namespace, ours.final, ours.timestamp_ms) == (theirs.namespace, theirs.final, theirs.timestamp_ms)
    assert any(request.items for request in trace.requests) and any(request.final for request in trace.requests)
    digests = {Run(t, RunOptions(data=False)).execute().digest for t in (trace, loaded, sample.generate(80, seed=3))}
    assert len(digests) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_cleanly(number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "kvledger.cli",
        "run",
        "--requests",
        "20000",
        "--json",
        "--name",
        f"i{os.getpid()}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def serves() -> bool:
        try:
            reader = LogReader(f"i{os.getpid()}")
        except LedgerError:
            return False
        count = len(reader.poll())
        reader.close()
        return count > 500

    wait_until("the run serves requests, or has ended", lambda: serves() or process.poll() is not None)
    assert process.poll() is None, "it was to be interrupted"
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    summary = json.loads(out)
    assert summary["interrupted"] and summary["digest"] == summary["replay_digest"]


def test_copies_of_consecutive_and_scattered_blocks(tmp_path: Path) -> None:
    from array import array

    from statemachine.events import Direction
    from workers import PoolLayout
    from workers.pools.backends import create_pools
    from workers.pools.memory import pool_names

    layout = PoolLayout(1, 3, 64, 32, 32)
    ledger = f"copies-{os.getpid()}"
    (pools,) = create_pools(ledger, layout)
    rng = np.random.default_rng(1)
    pools.device[:] = rng.integers(0, 256, pools.device.shape)
    wanted: Pools = pools
    sources: IntArray = array("i", [5, 6, 7, 3, 9, 2, 1, 30, 31])
    targets: IntArray = array("i", [0, 1, 2, 8, 9, 20, 19, 30, 31])
    assert numpy_pools.copy_blocks(wanted, Direction.SWAP_OUT, sources, targets) == 9
    for source, target in zip(sources, targets, strict=True):
        assert np.array_equal(pools.host[target], pools.device[:, source])
    before = pools.device[:, sources].copy()
    pools.device[:] = 0
    numpy_pools.copy_blocks(wanted, Direction.SWAP_IN, targets, sources)
    assert np.array_equal(pools.device[:, sources], before)
    from ipc.ownership import unlink

    for name in pool_names(ledger, 0):
        unlink(name)


def test_version_says_which_build_it_is() -> None:
    done = CliRunner().invoke(app, ["--version"])
    build = "compiled" if is_compiled() else "interpreted"
    assert done.exit_code == 0 and done.output == f"kvledger {metadata.version('kvledger')}, {build}\n"
