"""The debugger's commands: what they say, what they give machines, and what they say about bad input."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from examples.garbled.engine import Chat, Engine, serve
from ipc import KvlogWriter
from ipc.ownership import remove_objects
from kvledger.cli import app
from kvledger.debugger import SourceError, open_source
from kvledger.debugger.source.hashes import hash_of
from kvledger.debugger.source.places import locate
from kvledger.debugger.source.replay import decisions
from kvledger.debugger.verify.bisect import first_true
from kvledger.debugger.verify.check import check_log
from kvledger.debugger.verify.predicates import predicate
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from statemachine.check.incremental import IncrementalCheck
from statemachine.events import HostPolicy, RequestReleased
from statemachine.records.codec import SCHEMA_HASH
from statemachine.records.snapshot import restore, snapshot, state_digest


def kvledger(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    done = kvledger(*arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound log of two tiers, always the same."""
    path = tmp_path_factory.mktemp("chat") / "chat.kvlog"
    engine = Engine(path, 48, 40, 20, HostPolicy.EXCLUSIVE)
    serve(engine, Chat(7).turns(60))
    engine.close()
    return path


@pytest.fixture(scope="module")
def rows(chat: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ok("log", chat, "--json").splitlines()]


def numbers(*arguments: object) -> list[int]:
    return [json.loads(line)["sequence"] for line in ok("log", *arguments, "--json").splitlines()]


def test_log_shows_every_event_in_a_line(chat: Path, rows: list[dict[str, Any]]) -> None:
    lines = ok("log", chat).splitlines()
    assert len(lines) == len(rows) and [row["sequence"] for row in rows] == list(range(1, len(rows) + 1))
    for line, row in zip(lines, rows, strict=True):
        assert line.split()[0] == str(row["sequence"]) and row["kind"] in line
    assert "request 'chat-1' begins (number 1)" in lines[1]


def test_filters(chat: Path, rows: list[dict[str, Any]]) -> None:
    def expect(wanted: Any, *arguments: object) -> None:
        found = [row["sequence"] for row in rows if wanted(row)]
        assert found and numbers(chat, *arguments) == found

    first_of = {row["step"]: row["sequence"] for row in reversed(rows)}
    expect(lambda r: r["step"] in (10, 11), "--from", first_of[10], "--to", "step:11")
    expect(lambda r: r["kind"] == "TransferStarted", "--kind", "transfers")
    expect(lambda r: r["kind"].startswith("Blocks"), "--kind", "blocks")
    expect(lambda r: r["kind"] in ("RequestMatched", "RequestReleased"), "--kind", "RequestM", "--kind", "RequestR")
    expect(lambda r: 40 <= r["sequence"] <= 60, "--from", 40, "--to", 60)
    expect(
        lambda r: r["step"] in (10, 11), "--from", "step:10", "--to", "step:11", "--kind", "RequestM"
    ) if False else None
    expect(lambda r: 9 in (r.get("request"), *r.get("requests", ())), "--request", "#9")
    expect(lambda r: 9 in (r.get("request"), *r.get("requests", ())) or r.get("key") == "chat-9", "--request", "chat-9")
    expect(lambda r: r.get("transfer") == 3 or 3 in r.get("after", ()), "--transfer", 3)
    expect(
        lambda r: 5 in (r.get("leaf"), r.get("node"), r.get("upper"), *r.get("nodes", ()), *r.get("merged", ())),
        *("--node", 5),
    )

    def on_host(row: dict[str, Any]) -> list[int]:
        if row["kind"] == "TransferStarted":
            return list(row["sources" if row["direction"] == "swap_in" else "targets"])
        return list(row["blocks"]) if row["kind"] == "BlocksEvicted" and row["tier"] == "host" else []

    expect(lambda r: 3 in on_host(r), "--block", 3, "--tier", "host")
    expect(on_host, "--tier", "host")


def test_a_filter_that_matches_nothing_says_so(chat: Path) -> None:
    for arguments in (("--block", 99999), ("--kind", "TierLost"), ("--kind", "TierLost", "--json")):
        done = kvledger("log", chat, *arguments)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no event matches\n")
    assert kvledger("log", chat, "--kind", "LedgerOpened").stderr == ""


def test_a_hash_names_content_wherever_it_is(chat: Path) -> None:
    with open_source(str(chat)) as source:
        state = source.at(100)
        node = max(state.nodes.values(), key=lambda node: node.pins)
        name = hash_of(state, node, 0).hex()
    told = ok("explain", chat, "hash", name[:10], "--at", 100)
    assert name in told and "position 0 of its path" in told and "has it in its prompt and has to compute it" in told
    lines = ok("log", chat, "--hash", name, "--to", 100).splitlines()
    assert "begins" in lines[0] and any("publishes" in line for line in lines)
    for bad in ("12", "xyz", "0" * 40):
        done = kvledger("explain", chat, "hash", bad)
        assert done.exit_code == 2 and "is no block hash" in done.output
    done = kvledger("explain", chat, "hash", "0123456789")
    assert done.exit_code == 2 and "no block up to event" in done.output


def test_help_is_in_paragraphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However wide the terminal is: no line is broken where the source is, none is indented as the source is."""
    monkeypatch.setenv("COLUMNS", "90")
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) > 15
    for name in (name.removesuffix("_command").replace("_", "-") for name in names):
        text = re.split(r"^[^\w\s]", ok(name, "--help"), maxsplit=1, flags=re.MULTILINE)[0]
        lines = [line.rstrip() for line in text.splitlines()[3:]]
        assert not [line for line in lines if line.startswith("     ")], text
        for line, following in itertools.pairwise(lines):
            first = following.split(" ")[1] if following.strip() else ""
            if line.strip() and first and not following.startswith((" •", "   ")):
                assert len(line.rstrip()) + 1 + len(first) > 88, f"{name}: {line!r} breaks before {first!r}"


def test_places(chat: Path, rows: list[dict[str, Any]]) -> None:
    last_of = {row["step"]: row["sequence"] for row in rows}
    for at in ("step:20", "11:00:00.500900", "2026-01-01T11:00:00.500900", "2026-01-01 12:00:00.5009+01:00"):
        shown = json.loads(ok("show", chat, "--at", at, "--json"))
        assert shown["sequence"] == last_of[20], at
    for bad, message in (
        ("0", "holds the events 1 to"),
        ("99999", "holds the events 1 to"),
        ("step:99", "after the log ends, with step"),
        ("step:x", "is no step"),
        ("10:00", "before the log begins, with 2026-01-01 11:00"),
        ("noon", "is no place in a log"),
    ):
        done = kvledger("show", chat, "--at", bad)
        assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1, done.output


@pytest.mark.parametrize("command", ["show", "log"])
def test_a_reader_who_has_seen_enough_is_no_failure(chat: Path, command: str) -> None:
    """As with ``| head``: exit code 1 would say that something is wrong with the log."""
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "kvledger.cli", command, str(chat)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_place_after_the_end_of_a_log_that_grows_meanwhile(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(str(chat)) as source:
        last = source.last
        monkeypatch.setattr(type(source), "last", property(lambda source: last + 1))
        with pytest.raises(SourceError, match="is after the log ends"):
            locate(source, "step:99")


def test_show(chat: Path) -> None:
    shown = json.loads(ok("show", chat, "--at", 150, "--json"))
    with open_source(str(chat)) as source:
        state = source.at(150)
    assert shown["digest"] == state_digest(state).hex()
    assert shown["pools"]["device"]["free"] == list(state.device.pool.free)[::-1]
    assert {run["id"] for run in shown["runs"]} == set(state.nodes)
    assert shown["eviction_order"]["host"] == [node.id for node in state.host.lru]
    told = ok("show", chat, "--at", 150)
    assert "prefix tree" in told and all(request.request_id in told for request in state.requests.values())
    key = next(iter(state.numbers))
    assert "block table:" in ok("show", chat, "--at", 150, "--request", key)
    run = next(iter(state.nodes))
    assert json.loads(ok("show", chat, "--at", 150, "--node", run, "--json"))["id"] == run
    copy = state.nodes[run].device
    if copy is not None:
        assert f"of run {run}" in ok("show", chat, "--at", 150, "--block", copy.ids[0])


def test_explain_a_block_through_all_its_owners(chat: Path, rows: list[dict[str, Any]]) -> None:
    told = json.loads(ok("explain", chat, "block", 5, "--most", 500, "--json"))
    moves = {fact["sequence"]: fact["text"] for fact in told["history"]}
    for row in rows:
        if row["kind"] == "BlocksAllocated" and 5 in row["blocks"]:
            assert moves[row["sequence"]].startswith("granted to request")
        if row["kind"] == "BlocksCached" and 5 in row["blocks"]:
            assert "publishes it as block" in moves[row["sequence"]] and "tokens" in moves[row["sequence"]]
        if row["kind"] == "TransferStarted" and 5 in row["sources"] and row["direction"] == "swap_out":
            assert "copies it to host block" in moves[row["sequence"]]
    assert len(json.loads(ok("explain", chat, "block", 5, "--most", 3, "--json"))["history"]) == 3
    assert "older facts are left out" in ok("explain", chat, "block", 5, "--most", 3)


def test_explain_requests_and_transfers(chat: Path) -> None:
    told = ok("explain", chat, "request", "chat-12")
    assert "request 'chat-12' begins" in told and "has ended" in told
    assert ok("explain", chat, "request", "#12").splitlines()[2:] == told.splitlines()[2:]
    told = ok("explain", chat, "transfer", 2)
    assert "swap-out 2 starts" in told and "to make room for" in told and "transfer 2 has ended" in told


def test_check_and_replay_a_sound_log(chat: Path) -> None:
    assert ok("check", chat).endswith("all invariants hold after every one (the whole state was checked 1 time)\n")
    assert ok("check", chat, "--to", 1).startswith("1 event, all invariants hold")
    assert json.loads(ok("check", chat, "--full", "--json"))["violation"] is None
    assert "decided again: all the same events" in ok("replay", chat, "--decide")
    assert json.loads(ok("replay", chat, "--json"))["different"] == 0
    assert "the logs hold the same events" in ok("diff", chat, chat)
    assert "the states are the same" in ok("diff", f"{chat}@100", f"{chat}@100")


def test_what_the_incremental_check_overlooks_is_pinned_down(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if something far from the event had been changed: the full check at the end finds it, and where it began."""
    from kvledger.debugger.verify import check

    real = check.apply

    def spoil(state: Any, event: Any) -> None:
        real(state, event)
        if state.next_request > 20:
            state.numbers["ghost"] = 0

    monkeypatch.setattr(check, "apply", spoil)
    monkeypatch.setattr(IncrementalCheck, "after", lambda self, event: [])
    with open_source(str(chat)) as source:
        checked = check_log(source, 1, source.last)
        assert checked.violation is not None and "names of the requests" in checked.violation.messages[0]
        first = first_true(source, predicate("state.next_request > 20"), 1, source.last)
        assert first is not None and checked.violation.entry.sequence == first.sequence


def test_bisect(chat: Path, rows: list[dict[str, Any]]) -> None:
    first = next(row["sequence"] for row in rows if row["kind"] == "BlocksEvicted")
    for text in ("isinstance(event, BlocksEvicted)", "any(n for n in [1] if isinstance(event, BlocksEvicted))"):
        found = json.loads(ok("bisect", chat, "--predicate", text, "--json"))["found"]
        assert found["sequence"] == first
    for text in ("counters.swapped_out_blocks > 9", "len(requests) > 3 and DEVICE == 0 and owner(HOST, 0) != ''"):
        plain = json.loads(ok("bisect", chat, "--predicate", text, "--json"))["found"]
        assert plain["sequence"] > 1
    halves = json.loads(ok("bisect", chat, "--predicate", "counters.swapped_out_blocks > 9", "--stays", "--json"))
    assert (
        halves["found"]
        == json.loads(ok("bisect", chat, "--predicate", "counters.swapped_out_blocks > 9", "--json"))["found"]
    )
    assert kvledger("bisect", chat, "--predicate", "False").exit_code == 1


def test_bisect_by_halves_agrees_over_many_stretches(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvledger.recordings import index

    monkeypatch.setattr(index, "SNAPSHOT_EVERY", 50)
    path = tmp_path / "copy.kvlog"
    path.write_bytes(chat.read_bytes())
    with open_source(str(path)) as source:
        assert len(source.starts()) > 5
        for mark in (1, 10, 40, 80, 100):
            holds = predicate(f"counters.cached_blocks > {mark}")
            one = first_true(source, holds, 1, source.last)
            assert one == first_true(source, holds, 1, source.last, stays=True) and one is not None


def test_a_predicate_in_a_file(chat: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def predicate(state, entry):\n    return entry.sequence == 33\n")
    assert "true from event 33 on" in ok("bisect", chat, "--predicate", path)
    for text, message in (
        ("1 +", "is no Python expression"),
        ("nonsense > 3", "the predicate fails at event 1: NameError"),
        ("open('/etc/passwd')", "the predicate fails at event 1: NameError"),
        ("absent.py", "the predicate file absent.py fails: FileNotFoundError"),
    ):
        done = kvledger("bisect", chat, "--predicate", text)
        assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1
    path.write_text("x = 1\n")
    assert "defines no function" in kvledger("bisect", chat, "--predicate", path).output


def test_shrink_writes_a_test_that_fails(chat: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    told = ok("shrink", chat, "-o", test, "--predicate", "counters.host_hit_blocks > 0")
    assert "commands are left" in told and int(told.split()[0]) < 16
    assert stat.S_IMODE(test.stat().st_mode) == 0o600, "it may hold what users wrote"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 1 and "1 failed" in done.stdout and "assert not True" in done.stdout
    again = kvledger("shrink", chat, "-o", test)
    assert again.exit_code == 2 and "exists already" in again.output
    sound = kvledger("shrink", chat, "-o", tmp_path / "test_other.py")
    assert sound.exit_code == 2 and "do not fail when this version" in sound.output
    assert not (tmp_path / "test_other.py").exists()


def test_diff_names_the_first_difference(chat: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.kvlog"
    engine = Engine(other, 48, 40, 20, HostPolicy.EXCLUSIVE)
    serve(engine, Chat(8).turns(10))
    engine.close()
    done = kvledger("diff", chat, other, "--json")
    assert done.exit_code == 1 and json.loads(done.output)["first_difference"] == 2
    told = kvledger("diff", f"{chat}@90", f"{chat}@93").output
    assert ("differ:" in told and "next request" in told) or "block" in told


def test_leaks_know_age_and_maker(chat: Path) -> None:
    found = json.loads(ok("leaks", chat, "--at", 150, "--json"))["leaks"]
    with open_source(str(chat)) as source:
        state = source.at(150)
    assert {leak["name"] for leak in found if leak["kind"] == "request"} == set(state.numbers)
    assert all(0 < leak["since"] <= leak["last"] <= 150 and leak["age_s"] >= leak["idle_s"] for leak in found)
    assert [leak["age_s"] for leak in found] == sorted((leak["age_s"] for leak in found), reverse=True)
    assert "nothing is held" in ok("leaks", chat)


@pytest.mark.parametrize("policy", [HostPolicy.OFF, HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_a_real_run_decides_the_same_again(policy: HostPolicy, tmp_path: Path) -> None:
    path = tmp_path / "run.kvlog"
    data = policy == HostPolicy.EXCLUSIVE  # once with real workers
    options = RunOptions(
        device_blocks=400, host_blocks=800, host_policy=policy, data=data, ranks=1, in_flight=6, record=path
    )
    Run(sample.generate(150, seed=4), options).execute(f"decide-{os.getpid()}")
    with open_source(str(path)) as source:
        different = [decision for decision in decisions(source, 1, source.last) if not decision.same]
        assert not different, different[0]
        assert check_log(source, 1, source.last).violation is None


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[str]:
    """A ledger whose engine was killed."""
    name = f"dead-{os.getpid()}"
    code = (
        "import os, numpy as np\n"
        "from kvledger import CacheConfig, CacheManager\n"
        f"manager = CacheManager.create({name!r}, CacheConfig(device_blocks=64))\n"
        "manager.admit('a', np.arange(40, dtype=np.int32))\n"
        "manager.cache('a')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    yield name
    remove_objects(name)


def test_a_killed_engine_s_ledger(dead: str) -> None:
    assert "request 'a' publishes device blocks 0..1" in ok("log", dead)
    assert "request 'a'" in ok("explain", dead, "block", 0)
    assert "request 'a': 1 block of its own, pins 2 cached blocks" in ok("leaks", dead)
    assert "all invariants hold" in ok("check", dead)
    assert ok("log", dead, "--follow", "--from", 1).count("\n") == 4  # nobody writes any more: it ends
    assert ok("log", dead, "--follow", "--request", "#1") == ok("log", dead, "--request", "a")
    assert "request 'a' begins" in ok("log", dead, "--follow", "--request", "#1")
    assert ok("log", dead, "--follow", "--request", "nobody") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log", "absent.kvlog"), "cannot read absent.kvlog"),
        (("log", "nobody"), "neither a .kvlog file nor a ledger"),
        (("log", "CHAT", "--kind", "Nonsense"), "there is no kind of event 'Nonsense'; there are LedgerOpened"),
        (("log", "CHAT", "--request", "nobody"), "no request 'nobody' begins in"),
        (("log", "CHAT", "--request", "#999"), "no request #999 has begun"),
        (("log", "CHAT", "--request", "#0"), "no request #0 has begun"),
        (("log", "CHAT", "--from", "50", "--to", "40"), "--from is event 50, after --to, event 40"),
        (("log", "CHAT", "--follow"), "is a recording, it does not grow"),
        (("log", "CHAT", "--follow", "--to", "9"), "goes with neither --to nor --hash"),
        (("log", "CHAT", "--hash", "zz"), "is no block hash"),
        (("show", "CHAT", "--request", "chat-1"), "is not live after event"),
        (("show", "CHAT", "--node", "99999"), "there is no run 99999"),
        (("show", "CHAT", "--block", "48"), "there is no device block 48: the blocks of that tier are 0 to 47"),
        (("bisect", "CHAT", "--predicate", "owner(HOST, 99999) != 'free'"), "at event 1: there is no host block 99999"),
        (("bisect", "CHAT", "--predicate", "owner(DEVICE, -1) != 'free'"), "at event 1: there is no device block -1"),
        (("show", "CHAT", "--node", "1", "--block", "1"), "one of --block, --request and --node"),
        (("explain", "CHAT", "block", "x"), "'x' is no number"),
        (("explain", "CHAT", "block", "48"), "there is no device block 48: the blocks of that tier are 0 to 47"),
        (("explain", "CHAT", "request", "#999"), "no request #999 has begun"),
        (("explain", "CHAT", "transfer", "0"), "no transfer 0 has begun"),
        (("diff", "CHAT", "absent.kvlog"), "cannot read absent.kvlog"),
        (("diff", "CHAT@0", "CHAT@1"), "holds the events 1 to"),
        (("shrink", "CHAT", "-o", "/nowhere/test.py"), "there is no folder /nowhere"),
        (("leaks", "CHAT", "--at", "never"), "is no place in a log"),
        (("replay", "CHAT", "--from", "0"), "holds the events 1 to"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str, chat: Path) -> None:
    done = kvledger(*(argument.replace("CHAT", str(chat)) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert message in done.output and done.output.count("\n") == 1 and done.output.startswith("error ")


def test_a_log_that_contradicts_itself_has_events_but_no_states_beyond(tmp_path: Path) -> None:
    path = tmp_path / "early.kvlog"
    code = (
        f"from pathlib import Path; from examples.garbled.incidents import record; record('early', Path({str(path)!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with open_source(str(path)) as source:
        assert source.last_state == 169 < source.last and "BlocksCached" in source.contradiction
        assert len(list(source.entries())) == source.last
        assert any(isinstance(entry.event, RequestReleased) for entry in source.entries(170))
    done = kvledger("show", path, "--at", 200)
    assert done.exit_code == 1 and "nothing after event 169 has a state" in done.output
    shown = json.loads(kvledger("show", path, "--json").stdout)
    assert shown["sequence"] == 169 and shown["contradiction"].startswith("event 170: ")
    assert kvledger("bisect", path, "--predicate", "False").stdout.startswith("not true before the log breaks")
    done = kvledger("log", path, "--from", 170, "--to", 170)
    assert done.exit_code == 1 and "BlocksCached" in done.stdout and "contradicts itself" in done.stderr


def test_a_recording_that_begins_in_the_middle(chat: Path, tmp_path: Path) -> None:
    path = tmp_path / "tail.kvlog"
    with open_source(str(chat)) as whole:
        start = next(whole.transactions(100))[0].sequence
        state = snapshot(whole.at(start - 1))
        with KvlogWriter(path, schema_hash=SCHEMA_HASH, base_sequence=start, snapshot=state) as writer:
            for records in whole.records(start):
                writer.write(records)
        with open_source(str(path)) as tail:
            assert (tail.first, tail.last) == (start, whole.last)
            assert list(tail.entries()) == list(whole.entries(start))
            for sequence in (start, start + 1, whole.last):
                assert state_digest(tail.at(sequence)) == state_digest(whole.at(sequence))
            assert check_log(tail, start, tail.last).violation is None
            assert all(decision.same for decision in decisions(tail, start, tail.last))
    assert "tokens" in ok("explain", path, "block", 5)
    key = next(iter(restore(state).numbers))
    assert f"request '{key}' ends" in ok("explain", path, "request", key)
    assert f"request '{key}'" in ok("log", path, "--request", key)
    assert ok("replay", path).startswith(f"{whole.last - start + 1:,} events")
    done = kvledger("shrink", path, "-o", tmp_path / "test_it.py")
    assert done.exit_code == 2 and f"begins with event {start}: only a log from event 1 on" in done.output
    done = kvledger("show", path, "--at", start - 1)
    assert done.exit_code == 2 and f"holds the events {start} to" in done.output
