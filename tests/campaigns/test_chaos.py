"""Runs and campaigns in which processes are killed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ipc import KvlogReader
from kvledger.config import ConfigError
from kvledger.run.crashes import Crash
from statemachine.events import EpochStarted, ReleaseReason, RequestReleased, WorkerLost
from statemachine.records.replay import Replay, event_of
from statemachine.records.snapshot import state_digest
from tests.run.test_run import kvledger
from tests.waiting import PATIENCE_S

TIGHT = ["--device-blocks", "400", "--host-blocks", "800", "--in-flight", "4", "--layers", "2", "--block-bytes", "64"]


@pytest.mark.parametrize("policy", ["exclusive", "write-through"])
def test_a_run_goes_on_through_crashes_to_its_end(tmp_path: Path, policy: str) -> None:
    record = tmp_path / "run.kvlog"
    crashes = [
        option for crash in ("engine@60", "worker:1@200", "engine@500", "worker:0@501") for option in ("--crash", crash)
    ]
    done = kvledger("run", *TIGHT, *crashes, "--host-policy", policy, "--record", str(record), "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["requests"] == 400 and summary["digest"] == summary["replay_digest"]
    assert summary["verified_bytes"] > summary["written_bytes"] > 0 and summary["host_hit_blocks"] > 0
    killed = summary["crashes"]
    assert (killed["engine"], killed["workers"], killed["lost_events"], killed["not_reached"]) == (2, 2, 0, [])
    assert len(killed["recovery_ms"]) == 2
    reader = KvlogReader(record)  # one recording, across all of it
    run = Replay(check_every=100)
    events = {}
    while records := reader.poll():
        run.feed(records)
        events |= {each.sequence: event_of(each) for each in records}
    reader.close()
    assert reader.damage is None and state_digest(run.state).hex() == summary["digest"]
    epochs = [number for number, event in events.items() if isinstance(event, EpochStarted)]
    assert len(epochs) == 2 and all(epoch > crash for epoch, crash in zip(epochs, (60, 500), strict=True))
    assert epochs[0] <= 60 + 8, "the engine died where it was told to: at the end of that transaction"
    assert sum(isinstance(event, WorkerLost) for event in events.values()) == 2
    reasons = Counter(event.reason for event in events.values() if isinstance(event, RequestReleased))
    assert 0 < reasons[ReleaseReason.ENGINE_RESTARTED] <= 2 * 4
    # an engine that dies in the very event of a release has not said so to anybody: that request is served once more
    assert 400 <= reasons[ReleaseReason.FINISHED] <= 402


def test_chaos_by_seed() -> None:
    done = kvledger("run", *TIGHT, "--chaos", "2", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["requests"] == 400 and summary["digest"] == summary["replay_digest"]
    assert summary["crashes"]["engine"] + summary["crashes"]["workers"] > 0
    assert summary["crashes"]["lost_events"] == 0


def test_a_crash_that_never_comes_is_reported() -> None:
    done = kvledger("run", "--no-data", "--requests", "5", "--crash", "engine@1000000", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["crashes"]["not_reached"] == ["engine@1000000"]


def test_what_cannot_crash_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("nonsense")
    for arguments, text in (
        (["--crash", "engine"], "engine@EVENT"),
        (["--crash", "worker@3"], "worker:RANK@EVENT"),
        (["--crash", "worker:2@3"], "2 workers"),
        (["--crash", "worker:0@3", "--no-data"], "0 workers"),
        (["--crash", "engine@3", "--per-request", str(tmp_path / "rows")], "--per-request"),
        (["--crash", "engine@3", "--device-blocks", str(2**26), "--block-bytes", str(2**20)], "needs"),
        (["--crash", "engine@3", "--name", "a/b"], "a/b"),
        (["--crash", "engine@3", str(bad)], "not JSON"),
    ):
        done = kvledger("run", *arguments)
        assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr, (arguments, done)


@pytest.mark.parametrize("text", ["", "engine@", "engine@0", "engine@-1", "engine@1x", "worker:@1", "worker:1", "x@1"])
def test_malformed_crashes(text: str) -> None:
    with pytest.raises(ConfigError, match="engine@EVENT"):
        Crash.parse(text)


def test_crashes_read_as_they_are_written() -> None:
    for text in ("engine@7", "worker:12@9", "follower@100"):
        assert str(Crash.parse(text)) == text


def test_a_short_campaign() -> None:
    """``make chaos`` is the long one."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.chaos", "--kills", "45", "--seed", "5"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 double-owned, 0 wrong bytes" in done.stdout
