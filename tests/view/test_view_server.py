"""``kvledger view`` from outside: the server and its locks, living ledgers, exported files, the command line."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ipc import KvlogWriter
from kvledger import CacheConfig, CacheManager
from kvledger.debugger import SourceError, open_source
from kvledger.view import log as view_log
from kvledger.view.export import MOST_EVENTS, export
from kvledger.view.log import Log
from kvledger.view.picture import Picture
from statemachine.records import codec
from statemachine.records.snapshot import restore, snapshot
from tests.view.viewing import HOSTILE, Client, Page, hostile_log, played, record, serving, showing
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("view") / "run.kvlog"
    record(path)
    return path


@pytest.fixture
def log(path: Path) -> Iterator[Log]:
    with showing(path) as log:
        yield log


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    with serving(path) as server:
        yield Client(server)


def test_the_server_answers_its_page_only(client: Client) -> None:
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
    for kind, wanted in (("document", 200), ("iframe", 403), ("script", 403)):
        assert client.get(own, Sec_Fetch_Site="cross-site", Sec_Fetch_Dest=kind)[0] == wanted
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert client.get(own, method=method)[0] == 501


def test_what_the_server_says(log: Log, client: Client) -> None:
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


def test_prompts_stay_hidden_unless_asked_for(path: Path) -> None:
    for allowed in (False, True):
        with serving(path, words=allowed) as server:
            client = Client(server)
            last = client.ask("summary")["last"]
            run = next(iter(client.ask(f"window?at={last}")["keyframe"]["runs"]))
            history = json.dumps(client.ask(f"explain?type=device&id={matched_block(client, last)}&at={last}"))
            answer = client.ask(f"words?run={run}&at={last}")
            assert ("tokens " in history) == allowed and "hash " in history
            if allowed:
                assert len(answer["words"][0]) == 16 and "no run" in client.ask("words?run=99999999&at=5")["error"]
            else:
                assert "--words" in answer["error"] and "words" not in answer


def test_a_living_ledger_is_followed_and_not_disturbed() -> None:
    name = f"view-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(block_size=4, device_blocks=64, ranks=0)) as manager:
        manager.admit("a", [*range(40)])
        with serving(name) as server:
            client = Client(server)
            before = client.ask("summary")
            assert before["live"] and before["last"] == manager.next_sequence - 1
            assert len(client.ask(f"window?at={before['last']}")["events"]) == before["last"]
            manager.cache("a")
            manager.release("a")
            after = client.ask("summary")
            assert after["last"] == manager.next_sequence - 1 > before["last"]
            assert client.ask(f"window?at={after['last']}")["events"][-1]["n"] == after["last"]
            assert client.ask(f"timeline?from=1&to={after['last']}&buckets=99")["last"][-1] == after["last"]


def test_the_timeline_and_the_windows_of_a_ledger_grow_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_log, "_EXACT", 0)
    name = f"view-{os.getpid()}"
    config = CacheConfig(block_size=4, device_blocks=64, ranks=0)
    with CacheManager.create(name, config) as manager, showing(name) as log:
        for turn in range(20):
            manager.admit(str(turn), [*range(40 + turn)])
            last = manager.next_sequence - 1
            grown = log.timeline(1, last, 1000)
            assert grown["last"][-1] == log.last == last and sum(map(sum, grown["kinds"].values())) == last
            assert not played(log, last).differs(Page(Picture(restore(snapshot(manager.state))).keyframe()))
            manager.release(str(turn))


def test_a_ledger_that_goes_away_is_a_clear_error() -> None:
    name = f"view-gone-{os.getpid()}"
    manager = CacheManager.create(name, CacheConfig(block_size=4, device_blocks=64, ranks=0))
    manager.admit("a", [*range(40)])
    with serving(name) as server:
        manager.close()
        for question in ("summary", "window?at=1", "timeline?from=1&to=3&buckets=9", "explain?type=device&id=1&at=2"):
            assert name in Client(server).ask(question)["error"]


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
    with showing(tmp_path / "hostile.kvlog") as log:
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
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)


def test_wrong_input_is_one_line_and_exit_code_2(path: Path, tmp_path: Path, client: Client) -> None:
    port = str(client.port)
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
        ([str(path), "--export", str(tmp_path / "x.html"), "--words"], "holds no prompts"),
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
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=PATIENCE_S)
            connection.request("GET", f"/{found[2]}/summary")
            assert json.loads(connection.getresponse().read())["name"] == str(path)
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == 0 and process.stderr.read() == ""
            connection.close()
    done = kvledger(str(path), "--export", str(tmp_path / "some.html"), "--to", "400")
    assert done.returncode == 0 and "events 1 to 400" in done.stdout


def test_an_empty_recording_is_nothing_to_show(tmp_path: Path) -> None:
    KvlogWriter(tmp_path / "empty.kvlog", schema_hash=codec.SCHEMA_HASH).close()
    done = kvledger(str(tmp_path / "empty.kvlog"))
    assert done.returncode == 2 and "no event" in done.stderr and done.stderr.count("\n") == 1
