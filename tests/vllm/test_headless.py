"""vLLM's own scheduler decides on a ledger exactly as on its own manager, and reads only what it has written."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("vllm")

import kvledger.adapters.vllm.manager as manager_module
from ipc import LogReader
from kvledger import CacheManager, ConfigError
from kvledger.adapters.vllm import LedgerAsyncScheduler, LedgerScheduler, record
from kvledger.adapters.vllm.manager import LedgerKVCacheManager
from kvledger.adapters.vllm.settings import expect_version, settings
from kvledger.cli import app
from statemachine.check import check
from statemachine.events import EngineDeparted
from statemachine.records.replay import event_of
from tests.vllm import duplicates
from tests.vllm.headless import Engine, Shape, Told, config_of, conversations, scheduler_of
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def environment() -> None:
    """Let vLLM set its variables of the environment, once, before each test is watched for what it leaves."""
    config_of(Shape())


@pytest.fixture(autouse=True)
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVLEDGER_NAME", f"headless-{os.getpid()}")
    return f"headless-{os.getpid()}-0"


def ours(shape: Shape) -> Any:
    return scheduler_of(shape, LedgerAsyncScheduler if shape.asynchronous else LedgerScheduler)


def served(scheduler: Any, shape: Shape, seed: int, requests: int, aborts: bool) -> Told:
    engine = Engine(scheduler, shape)
    for act in conversations(seed, requests, shape, aborts=aborts):
        act(engine)
        engine.step()
    while engine.step():
        pass
    return engine.told


@pytest.mark.parametrize("aborts", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(blocks=800),
        Shape(blocks=400),
        Shape(blocks=200),
        Shape(blocks=120),
        Shape(blocks=150, block_size=32),
        Shape(blocks=120, watermark=0.05),
        Shape(blocks=150, policy="priority"),
        Shape(blocks=120, asynchronous=True),
        Shape(blocks=120, drafts=3),
        Shape(blocks=200, tokens=256, sequences=8),
        Shape(blocks=200, caching=False),
    ],
    ids=lambda shape: ",".join(f"{k}={v}" for k, v in vars(shape).items() if v != vars(Shape())[k]) or "default",
)
def test_it_decides_alike(shape: Shape, aborts: bool) -> None:
    """Hits, steps, preemptions and texts; at the end every block is free, and every invariant holds."""
    theirs = served(scheduler_of(shape), shape, 1, 120, aborts)
    scheduler = ours(shape)
    told = served(scheduler, shape, 1, 120, aborts)
    ledger: CacheManager = scheduler.kv_cache_manager.ledger
    try:
        assert told.texts == theirs.texts and told.hits == theirs.hits
        assert (told.steps, told.preemptions) == (theirs.steps, theirs.preemptions)
        assert not ledger.state.requests and not check(ledger.state)
        assert ledger.available_blocks() == shape.blocks - 1 and scheduler.kv_cache_manager.usage == 0
        assert not scheduler.kv_cache_manager.live
        assert (sum(told.hits.values()) > 0) == shape.caching
    finally:
        scheduler.shutdown()


@pytest.mark.parametrize("block_size", duplicates.SIZES)
def test_what_is_computed_twice_costs_no_room(block_size: int) -> None:
    """Equal prompts together, in small pools; each request for room sees that no block is held that nobody uses."""
    shapes = [duplicates.shape_of(seed, block_size) for seed in range(6)]
    theirs = [duplicates.serve(seed, shape, ours=False) for seed, shape in enumerate(shapes)]
    told = [duplicates.serve(seed, shape, ours=True) for seed, shape in enumerate(shapes)]
    assert sum(cost.refusals for cost in theirs) > 20, "they are short of room"
    assert sum(cost.steps for cost in told) <= 1.01 * sum(cost.steps for cost in theirs)
    assert sum(cost.refusals for cost in told) <= 1.05 * sum(cost.refusals for cost in theirs)


@pytest.mark.parametrize("aborts", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(blocks=400),
        Shape(blocks=120),
        Shape(blocks=120, watermark=0.05),
        Shape(blocks=150, policy="priority"),
        Shape(blocks=120, asynchronous=True),
        Shape(blocks=120, drafts=3),
        Shape(blocks=200, tokens=256, sequences=8),
        Shape(blocks=200, caching=False),
    ],
    ids=lambda shape: ",".join(f"{k}={v}" for k, v in vars(shape).items() if v != vars(Shape())[k]) or "default",
)
def test_a_recorded_engine_does_what_its_ledger_says(shape: Shape, aborts: bool) -> None:
    """At every step the block tables are vLLM's own; not once does it do what the ledger would not have done."""
    scheduler = scheduler_of(shape)
    recorder = record(scheduler, f"recorded-{os.getpid()}")
    assert recorder is not None
    ledger, tables = recorder.ledger, scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    engine = Engine(scheduler, shape)
    try:
        for at, act in enumerate(conversations(1, 120, shape, aborts=aborts)):
            act(engine)
            engine.step()
            if at % 16 == 0:
                recorder.flush()
                theirs = {name: [block.block_id - 1 for block in blocks] for name, blocks in tables.items() if blocks}
                mine = {request.request_id: request.table.tolist() for request in ledger.state.requests.values()}
                assert mine == theirs
        while engine.step():
            pass
        recorder.flush()
        assert recorder.departures == 0 and not ledger.state.requests and not check(ledger.state)
        assert ledger.available_blocks() == shape.blocks - 1
        assert (ledger.state.counters.device_hit_blocks > 0) == shape.caching
    finally:
        scheduler.shutdown()


def test_the_commands_speak_of_a_recorded_engine(tmp_path: Path) -> None:
    """An unmodified vLLM, in its own names of requests and its own blocks."""
    scheduler = scheduler_of(Shape())
    recorder = record(scheduler, f"recorded-{os.getpid()}")
    assert recorder is not None
    engine, file = Engine(scheduler, Shape()), str(tmp_path / "vllm.kvlog")
    try:
        for act in conversations(1, 40, Shape(), aborts=True):
            act(engine)
            engine.step()
        recorder.flush()
        (name, request), *_ = recorder.ledger.state.numbers.items()
        blocks = recorder.ledger.state.requests[request].table.tolist()
        while engine.step():
            pass
        recorder.flush()
        for expected, *command in (
            ("", "record", recorder.ledger.name, file, "--once"),
            ("all invariants hold", "check", file),
            ("nothing is held", "leaks", file),
            (f"request {name!r} gets device block", "explain", file, "request", name),
            (f"{name!r}", "explain", file, "block", str(blocks[-1])),
            ("device", "what-if", file, "--device-blocks", "400"),
            ("first seen", "misses", file),
            ("device", "top", recorder.ledger.name, "--once"),
        ):
            done = CliRunner().invoke(app, command)
            assert not done.exit_code and expected in done.output, (command, done.output)
    finally:
        scheduler.shutdown()


def test_a_departure_is_written_down_and_the_engine_goes_on() -> None:
    """Blocks change hands behind the recorder's back: it says for whom, and follows the others."""
    shape, prompt = Shape(), list(range(100))
    scheduler = scheduler_of(shape)
    recorder = record(scheduler, f"recorded-{os.getpid()}")
    assert recorder is not None
    engine = Engine(scheduler, shape)
    try:
        for request in ("a", "b"):
            engine.add(request, prompt, 2)
            while engine.step():
                pass
            recorder.flush()
            assert recorder.departures == 0
        type(scheduler.kv_cache_manager).reset_prefix_cache(scheduler.kv_cache_manager)  # which is not noted
        engine.add("c", prompt, 2)
        while engine.step():
            pass
        recorder.flush()
        assert recorder.departures == 1 and not recorder.ledger.state.requests
        reader = LogReader(recorder.ledger.name)
        events = [event_of(each) for each in reader.poll()]
        reader.close()
        (departed,) = [event for event in events if isinstance(event, EngineDeparted)]
        assert departed.key.startswith("c") and departed.what == "0 blocks of its prompt were cached there, 6 here"
    finally:
        scheduler.shutdown()


def test_what_cannot_be_recorded_runs_unrecorded(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = scheduler_of(Shape())
    first = record(scheduler, f"recorded-{os.getpid()}")
    try:
        assert first is not None and record(scheduler_of(Shape()), f"recorded-{os.getpid()}") is None
        assert "kvledger records nothing of this engine" in caplog.text
    finally:
        scheduler.shutdown()


def test_preemption_was_met() -> None:
    """Otherwise the test above would say little."""
    shape = Shape(blocks=120)
    scheduler = ours(shape)
    assert served(scheduler, shape, 1, 120, False).preemptions > 5
    scheduler.shutdown()


def test_salts_adapters_and_resets() -> None:
    from vllm.lora.request import LoRARequest

    shape, prompt = Shape(), list(range(100))
    scheduler = ours(shape)
    engine = Engine(scheduler, shape)

    def hit(request: str, **options: Any) -> int:
        engine.add(request, prompt, 2, **options)
        while engine.step():
            pass
        return engine.told.hits[request]

    try:
        assert [hit("a"), hit("b")] == [0, 96]
        assert [hit("salted", salt="x"), hit("salted again", salt="x"), hit("other salt", salt="y")] == [0, 96, 0]
        poet = LoRARequest("poet", 1, "/nowhere")
        assert [hit("poet", lora=poet), hit("poet again", lora=poet), hit("c")] == [0, 96, 96]
        engine.add("running", prompt, 50)
        engine.step()
        assert not scheduler.reset_prefix_cache()
        while engine.step():
            pass
        assert scheduler.reset_prefix_cache() and hit("after the reset") == 0
    finally:
        scheduler.shutdown()


def test_blocks_of_a_step_in_flight_are_nobodys(name: str) -> None:
    """The name is free at once, and may come back; the blocks are when the fence has passed."""
    shape = Shape(blocks=20)
    scheduler = ours(shape)
    manager: LedgerKVCacheManager = scheduler.kv_cache_manager
    engine = Engine(scheduler, shape)
    try:
        engine.add("r", list(range(100)), 50)
        engine.step()
        request = scheduler.requests["r"]
        held = manager.pop_blocks_for_free(request)
        assert manager.get_block_ids("r") == ([],) and manager.ledger.available_blocks() == 19 - 7
        request.num_computed_tokens = 0
        assert manager.allocate_slots(request, 50) is not None  # the same name, while its blocks are held
        assert len(manager.ledger.state.requests) == 2
        manager.block_pool.free_blocks(reversed(held))
        assert len(manager.ledger.state.requests) == 1
        manager.free(request)
        assert manager.ledger.available_blocks() == 19
    finally:
        scheduler.shutdown()


def test_a_killed_engine_is_followed_by_one_of_its_name(name: str) -> None:
    """What it had computed is gone with it; its requests are released in the log, which goes on."""
    program = """
import os, signal
from tests.vllm.headless import *
from kvledger.adapters.vllm import LedgerScheduler
shape = Shape()
engine = Engine(scheduler_of(shape, LedgerScheduler), shape)
engine.add("r", list(range(100)), 5)
engine.step()
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGKILL
    for shape in (Shape(), Shape(blocks=100)):
        scheduler = ours(shape)
        engine = Engine(scheduler, shape)
        try:
            ledger = scheduler.kv_cache_manager.ledger
            assert ledger.name == name and ledger.available_blocks() == shape.blocks - 1
            engine.add("r", list(range(100)), 5)
            while engine.step():
                pass
            assert engine.told.hits == {"r": 0}
            ledger.close(keep=shape == Shape())
        finally:
            scheduler.shutdown()


def test_the_log_of_vllm_is_a_log(name: str) -> None:
    shape = Shape(blocks=150)
    scheduler = ours(shape)
    try:
        served(scheduler, shape, 2, 60, True)
        done = subprocess.run(
            [sys.executable, "-m", "kvledger.cli", "check", name],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
    finally:
        scheduler.shutdown()


def test_what_cannot_be_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"vLLM 0\.40\.1 is not one of 0\.32\.x, 0\.33\.x"):
        expect_version("0.40.1")
    with pytest.raises(ConfigError, match="knows name, segment_bytes, retain_bytes, not nmae"):
        settings({"kvledger": {"nmae": "x"}}, 0)
    monkeypatch.setenv("KVLEDGER_RETAIN_BYTES", "much")
    with pytest.raises(ConfigError, match="retain_bytes in vLLM is 'much'"):
        settings(None, 0)
    monkeypatch.setenv("KVLEDGER_RETAIN_BYTES", "all")
    monkeypatch.delenv("KVLEDGER_NAME")
    assert settings({"kvledger": {"name": "chat", "segment_bytes": 1 << 20}}, 3) == ("chat-3", 1 << 20, None)

    class Group:
        kv_cache_spec = object()

    class Two:
        kv_cache_groups = (Group(), Group())

    with pytest.raises(ConfigError, match="cached in groups"):
        manager_module.expect_expressible(Two(), None)  # type: ignore[arg-type]


def test_no_method_of_theirs_is_left_unanswered() -> None:
    """Whatever vLLM's manager can be asked, ours answers itself, with the same parameters: a new version shows here."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    inherited = {"prefix_cache_lookup_enabled", "record_prefix_cache_stats", "make_prefix_cache_stats"}
    inherited |= {"create_kv_cache_blocks", "get_num_common_prefix_blocks"}  # they touch no block
    for method, theirs in inspect.getmembers(KVCacheManager, inspect.isfunction):
        if method.startswith("_") or method in inherited:
            continue
        mine = inspect.getattr_static(LedgerKVCacheManager, method)
        assert mine is not theirs, method
        asked = list(inspect.signature(theirs).parameters)
        assert list(inspect.signature(mine).parameters)[: len(asked)] == asked, method  # 0.33 may ask more than 0.32
