"""The benchmark suite works, every part of it, also where no peer is installed. Times are never asserted."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import page, pattern
from benchmarks.__main__ import PARTS
from benchmarks.compare import changes, ratios_of
from benchmarks.contest import drive
from benchmarks.field import Field
from benchmarks.figures import Figure, verdict
from benchmarks.hitrate import Clairvoyant
from benchmarks.hitrate import Path as RequestPath
from benchmarks.peers import ENTRIES, Entry, make
from benchmarks.streams import STREAMS

OURS = ENTRIES[0]
ROOT = page.DOCS.parent


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    ran = suite("--quick", "--no-page", "--json", str(path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    made: dict[str, Any] = json.loads(path.read_text())
    return made


@pytest.mark.timeout(280)
def test_every_part_has_figures_each_with_a_ratio(report: dict[str, Any]) -> None:
    assert list(report["parts"]) == list(PARTS)
    for name, part in report["parts"].items():
        assert part["figures"], name
        for one in part["figures"]:
            assert one["against"], one
            assert one["ratios"] and all(0 < ratio < float("inf") for ratio in one["ratios"]), one


def test_the_page_shows_all_figures_and_its_pictures(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "performance.md").write_text(f"before\n{page._BEGIN}\nold\n{page._END}\nafter\n")
    page.write(report, tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    for part in report["parts"].values():
        assert f"## {part['title']}\n" in text
        for one in part["figures"]:
            assert f"| {one['name']} |" in text
    for picture in ("requests-16", "decode", "hit-rates"):
        assert f"images/benchmarks-{picture}.svg" in text
        assert (tmp_path / "images" / f"benchmarks-{picture}.svg").read_text().startswith("<?xml")
    goals = (tmp_path / "performance.md").read_text()
    assert goals.startswith("before\n") and goals.endswith("\nafter\n") and "old" not in goals
    wanted = [one for part in report["parts"].values() for one in part["figures"] if one["goal"]]
    assert all(f"{one['name']} |" in goals for one in wanted)


def test_a_stream_is_judged_by_its_fastest_peer() -> None:
    def beside(against: str, ratio: float) -> dict[str, Any]:
        figure = Figure(name="chat, block 16", unit="µs", ours=1, against=against, theirs=ratio, ratios=[ratio])
        return {**figure.as_dict(), "goal": "some"}

    figures = [beside("slow", 9.0), beside("fast", 2.0), beside("vLLM xxhash", 12.0), beside("vLLM sha256", 14.0)]
    first, second = page.goals({"contest": {"title": "", "figures": figures}}).splitlines()[2:]
    assert "| fast, the fastest peer | 1 µs | 2 | ≥ 5 × | **not reached**, 2.5 × too slow |" in first
    assert "| vLLM xxhash | 1 µs | 12 | ≥ 10 × | reached |" in second


def test_a_ratio_that_fell_is_told_and_one_within_the_noise_is_not(report: dict[str, Any], tmp_path: Path) -> None:
    before = ratios_of(report)
    slower, noisy = list(before)[:2]
    after = {
        **before,
        slower: [ratio / 2 for ratio in before[slower]],
        noisy: [ratio * 0.95 for ratio in before[noisy]],
    }
    (change,) = changes(before, after)
    assert change[:3] == slower
    assert change.factor == pytest.approx(0.5)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(report))
    first = next(iter(report["parts"].values()))["figures"][0]
    first["ratios"] = [ratio / 2 for ratio in first["ratios"]]
    new.write_text(json.dumps(report))
    for files, code in (((old, old), 0), ((old, new), 1), ((new, old), 0), ((old,), 2), ((old, Path(__file__)), 2)):
        command = [sys.executable, "-m", "benchmarks.compare", *map(str, files)]
        assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == code, files


def test_noise_among_repetitions_is_no_change() -> None:
    key = ("contest", "chat", "somebody")
    assert not changes({key: [1.0, 2.0, 3.0]}, {key: [1.4, 1.5, 1.6]})
    assert changes({key: [2.0, 2.0, 2.1]}, {key: [1.4, 1.5, 1.6]})


@pytest.mark.parametrize("name", STREAMS)
def test_streams_are_the_same_every_time_and_can_be_served(name: str) -> None:
    one, other = STREAMS[name](16, True), STREAMS[name](16, True)
    assert one.blocks == other.blocks
    assert all(
        np.array_equal(own.prompt, others.prompt) for own, others in zip(one.requests, other.requests, strict=True)
    )
    assert all(request.after < number for number, request in enumerate(one.requests))


def test_int32_prompts_and_lists_hit_the_same_blocks() -> None:
    found = []
    for entry in ENTRIES[:2]:
        stream = STREAMS["chat"](16, True)
        contestant = make(entry, 16, stream.blocks)
        try:
            costs, phases, hits, longest = drive(contestant, stream, 16)
            assert contestant.manager.stats()["live_requests"] == 0
        finally:
            contestant.close()
        assert len(costs) == len(stream.requests) and min(costs) > 0
        assert sum(costs) == pytest.approx(sum(phases.values()))
        assert longest <= sum(phases.values())
        found.append(hits)
    assert found[0] == found[1]
    assert sum(found[0]) > 0


def test_who_cannot_take_part_is_skipped_with_the_reason() -> None:
    broken = Entry("broken", "benchmarks.peers.nowhere", "", "numpy")
    absent = Entry("absent", "benchmarks.peers.nowhere", "", "no-such-distribution-here")
    fails = Entry("fails", "benchmarks.peers.ledger", "int32", "numpy")
    with Field((OURS, broken, absent, fails)) as field:
        assert [entry.name for entry in field.entries] == ["kvledger", "fails"]
        reasons = "\n".join(field.skipped)
        assert "broken: cannot be imported: ModuleNotFoundError" in reasons
        assert "no-such-distribution-here: not installed" in reasons
        assert set(field.turn(_name_unless_it_fails)) == {"kvledger"}
        assert "fails: MemoryError: full" in field.skipped
        assert set(field.turn(_name_unless_it_fails)) == {"kvledger"}


def _name_unless_it_fails(entry: Entry) -> str:
    if entry.name == "fails":
        raise MemoryError("full")
    return entry.name


def test_the_bound_knows_what_is_needed_next() -> None:
    a, b, c = (RequestPath([block], 1, 1) for block in (1, 2, 3))
    filler = [RequestPath([], 0, 0)] * 64  # ends what runs, so that it can be evicted
    traffic = [request for one in (a, b, c, a, c, b) for request in (one, *filler)]
    assert Clairvoyant(traffic, 3).hit_rate() == 3 / 6
    assert Clairvoyant(traffic, 2).hit_rate() == 2 / 6  # LRU would have none: it drops a for c
    assert Clairvoyant(traffic, 1).hit_rate() == 0


def test_the_bound_never_cuts_a_path() -> None:
    path = RequestPath([1, 2, 3, 4], 4, 4)
    other = RequestPath([9, 8], 2, 2)
    filler = [RequestPath([], 0, 0)] * 64
    assert Clairvoyant([path, *filler, other, *filler, path], 4).hit_rate() == 2 / 10


def test_a_goal_is_a_ratio_or_a_limit() -> None:
    def figure(**goal: float) -> Figure:
        return Figure(name="x", unit="µs", ours=10, against="y", theirs=30, ratios=[2.0, 3.0, 9.0], **goal)

    assert figure().reached and not figure().goal
    assert figure(least_ratio=3).reached and not figure(least_ratio=3.1).reached
    assert figure(at_most=10).reached and not figure(at_most=9).reached
    assert figure(at_least=10).reached and not figure(at_least=11).reached
    assert figure(least_ratio=5, at_most=4).goal == "≥ 5 ×, ≤ 4"


def test_wrong_use_is_told(tmp_path: Path) -> None:
    unknown = suite("--only", "contest,nonsense", "--json", str(tmp_path / "x.json"))
    assert unknown.returncode == 2
    assert "there is no part nonsense" in unknown.stderr
    assert suite("--quick").returncode == 2  # would overwrite the figures of docs/


def test_a_part_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import __main__ as main

    monkeypatch.setitem(main.PARTS, "compare", "No benchmark")
    monkeypatch.setattr(
        sys, "argv", ["x", "--quick", "--no-page", "--only", "compare,swap", "--json", str(tmp_path / "x.json")]
    )
    assert main.main() == 1
    parts = json.loads((tmp_path / "x.json").read_text())["parts"]
    assert parts["compare"]["error"] and not parts["compare"]["figures"]
    assert parts["swap"]["figures"]


def test_the_extra_has_what_the_suite_imports() -> None:
    """The suite runs in an environment of its own: what only ``test`` brings is missing there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    there = " ".join([*project["dependencies"], *extras["bench"], *extras["plot"]])
    ours = {"benchmarks", "ipc", "kvledger", "statemachine", "workers"}
    named = {"zmq": "pyzmq"}
    missing = set()
    for path in (ROOT / "benchmarks").glob("*.py"):  # peers bring their own
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for top in {module.partition(".")[0] for module in modules} - ours - sys.stdlib_module_names:
                if named.get(top, top) not in there:
                    missing.add(top)
    assert not missing


def test_the_scheduler_pattern_serves_the_same_in_every_way() -> None:
    """All requests are told, computed and released, in each of our ways, and hit the same blocks."""
    hits = set()
    for entry in pattern._OURS[:3]:
        lap = pattern.lap(entry, 4)
        assert len(lap.steps) == pattern._STEPS and lap.without_border > 0
        hits.add(lap.hits)
    assert len(hits) == 1 and min(hits) > 50
    sides = {way.name: [pattern.Lap([1.0, 3.0], 5, 0.5)] for way in pattern._OURS}
    made = pattern._figures_of(4, {**sides, "vLLM xxhash": [pattern.Lap([10.0, 30.0], 5, 4.0)]})
    verdicts = {one.name: verdict(one) for one in made if one.goal}
    assert verdicts["4 running, batches"] == "reached" == verdicts["4 running, batches, no border crossed"]
    assert made[0].details["theirs"] == {"p50_us": 20, "p99_us": 30, "longest_us": 30, "hit_blocks": 5}


def test_by_how_much_a_goal_is_missed() -> None:
    def missed(**goal: float) -> str:
        figure = Figure(name="x", unit="µs", ours=10, against="y", theirs=20, ratios=[2], **goal)
        return verdict(figure)

    assert missed(least_ratio=2) == missed(at_most=10) == missed(at_least=10) == "reached"
    assert missed(least_ratio=3) == missed(at_most=15 / 2.25, least_ratio=3) == "not reached, by 1.5 ×"
    assert missed(at_most=4) == "not reached, by 2.5 ×" and missed(at_least=40) == "not reached, by 4 ×"
