"""``kvledger view`` without a browser: pictures, timelines, windows, the server and its locks, exported files."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import re
import runpy
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ipc import KvlogReader, KvlogWriter, LogReader, snapshots
from kvledger import CacheConfig, CacheManager, sample
from kvledger.debugger import SourceError, open_source
from kvledger.run import Run, RunOptions
from kvledger.timeline import Timeline
from kvledger.view import log as view_log
from kvledger.view.export import MOST_EVENTS, export
from kvledger.view.log import Log
from kvledger.view.picture import Kind, Picture
from kvledger.view.server import ViewServer
from statemachine import codec, commands
from statemachine.apply import genesis
from statemachine.decide import decide
from statemachine.encoding import restore, snapshot
from statemachine.errors import CommandRejected
from statemachine.events import KINDS, HostPolicy, LedgerOpened, Tier
from statemachine.ownership import owners
from statemachine.state import State

ROOT = Path(__file__).parents[1]
NAMES = ("runs", "requests", "transfers")
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><!--[bold]"


class Page:
    """What the page's script does with a window: a keyframe, then changes."""

    def __init__(self, keyframe: dict[str, Any]) -> None:
        self.rows = {name: {int(id): row for id, row in keyframe[name].items()} for name in NAMES}
        self.blocks = {
            tier: [
                np.frombuffer(base64.b64decode(keyframe[tier]["kinds"]), np.uint8).copy(),
                np.frombuffer(base64.b64decode(keyframe[tier]["owners"]), "<u4").copy(),
            ]
            for tier in ("device", "host")
        }

    def apply(self, change: dict[str, Any]) -> None:
        for name in NAMES:
            for id, row in change.get(name, {}).items():
                if row is None:
                    del self.rows[name][int(id)]
                else:
                    self.rows[name][int(id)] = row
        for tier, size in zip(("device", "host"), change.get("capacity", ())):
            self.blocks[tier] = [np.append(old, np.zeros(size, old.dtype))[:size] for old in self.blocks[tier]]
        for tier in ("device", "host"):
            if tier in change:
                ids, *values = change[tier]
                for array, value in zip(self.blocks[tier], values):
                    array[ids] = value

    def differs(self, other: Page) -> list[str]:
        found = [name for name in NAMES if self.rows[name] != other.rows[name]]
        for tier, arrays in self.blocks.items():
            found += [tier for mine, theirs in zip(arrays, other.blocks[tier]) if not np.array_equal(mine, theirs)]
        return found


def traffic(policy: HostPolicy, seed: int, steps: int = 300) -> Iterator[tuple[State, Any]]:
    """Random commands of every kind: each event, and the state that it is about to meet."""
    ordinary = runpy.run_path(str(ROOT / "docs" / "generate.py"))["_command"]
    rng = random.Random(seed)
    host = (0, 0) if policy == HostPolicy.OFF else (8, 4)
    state = genesis(LedgerOpened(1, 12, *host, policy, 1, "", ""))
    tiers = [Tier.DEVICE] if policy == HostPolicy.OFF else list(Tier)
    for number in range(steps):
        rare: list[commands.Command] = [
            commands.Resize(rng.choice(tiers), rng.randrange(8, 16)),
            commands.LoseTier(rng.choice(tiers), "gone"),
            commands.StartEpoch(state.epoch + 1, number),
        ]
        wanted = rng.choice(rare) if not number % 7 else ordinary(state, rng, number)
        if wanted is None:
            continue
        try:
            events = decide(state, wanted)
        except CommandRejected:
            continue
        for event in events:
            yield state, event


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_a_picture_that_follows_equals_one_that_is_painted_anew(policy: HostPolicy) -> None:
    seen: set[str] = set()
    for seed in range(6):
        picture = None
        for state, event in traffic(policy, seed):
            if picture is None:
                picture = Picture(state)
                page = Page(picture.keyframe())
            page.apply(picture.step(event))
            seen.add(type(event).__name__)
            anew = Picture(restore(snapshot(state)))
            assert not page.differs(Page(anew.keyframe())), event
    wanted = {kind.__name__ for kind in KINDS.values()}
    wanted -= {"LedgerOpened", "AllocationRefused", "WorkerJoined", "WorkerLost", "DigestTaken"}
    if policy == HostPolicy.OFF:
        wanted -= {"TransferStarted", "TransferFinished", "QuarantineEnded"}
    assert wanted <= seen


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_every_block_is_drawn_as_its_owner_has_it(policy: HostPolicy) -> None:
    """Against :func:`statemachine.ownership.owners`, which knows nothing of pictures."""
    kinds: dict[str, set[Kind]] = {
        "free": {Kind.FREE},
        "run": {Kind.PINNED, Kind.EVICTABLE, Kind.ARRIVING},
        "request": {Kind.PRIVATE},
        "transfer": {Kind.HELD},
        "quarantined": {Kind.QUARANTINED},
    }
    drawn: Counter[int] = Counter()
    for seed in range(5):
        picture = None
        for state, event in traffic(policy, seed):
            picture = picture or Picture(state)
            picture.step(event)
            page = Page(picture.keyframe())
            for tier in Tier:
                for name, ids in owners(state, tier):
                    number = 0 if name == "free list" else int(re.findall(r"\d+", name)[-1])
                    for block in ids:
                        kind, owner = (array[block] for array in page.blocks[tier.name.lower()])
                        assert kind in kinds[name.split()[0]] and owner == number, (event, tier, block, name)
                        drawn[kind] += 1
    assert set(drawn) >= {Kind.FREE, Kind.PRIVATE, Kind.PINNED, Kind.EVICTABLE}
    if policy == HostPolicy.EXCLUSIVE:
        assert set(drawn) == set(Kind)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "run.kvlog"
    options = RunOptions(device_blocks=400, host_blocks=800, data=False, in_flight=4, record=path)
    Run(sample.generate(300, seed=3), options).execute()
    return path


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    with Log(open_source(str(path))) as log:
        yield log


def played(log: Log, at: int) -> Page:
    window = json.loads(log.window(at))
    page = Page(window["keyframe"])
    for event in window["events"][: at - window["start"] + 1]:
        page.apply(event)
    return page


def test_a_window_played_to_any_event_is_the_state_there(path: Path, log: Log) -> None:
    with open_source(str(path)) as source:
        for at in (1, 2, 256, 257, 700, 701, 512, log.last):  # on from the last window, and back
            assert not played(log, at).differs(Page(Picture(source.at(at)).keyframe())), at
    window = json.loads(log.window(300))
    assert [event["n"] for event in window["events"]] == [*range(257, 513)]
    assert all(event["text"] and event["t"] > 1e12 for event in window["events"])
    for outside in (0, log.last + 1):
        with pytest.raises(SourceError, match="has the events 1 to"):
            log.window(outside)


def test_a_timeline_counts_every_event_and_samples_states(path: Path, log: Log, monkeypatch: Any) -> None:
    monkeypatch.setattr(view_log, "_EXACT", 0)
    with open_source(str(path)) as source:
        kinds = Counter(type(entry.event).__name__ for entry in source.entries())
        whole = log.timeline(1, log.last, 40)
        assert {name: sum(counts) for name, counts in whole["kinds"].items() if sum(counts)} == kinds
        assert len(whole["last"]) <= 40 and whole["start"] == 1 and whole["last"][-1] == log.last
        for i in (0, len(whole["last"]) // 2, -1):
            state = source.at(whole["last"][i])
            assert whole["device_free"][i] == len(state.device.free)
            assert whole["device_evictable"][i] == state.evictable
            assert whole["host_free"][i] == len(state.host.free) and whole["requests"][i] == len(state.requests)
            assert whole["device_room_min"][i] <= whole["device_free"][i] + whole["device_evictable"][i]
        state = source.at(log.last)
        assert sum(whole["queried_blocks"]) == state.counters.queried_blocks
        assert sum(whole["device_evicted_blocks"]) == state.counters.device_evicted_blocks > 0
        part = log.timeline(300, 600, 10)
        assert part["start"] <= 300 and part["last"][-1] >= 600 and len(part["last"]) < 10
        assert sum(map(sum, part["kinds"].values())) == part["last"][-1] - part["start"] + 1


def test_a_close_look_at_a_timeline_is_exact(path: Path, log: Log) -> None:
    close = log.timeline(300, 399, 100)
    assert close["start"] == 300 and close["last"] == [*range(300, 400)]
    with open_source(str(path)) as source:
        for at in (300, 350, 399):
            assert close["device_free"][at - 300] == len(source.at(at).device.free)
        assert sum(close["queried_blocks"]) == (
            source.at(399).counters.queried_blocks - source.at(299).counters.queried_blocks
        )


def test_ten_million_events_are_a_few_thousand_buckets() -> None:
    state = genesis(LedgerOpened(1, 12, 0, 0, HostPolicy.OFF, 1, "", ""))
    timeline = Timeline()
    for last in range(128, 10_000_001, 128):
        timeline.add(last, last, [2] * 128, state)
    timeline = Timeline.unpack(timeline.pack())
    whole = timeline.buckets(1, 10_000_000, 1500)
    assert len(whole["last"]) == 1500 and sum(whole["kinds"]["RequestMatched"]) == 10_000_000
    assert timeline.buckets(5_000_000, 5_000_500, 1500)["start"] <= 5_000_000
    assert timeline.buckets(20_000_000, 20_000_001, 10)["last"] == []
    for damaged in (b"", b"nonsense", timeline.pack()[:-3]):
        with pytest.raises(ValueError, match="timeline"):
            Timeline.unpack(damaged)


def test_a_log_that_contradicts_itself_is_shown_up_to_there(path: Path, tmp_path: Path) -> None:
    reader = KvlogReader(path)
    records = reader.poll()
    reader.close()
    dropped = next(r.sequence for r in records if r.sequence > 400 and KINDS[r.kind].__name__ == "BlocksCached")
    kept = [r for r in records if r.sequence != dropped]
    wrong = tmp_path / "wrong.kvlog"
    with KvlogWriter(wrong, schema_hash=codec.SCHEMA_HASH) as writer:
        writer.write([r._replace(sequence=i, flags=3) for i, r in enumerate(kept, 1)])
    with Log(open_source(str(wrong))) as log:
        said = log.summary()["contradiction"]
        assert dropped <= log.last + 1 < len(records) - 1 and f"event {log.last + 1}" in said
        assert json.loads(log.window(log.last))["events"][-1]["n"] == log.last
        assert log.timeline(1, log.last, 10)["last"][-1] == log.last
        with pytest.raises(SourceError):
            log.window(log.last + 1)


class Client:
    """One user of a running server."""

    def __init__(self, server: ViewServer) -> None:
        self.port = server.server_address[1]
        self.secret = server.secret

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        result = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return result

    def ask(self, question: str) -> Any:
        return json.loads(self.get(f"/{self.secret}/{question}")[2])


Serve = Callable[[Log], Client]


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[tuple[ViewServer, threading.Thread]] = []

    def start(log: Log) -> Client:
        server = ViewServer(log)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        running.append((server, thread))
        return Client(server)

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_server_answers_its_page_only(log: Log, serve: Serve) -> None:
    client = serve(log)
    own = f"/{client.secret}/"
    status, headers, body = client.get(own)
    assert status == 200 and b"page.js" in body
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["cache-control"] == "no-store" and headers["referrer-policy"] == "no-referrer"
    assert not [name for name in headers if name.startswith("access-control")]
    for file in re.findall(r'(?:src|href)="([^"]+)"', body.decode()):
        assert client.get(own + file)[0] == 200
    refused = {
        404: ["/", "/summary", f"/{client.secret[:-1]}/", f"/{client.secret}x/summary", own + "nothing"],
        400: [own + "window", own + "window?at=x", own + f"window?at={'9' * 30}", own + "timeline?from=1&to=9"],
    }
    for path in ("../log.py", "..%2flog.py", "/etc/passwd", "page.html", "%00"):
        refused[404].append(own + path)
    for wanted, paths in refused.items():
        for path in paths:
            status, _, body = client.get(path)
            assert status == wanted and json.loads(body)["error"] and b"Traceback" not in body, path
    assert client.get(own, Host="evil.example")[0] == 403
    assert client.get(own, Host=f"evil.example:{client.port}")[0] == 403
    assert client.get(own, Host=f"localhost:{client.port}")[0] == 200
    assert client.get(own + "summary", Sec_Fetch_Site="cross-site")[0] == 403
    assert client.get(own + "summary", Sec_Fetch_Site="same-origin")[0] == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.get(own, method=method)[0] == 501


def test_what_the_server_says(path: Path, log: Log, serve: Serve) -> None:
    client = serve(log)
    summary = client.ask("summary")
    assert (summary["first"], summary["last"], summary["live"], summary["words"]) == (1, log.last, False, False)
    assert client.ask("window?at=300") == json.loads(log.window(300))
    assert len(client.ask(f"timeline?from=1&to={log.last}&buckets=50")["last"]) <= 60
    assert "has the events" in client.ask("window?at=99999999")["error"]
    events = client.ask("window?at=600")["events"]
    matched = next(event for event in events if summary["kinds"][str(event["k"])] == "RequestMatched")
    request = max(map(int, matched["requests"]))
    life = client.ask(f"explain?type=request&id={request}&at={log.last}")
    assert life["lines"][0]["n"] == matched["n"] and life["lines"][0]["text"].startswith("request ")
    assert client.ask(f"neighbour?type=request&id={request}&at={matched['n'] - 1}&direction=1") == {"n": matched["n"]}
    assert client.ask(f"neighbour?type=request&id={request}&at={matched['n']}&direction=-1") == {"n": None}
    for line in life["lines"]:
        direction, beside = (1, line["n"] - 1) if line["n"] == matched["n"] else (-1, line["n"] + 1)
        found = client.ask(f"neighbour?type=request&id={request}&at={beside}&direction={direction}")
        assert found == {"n": line["n"]}
    block = matched_block(client, log.last)
    history = client.ask(f"explain?type=device&id={block}&at={log.last}")
    assert history["now"] and history["lines"] == sorted(history["lines"], key=lambda line: line["n"])
    run = next(iter(json.loads(log.window(log.last))["keyframe"]["runs"]))
    assert client.ask(f"explain?type=run&id={run}&at={log.last}")["lines"]
    assert "can be explained" in client.ask("explain?type=../etc&id=1&at=5")["error"]
    assert "no device block" in client.ask("explain?type=device&id=400&at=5")["error"]
    assert client.ask("find?text=300") == {"n": 300}
    name = life["lines"][0]["text"].split("'")[1]
    assert client.ask(f"find?text=request+{name}") == {"subject": {"type": "request", "id": request}}
    assert "no place in a log" in client.ask("find?text=somewhere")["error"]


def matched_block(client: Client, last: int) -> int:
    """A device block that the last window has granted."""
    events = client.ask(f"window?at={last}")["events"]
    return int(next(event["device"][0][0] for event in events if "device" in event))


def test_prompts_stay_hidden_unless_asked_for(path: Path, serve: Serve) -> None:
    for allowed in (False, True):
        with Log(open_source(str(path)), words=allowed) as log:
            client = serve(log)
            block = matched_block(client, log.last)
            run = next(iter(json.loads(log.window(log.last))["keyframe"]["runs"]))
            history = json.dumps(client.ask(f"explain?type=device&id={block}&at={log.last}"))
            answer = client.ask(f"words?run={run}&at={log.last}")
            assert ("tokens " in history) == allowed and "hash " in history
            if allowed:
                assert len(answer["words"][0]) == 16 and "no run" in client.ask("words?run=99999999&at=5")["error"]
            else:
                assert "--words" in answer["error"] and "words" not in answer


def test_a_living_ledger_is_followed_and_not_disturbed(serve: Serve) -> None:
    name = f"view-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=64, ranks=0)) as manager:
        manager.admit("a", [*range(40)])
        with Log(open_source(name)) as log:
            client = serve(log)
            before = client.ask("summary")
            assert before["live"] and before["last"] == manager.next_sequence - 1
            assert len(client.ask(f"window?at={before['last']}")["events"]) == before["last"]
            manager.cache("a")
            manager.release("a")
            after = client.ask("summary")
            assert after["last"] == manager.next_sequence - 1 > before["last"]
            assert client.ask(f"window?at={after['last']}")["events"][-1]["n"] == after["last"]
            assert client.ask(f"timeline?from=1&to={after['last']}&buckets=99")["last"][-1] == after["last"]
            rows = len(log._rows(after["last"]))
            assert len(log._rows(after["last"])) == rows
            manager.admit("b", [*range(40)])
            assert len(log._rows(manager.next_sequence - 1)) == rows + 1
            assert not played(log, log.last).differs(Page(Picture(restore(snapshot(manager.state))).keyframe()))


def test_a_ledger_that_goes_away_is_a_clear_error(serve: Serve) -> None:
    name = f"view-gone-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=64, ranks=0)) as manager:
        manager.admit("a", [*range(40)])
        log = Log(open_source(name))
        client = serve(log)
        assert client.ask("summary")["live"]
    for question in ("summary", "window?at=1", "timeline?from=1&to=3&buckets=10", "explain?type=device&id=1&at=2"):
        assert name in client.ask(question)["error"]
    log.close()


def test_a_ledger_that_has_dropped_its_beginning_is_shown_from_its_snapshot_on() -> None:
    name = f"view-cut-{os.getpid()}"
    config = CacheConfig(device_blocks=64, ranks=0, segment_bytes=64 << 10, retain_bytes=128 << 10)
    with CacheManager.create(name, config) as manager:
        number = 0
        while open_source(name).first == 1:
            manager.admit(str(number), np.arange(number, number + 640, dtype=np.int32))
            manager.release(str(number))
            number += 1
        with Log(open_source(name)) as log, pytest.raises(SourceError, match="there is no state to show"):
            log.prepare()
        known = manager.next_sequence - 1
        snapshots.write(name, known, snapshot(manager.state))
        manager.admit("x", np.arange(40, dtype=np.int32))
        with Log(open_source(name)) as log:
            log.prepare()
            assert log.summary()["first"] == known + 1 and log.last == manager.next_sequence - 1
            assert not played(log, log.last).differs(Page(Picture(restore(snapshot(manager.state))).keyframe()))
            timeline = log.timeline(1, log.last, 100)
            assert timeline["start"] == known + 1 and sum(timeline["queried_blocks"]) == 2
        snapshots.remove(name, known)


def test_an_empty_recording_is_nothing_to_show(tmp_path: Path) -> None:
    KvlogWriter(tmp_path / "empty.kvlog", schema_hash=codec.SCHEMA_HASH).close()
    done = kvledger(str(tmp_path / "empty.kvlog"))
    assert done.returncode == 2 and "no event" in done.stderr and done.stderr.count("\n") == 1


class _Scripts(HTMLParser):
    """The scripts of a page, and every tag that is not the page's own."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags[tag] += 1
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def hostile_log(path: Path) -> None:
    """Requests whose names are attacks."""
    name = f"hostile-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=64, ranks=0)) as manager:
        for turn in range(20):
            manager.admit(f"{HOSTILE} {turn}", [*range(40 + 4 * turn)])
            manager.cache(f"{HOSTILE} {turn}")
            if turn < 19:
                manager.release(f"{HOSTILE} {turn}")
        reader = LogReader(name)
        with KvlogWriter(path, schema_hash=codec.SCHEMA_HASH) as writer:
            writer.write(reader.poll())
        reader.close()


def test_an_exported_file_is_bounded_private_and_says_what_it_leaves_out(path: Path, log: Log, tmp_path: Path) -> None:
    file = tmp_path / "view.html"
    assert export(log, file, 300, 700) == (300, 700)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert not re.findall(r"(?:src|href)\s*=|https?://|url\(|@import", text.replace("http-equiv", ""))
    content = json.loads(_Scripts(text).scripts[0])
    assert [event["n"] for event in content["window"]["events"]] == [*range(300, 701)]
    assert "300 to 700 of 1 to" in content["summary"]["exported"] and content["overview"]["last"][-1] == log.last
    page = Page(content["window"]["keyframe"])
    for event in content["window"]["events"]:
        page.apply(event)
    with open_source(str(path)) as source:
        assert not page.differs(Page(Picture(source.at(700)).keyframe()))
    with pytest.raises(SourceError, match="File exists"):
        export(log, file)
    for start, stop in ((0, 5), (5, 4), (1, log.last + 1)):
        with pytest.raises(SourceError, match="there are the events 1 to"):
            export(log, tmp_path / "no.html", start, stop)
    assert not (tmp_path / "no.html").exists() and MOST_EVENTS == 20_000


def test_nothing_in_a_log_becomes_markup(tmp_path: Path) -> None:
    hostile_log(tmp_path / "hostile.kvlog")
    with Log(open_source(str(tmp_path / "hostile.kvlog"))) as log:
        export(log, tmp_path / "hostile.html")
    text = (tmp_path / "hostile.html").read_text()
    page = _Scripts(text)
    assert HOSTILE in json.loads(page.scripts[0])["window"]["events"][-1]["requests"]["20"][0]
    assert not page.tags["img"] and page.tags["script"] == 2 and "<img" not in text
    for script in (ROOT / "kvledger" / "view" / "page").glob("*.js"):
        risky = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function"
        assert not re.findall(risky, script.read_text())


def kvledger(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvledger.cli", "view", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_wrong_input_is_one_line_and_exit_code_2(path: Path, tmp_path: Path, serve: Serve, log: Log) -> None:
    port = str(serve(log).port)
    (tmp_path / "text.kvlog").write_text("hello")
    (tmp_path / "there.html").write_text("mine")
    for arguments, said in [
        (["no-such-ledger"], "neither a .kvlog file nor a ledger"),
        ([str(tmp_path / "absent.kvlog")], "No such file"),
        ([str(tmp_path / "text.kvlog")], "not a .kvlog file"),
        ([str(path), "--port", port], f"cannot listen on port {port}"),
        ([str(path), "--at", "9999999"], "9999999"),
        ([str(path), "--at", "soon"], "no place in a log"),
        ([str(path), "--from", "5"], "--export"),
        ([str(path), "--export", str(tmp_path / "there.html")], "File exists"),
        ([str(path), "--export", str(tmp_path / "no" / "x.html")], "No such file"),
        ([str(path), "--export", str(tmp_path / "x.html"), "--from", "9", "--to", "3"], "not 9 to 3"),
        ([str(path), "--export", str(tmp_path / "x.html"), "--words"], "never holds prompts"),
    ]:
        done = kvledger(*arguments)
        assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and not done.stdout, done
        assert done.stderr.startswith("error ") and said in done.stderr, done.stderr
    assert kvledger(str(path), "--port", "70000").returncode == 2
    assert (tmp_path / "there.html").read_text() == "mine" and not (tmp_path / "x.html").exists()


def test_the_command_serves_until_it_is_interrupted(path: Path, tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-m", "kvledger.cli", "view", str(path), "--at", "300"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/#at=300\n", process.stdout.readline())
            assert found, process.stderr.read()
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
            connection.request("GET", f"/{found[2]}/summary")
            assert json.loads(connection.getresponse().read())["name"] == str(path)
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(30) == 0 and process.stderr.read() == ""
            connection.close()
    done = kvledger(str(path), "--export", str(tmp_path / "some.html"), "--to", "400")
    assert done.returncode == 0 and "events 1 to 400" in done.stdout
