"""``kvledger misses``: every block that was asked for is counted once, under the cause that it really had."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.garbled import mistakes
from examples.garbled.engine import Chat, Engine, serve
from kvledger.cli import app
from kvledger.debugger import open_source
from kvledger.debugger.misses.misses import Cause, Misses, misses
from statemachine.commands import Admit, Cache, Clear, Evict, Extend, FinishTransfer, Release
from statemachine.content import namespace_key, parts_of, versioned
from statemachine.events import HostPolicy, Outcome, ReleaseReason, Tier

PROMPT = [*range(100, 121)]
"""Five full blocks and a token."""


def found_in(path: Path, start: int | None = None) -> Misses:
    with open_source(str(path)) as source:
        return misses(source, source.first if start is None else start, source.last)


def begin(engine: Engine, key: str, tokens: list[int], namespace: bytes = b"", limit: int | None = None) -> None:
    words = memoryview(array("i", tokens)).cast("B")
    most = (len(tokens) - 1) // 4 if limit is None else limit
    engine.do(Admit(key, words, namespace, most, -(-len(tokens) // 4)))


def whole(engine: Engine, key: str, tokens: list[int], namespace: bytes = b"") -> None:
    begin(engine, key, tokens, namespace)
    engine.do(Cache(key, len(tokens) // 4, b""))
    engine.do(Release(key, ReleaseReason.FINISHED, False))


def evicted(engine: Engine) -> None:
    whole(engine, "a", PROMPT)
    begin(engine, "b", [*range(500, 541)])  # 12 blocks are too few for both: four of a's go
    engine.do(Release("b", ReleaseReason.FINISHED, False))
    begin(engine, "c", PROMPT)


def computing(engine: Engine) -> None:
    begin(engine, "a", PROMPT)
    begin(engine, "b", PROMPT)


def aborted(engine: Engine) -> None:
    begin(engine, "a", PROMPT)
    engine.do(Release("a", ReleaseReason.ABORTED, False))
    begin(engine, "b", PROMPT)


def other_salt(engine: Engine) -> None:
    whole(engine, "a", PROMPT, namespace_key(salt="A"))
    begin(engine, "b", PROMPT, namespace_key(salt="B"))


def cleared(engine: Engine) -> None:
    whole(engine, "a", PROMPT)
    engine.do(Clear(False))
    begin(engine, "b", PROMPT)


def dropped_on_purpose(engine: Engine) -> None:
    whole(engine, "a", PROMPT)
    engine.do(Evict(Tier.DEVICE, 5))
    begin(engine, "b", PROMPT)


def kept_back(engine: Engine) -> None:
    whole(engine, "a", PROMPT)
    begin(engine, "b", PROMPT, limit=2)


def departing(engine: Engine) -> None:
    whole(engine, "a", PROMPT)
    begin(engine, "b", [*PROMPT[:6], 7, *PROMPT[7:]])


def extended(engine: Engine) -> None:
    begin(engine, "a", PROMPT)
    begin(engine, "b", PROMPT)
    engine.do(Cache("a", 5, b""))
    engine.do(Extend("b", 4))


@pytest.mark.parametrize(
    ("traffic", "causes"),
    [
        (evicted, {Cause.FIRST: 15, Cause.DEVICE: 1, Cause.EVICTED: 4}),
        (computing, {Cause.FIRST: 5, Cause.NOT_READY: 5}),
        (aborted, {Cause.FIRST: 5, Cause.UNPUBLISHED: 5}),
        (other_salt, {Cause.FIRST: 5, Cause.NAMESPACE: 5}),
        (cleared, {Cause.FIRST: 5, Cause.LOST: 5}),
        (dropped_on_purpose, {Cause.FIRST: 5, Cause.LOST: 5}),
        (kept_back, {Cause.FIRST: 5, Cause.DEVICE: 2, Cause.KEPT: 3}),
        (departing, {Cause.FIRST: 5, Cause.DEVICE: 1, Cause.PARTIAL: 1, Cause.DEPARTS: 3}),
        (extended, {Cause.FIRST: 5, Cause.DEVICE: 4, Cause.NOT_READY: 1}),
    ],
)
def test_each_miss_has_the_cause_that_it_had(
    traffic: Callable[[Engine], None], causes: dict[Cause, int], tmp_path: Path
) -> None:
    path = tmp_path / "one.kvlog"
    engine = Engine(path, 12, 0, 0, HostPolicy.OFF)
    traffic(engine)
    engine.close()
    found = {cause: blocks for cause, blocks in found_in(path).by_cause().items() if blocks}
    assert found == causes


def test_what_is_on_its_way_to_the_host_is_not_ready(tmp_path: Path) -> None:
    path = tmp_path / "host.kvlog"
    engine = Engine(path, 12, 24, 12, HostPolicy.EXCLUSIVE)
    whole(engine, "a", PROMPT)
    begin(engine, "b", [*range(500, 533)])  # two blocks go to the host, and have not arrived there
    engine.do(Release("b", ReleaseReason.FINISHED, False))
    begin(engine, "c", [*PROMPT[:17]])
    engine.close()
    counts = found_in(path).by_cause()
    assert engine.state.transfers and counts[Cause.NOT_READY] > 0 and counts[Cause.EVICTED] == counts[Cause.LOST] == 0


def test_what_failed_to_arrive_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "host.kvlog"
    engine = Engine(path, 12, 24, 12, HostPolicy.EXCLUSIVE)
    whole(engine, "a", PROMPT)
    begin(engine, "b", [*range(500, 533)])
    engine.do(FinishTransfer(1, Outcome.FAILED, 0))
    engine.do(Release("b", ReleaseReason.FINISHED, False))
    begin(engine, "c", PROMPT[:17])
    engine.close()
    counts = found_in(path).by_cause()
    assert counts[Cause.LOST] > 0 and counts[Cause.EVICTED] == 0


@pytest.mark.parametrize(("host", "policy"), [(0, HostPolicy.OFF), (40, HostPolicy.EXCLUSIVE)])
def test_the_causes_add_up_to_what_the_machine_counted(host: int, policy: HostPolicy, tmp_path: Path) -> None:
    path = tmp_path / "chat.kvlog"
    engine = Engine(path, 48, host, 20 * bool(host), policy)
    serve(engine, Chat(7).turns(60))
    engine.close()
    counters = engine.state.counters
    found = found_in(path)
    counts = found.by_cause()
    assert found.requests == counters.requests and found.blocks == counters.queried_blocks == sum(counts.values())
    assert counts[Cause.DEVICE] == counters.device_hit_blocks and counts[Cause.HOST] == counters.host_hit_blocks
    assert sum(pushed.blocks for pushed in found.pushed) == counts[Cause.EVICTED]
    half = found_in(path, engine.sequence // 2)  # what was before is remembered, and not counted
    assert 0 < half.requests < found.requests
    assert (
        half.by_cause()[Cause.FIRST] < counts[Cause.FIRST] and half.by_cause()[Cause.EVICTED] <= counts[Cause.EVICTED]
    )


def incident(name: str, folder: Path) -> tuple[int, dict[str, Any], str]:
    path = folder / f"{name}.kvlog"
    begun = mistakes.record(name, path)
    done = CliRunner().invoke(app, ["misses", str(path), "--json"])
    assert done.exit_code == 0, done.output
    return begun, json.loads(done.stdout), CliRunner().invoke(app, ["misses", str(path)]).stdout


def test_a_timestamp_in_the_system_prompt_is_found_with_its_token(tmp_path: Path) -> None:
    begun, found, text = incident("timestamp", tmp_path)
    first = found["departures"][0]
    assert first["token"] == 8 and first["requests"] == 60 and first["departing"] == 840, "the minute is its 9th token"
    assert begun <= first["since"] <= begun + 5
    assert "60 prompts depart at token 8, behind run" in text and "known behind another beginning" in text
    words = CliRunner().invoke(app, ["misses", str(tmp_path / "timestamp.kvlog"), "--words"]).stdout
    assert "request 'call-119' (token 120, not 119)" in words and "(token" not in text
    times = sorted({count["from_ns"] for count in found["counts"]})

    def known(time: int) -> int:
        cause = "known behind another beginning"
        return sum(c["blocks"] for c in found["counts"] if c["from_ns"] == time and c["cause"] == cause)

    assert known(times[0]) == 0 and known(times[-1]) == 210


def test_who_is_evicted_for_whom_is_said_in_words(tmp_path: Path) -> None:
    _, found, text = incident("tenants", tmp_path)
    assert found["causes"]["evicted"] == 540
    assert "salt 'A': 180 blocks had been evicted for salt 'B'\n" in text
    assert sum(pushed["blocks"] for pushed in found["evicted_for"]) == 540
    newest = max(found["evicted_for"], key=lambda pushed: pushed["event"])
    log = CliRunner().invoke(app, ["log", str(tmp_path / "tenants.kvlog"), "--kind", "BlocksEvicted", "--json"]).stdout
    assert newest["event"] in [json.loads(line)["sequence"] for line in log.splitlines()]


def test_a_namespace_is_read_back_in_its_parts() -> None:
    for lora, salt, weights in (("", "", ""), ("sql", "A", "v2"), ("", "Ä", ""), ("sql", "", "")):
        made = namespace_key(lora=lora, salt=salt, weights=weights)
        assert parts_of(made) == (lora, salt, weights)
        if not weights:
            assert parts_of(versioned("v7", made)) == (lora, salt, "v7")
    for raw in (b"tenant", b"\x01\0\0\0", b"\xff" * 9, namespace_key(salt="A") + b"x", b"\x01\0\0\0\xff" + b"\0" * 8):
        assert parts_of(raw) is None


def told(*words: object) -> str:
    return CliRunner().invoke(app, [str(word) for word in words]).stdout


def test_who_ended_how_and_in_which_namespace_is_never_dropped(tmp_path: Path) -> None:
    path = tmp_path / "salt.kvlog"
    engine = Engine(path, 12, 0, 0, HostPolicy.OFF)
    whole(engine, "a", PROMPT, namespace_key(salt="A", lora="sql"))
    begin(engine, "b", PROMPT, namespace_key(salt="A", lora="sql"))
    engine.do(Release("b", ReleaseReason.ABORTED, False))
    (block,) = {int(engine.state.nodes[1].device.ids[0])} if engine.state.nodes[1].device else set()
    own = engine.do(Admit("c", memoryview(array("i", [1, 2])).cast("B"), b"", 0, 1))[-1].blocks[0]  # type: ignore[union-attr]
    engine.do(Release("c", ReleaseReason.PREEMPTED, False))
    engine.close()
    story = told("explain", path, "block", block)
    assert "under LoRA 'sql' and salt 'A'" in story and "request 'b' ends (aborted) and lets go of it" in story
    assert "request 'c' ends (preempted)" in told("explain", path, "block", own)
    assert "it matches under LoRA 'sql' and salt 'A' only" in told("explain", path, "request", "b")
    assert "'a' (number 1), LoRA 'sql' and salt 'A'" in told("show", path, "--request", "a", "--at", 3)


def test_the_one_request_that_is_never_released_is_marked(tmp_path: Path) -> None:
    path = tmp_path / "leak.kvlog"
    engine = Engine(path, 40, 0, 0, HostPolicy.OFF)
    begin(engine, "forgotten", PROMPT)
    for number in range(120):
        whole(engine, f"r{number}", [number, *range(200, 209)])
    begin(engine, "running", PROMPT)
    engine.close()
    done = CliRunner().invoke(app, ["leaks", str(path), "--json"])
    assert done.exit_code == 1
    first, second = json.loads(done.stdout)["leaks"]
    assert first["name"] == "forgotten" and first["why"].startswith("120 requests have begun and ended since")
    assert second["name"] == "running" and not second["why"]
