"""The debugger on a long recording of a cache of 65,536 blocks: seeking, explaining, checking, the page, memory.

``python -m benchmarks.debugger [--quick] [--file FILE.kvlog] [EVENTS]``: records so many events (default: 200,000;
0.3 GB of disk and 15 s per million), opens the recording for the first time (another 0.06 GB and 30 s per million),
asks questions all over it, and opens it in Chromium, where that and chromedriver are installed. With ``--file``
recording and index are kept there, and used if they are there already.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import figures as f
from ipc import KvlogReader, KvlogWriter, LogReader
from kvledger import CacheConfig, CacheManager
from kvledger.debugger import Source, SourceError, open_source
from kvledger.debugger.explain.explain import explain_block, explain_hash, explain_request
from kvledger.debugger.source.hashes import hash_of
from kvledger.debugger.verify.check import check_log
from statemachine.events import Tier
from statemachine.records import codec
from statemachine.records.replay import Replay

_BLOCKS, _BLOCK = 65_536, 16
_QUESTIONS = 40
_CHECKED = 100_000
_LATER = 200_000
"""Events after which what was cached is no more."""
_REPLAYED = 200_000
"""Events that are replayed to know what replaying all costs."""


class Clock:
    """Wall and CPU time since it was made."""

    def __init__(self) -> None:
        self._begun, self._used = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Milliseconds of both."""
        return (time.perf_counter() - self._begun) * 1e3, (time.process_time() - self._used) * 1e3


def record(path: Path, events: int) -> None:
    """Requests of 8 to 64 blocks, half of them continuing an earlier one."""
    rng = np.random.default_rng(0)
    known = [rng.integers(0, 128_000, 16 * _BLOCK, np.int32) for _ in range(4096)]
    config = CacheConfig(block_size=_BLOCK, device_blocks=_BLOCKS)
    with CacheManager.create(f"long-{os.getpid()}", config) as manager:
        reader = LogReader(manager.name)
        with KvlogWriter(path, schema_hash=codec.SCHEMA_HASH) as writer:
            number = 0
            while manager.next_sequence <= events:
                slot = int(rng.integers(len(known)))
                new = rng.integers(0, 128_000, int(rng.integers(8, 33)) * _BLOCK, np.int32)
                tokens = np.concatenate([known[slot], new]) if number % 2 else new
                known[slot] = tokens[: 32 * _BLOCK]
                key = str(number)
                manager.admit(key, tokens)
                manager.cache(key)
                manager.release(key)
                number += 1
                if not number % 512:
                    writer.write(reader.poll())
            writer.write(reader.poll())
        reader.close()


def opening(path: Path) -> dict[str, Any]:
    """Open it; the first time this writes the index."""
    clock = Clock()
    with open_source(str(path)) as source:
        wall, cpu = clock.read()
        events = source.last
    size, index = path.stat().st_size, path.with_name(path.name + ".index").stat().st_size
    return {"wall": wall, "cpu": cpu, "events": events, "size": size, "index": index, "memory": _memory()}


def questions(path: Path) -> dict[str, Any]:
    """Ask them all; returns pairs of wall and CPU times by question, events checked per second, MB of memory."""
    with open_source(str(path)) as source:
        draw = random.Random(0)
        places = [draw.randint(1, source.last) for _ in range(_QUESTIONS)]
        asked = [max(place, min(source.last, _LATER)) for place in places]
        later = [min(at + _LATER, source.last) for at in asked]
        blocks = [draw.randrange(_BLOCKS) for _ in asked]
        requests = [f"#{max(at // 5 - 500, 1)}" for at in asked]
        names = [_hash(source, at, draw) for at in asked]
        answers: dict[str, Any] = {
            "any state": timed(source.at, places),
            "explain a block": timed(lambda b, at: explain_block(source, b, Tier.DEVICE, at), blocks, asked),
            "explain a request": timed(lambda r, at: explain_request(source, r, at), requests, asked),
            "explain a hash, cached": timed(lambda name, at: explain_hash(source, name, at), names, asked),
            "explain a hash, cached no more": timed(lambda name, at: explain_hash(source, name, at), names, later),
            "explain a hash that never was": timed(lambda at: _unknown(source, at), later[:5]),
        }
        clock = Clock()
        checked = check_log(source, max(source.last - _CHECKED + 1, 1), source.last)
        assert checked.violation is None
        answers["checked"] = checked.events / clock.read()[1] * 1e3
    answers["memory"] = _memory()
    return answers


def timed(question: Callable[..., object], *about: list[Any]) -> list[tuple[float, float]]:
    spent = []
    for one in zip(*about):
        clock = Clock()
        question(*one)
        spent.append(clock.read())
    return spent


def _hash(source: Source, at: int, draw: random.Random) -> str:
    state = source.at(at)
    return hash_of(state, draw.choice(list(state.nodes.values())), 0).hex()


def _unknown(source: Source, at: int) -> None:
    try:
        explain_hash(source, "00" * 16, at)
    except SourceError:
        return
    raise AssertionError("something has that hash")


def view(path: Path) -> dict[str, Any]:
    """``kvledger view``: from the command to the page, then other places of it."""
    clock = Clock()
    command = [sys.executable, "-m", "kvledger.cli", "view", str(path)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        address = clock.read()[0]
        page, browser = _page(url)
        last = json.loads(_get(url + "summary"))["last"]
        draw = random.Random(1)
        places = [draw.randint(1, last) for _ in range(_QUESTIONS)]
        elsewhere = timed(lambda at: _get(f"{url}window?at={at}"), places)
    finally:
        server.terminate()
        server.stdout.close()
        _, _, used = os.wait4(server.pid, 0)
    return {
        "address": address,
        "page": page,
        "browser": browser,
        "elsewhere": elsewhere,
        "cpu": (used.ru_utime + used.ru_stime) * 1e3,
        "memory": used.ru_maxrss / 1e3,
    }


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:
        return bytes(answer.read())


def _page(url: str) -> tuple[float, bool]:
    """ms until the page is ready in a browser, or without one, until the server has sent all that is in it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        clock = Clock()
        last = json.loads(_get(url + "summary"))["last"]
        for question in ("", f"timeline?from=1&to={last}&buckets=1400", f"window?at={last}"):
            _get(url + question)
        return clock.read()[0], False
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        clock = Clock()
        browser.get(url)
        ready = "return document.body.dataset.ready === 'yes'"
        WebDriverWait(browser, 60, 0.01).until(lambda page: page.execute_script(ready))
        return clock.read()[0], True
    finally:
        browser.quit()


def replaying(path: Path, events: int) -> float:
    """ms of CPU time of a replay from the beginning, which is what a debugger without an index would do."""
    reader = KvlogReader(path)
    clock = Clock()
    replay = Replay(compare=False)
    while replay.events < _REPLAYED and (records := reader.poll(1)):
        replay.feed(records)
    spent = clock.read()[1]
    reader.close()
    return spent * events / replay.events


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


_PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {"opening": opening, "questions": questions, "view": view}


def apart(part: str, path: Path) -> Any:
    """One part in a process of its own, to know its memory."""
    command = [sys.executable, "-m", "benchmarks.debugger", "--part", part, "--file", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def figures(quick: bool, events: int = 0, file: Path | None = None) -> tuple[list[f.Figure], list[str]]:
    """Beside replaying the whole recording."""
    with tempfile.TemporaryDirectory() as folder:
        path = file or Path(folder) / "long.kvlog"
        if not path.exists():
            record(path, events or (3_000 if quick else 200_000))
        fresh = not path.with_name(path.name + ".index").exists()
        opened = apart("opening", path)
        asked, viewed = apart("questions", path), apart("view", path)
        events = opened["events"]
        whole = replaying(path, events)

    made = []

    def figure(name: str, unit: str, ours: float, against: str, theirs: float, **more: Any) -> None:
        made.append(f.figure_of(name, unit, [ours], against, [theirs], **more))

    all_of_it = "replaying all"
    if fresh:
        figure(f"first opening, {events:,} events", "ms CPU", opened["cpu"], all_of_it, whole, details=opened)
    figure("index", "MB", opened["index"] / 1e6, "recording", opened["size"] / 1e6, least_ratio=1)
    rate, memory = asked.pop("checked"), asked.pop("memory")
    for name, times in asked.items():
        wall, cpu = zip(*times)
        limit = 200.0 if name == "any state" else 1000.0
        figure(f"{name}, p50", "ms CPU", statistics.median(cpu), all_of_it, whole, at_most=limit)
        figure(f"{name}, longest of {len(cpu)}", "ms CPU", max(cpu), all_of_it, whole, at_most=limit)
        figure(f"{name}, longest of {len(cpu)}", "ms", max(wall), all_of_it, whole, at_most=limit)
    made.append(
        f.Figure(
            name="all invariants at every event",
            unit="events per CPU second",
            ours=rate,
            against="replaying alone",
            theirs=events / whole * 1e3,
            ratios=[rate / (events / whole * 1e3)],
            at_least=20_000,
        )
    )
    place = "in Chromium" if viewed["browser"] else "all of it sent"
    page = viewed["address"] + viewed["page"]
    figure(f"view: from the command to the page, {place}", "ms", page, all_of_it, whole, at_most=2000.0, details=viewed)
    elsewhere = [wall for wall, _ in viewed["elsewhere"]]
    figure("view: another place sent, p50", "ms", statistics.median(elsewhere), all_of_it, whole)
    figure(f"view: another place sent, longest of {len(elsewhere)}", "ms", max(elsewhere), all_of_it, whole)
    most = max(memory, viewed["memory"], opened["memory"])
    size = events * 2.0e-4  # what the records themselves take is no peer, but a scale: 200 bytes each
    figure("memory", "MB at most", most, "200 bytes per event", size, at_most=500.0)
    return made, [] if viewed["browser"] else ["the page in a browser: needs chromium and chromedriver"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.debugger", description="Ask a long recording.")
    parser.add_argument("--quick", action="store_true", help="3,000 events")
    parser.add_argument("--file", type=Path, help="keep recording and index here; use them if they are there")
    parser.add_argument("--part", choices=_PARTS, help=argparse.SUPPRESS)
    parser.add_argument("events", type=int, nargs="?", default=0, metavar="EVENTS")
    chosen = parser.parse_args()
    if chosen.part is not None:
        print(json.dumps(_PARTS[chosen.part](chosen.file)))
    else:
        f.show("debugger", *figures(chosen.quick, chosen.events, chosen.file))


if __name__ == "__main__":
    main()
