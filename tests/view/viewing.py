"""What the tests of the view share: a page without a browser, logs to show, a server and its user."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ipc import KvlogWriter, LogReader
from kvledger import CacheConfig, CacheManager
from kvledger.debugger import open_source
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from kvledger.view.log import Log
from kvledger.view.server import ViewServer
from statemachine.records import codec
from tests.waiting import PATIENCE_S

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


def played(log: Log, at: int) -> Page:
    window = json.loads(log.window(at))
    page = Page(window["keyframe"])
    for event in window["events"][: at - window["start"] + 1]:
        page.apply(event)
    return page


def record(path: Path, requests: int = 300) -> None:
    """A recording of a few thousand events with two tiers."""
    options = RunOptions(device_blocks=400, host_blocks=800, data=False, in_flight=4, record=path)
    Run(sample.generate(requests, seed=3), options).execute()


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


class Client:
    """One user of a running server."""

    def __init__(self, server: ViewServer) -> None:
        self.port = server.server_address[1]
        self.secret = server.secret

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        result = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return result

    def ask(self, question: str) -> Any:
        return json.loads(self.get(f"/{self.secret}/{question}")[2])


@contextlib.contextmanager
def showing(src: str | Path, *, words: bool = False) -> Iterator[Log]:
    """A log to look at."""
    with open_source(str(src)) as source, contextlib.closing(Log(source, words=words)) as log:
        yield log


@contextlib.contextmanager
def serving(src: str | Path, *, words: bool = False) -> Iterator[ViewServer]:
    """A running server."""
    with showing(src, words=words) as log, ViewServer(log) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
