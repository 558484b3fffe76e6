"""What operators see of pushes between instances: metrics and ``kvledger pushes``."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from kvledger import CacheManager
from kvledger.cli import app
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.telemetry.exporter import Exporter
from kvledger.telemetry.table import METRICS
from tests.handoff.split_instance import CONFIG, LAYERS, prompt
from tests.telemetry.test_metrics import Served, scraped
from tests.waiting import wait_until

PUSHES = {metric.name for metric in METRICS if metric.pushes}
BLOCKS = 6
PUSH_BYTES = BLOCKS * CONFIG.ranks * LAYERS * CONFIG.block_bytes


@pytest.fixture
def pair() -> Iterator[tuple[CacheManager, CacheManager]]:
    names = f"prefill-seen-{os.getpid()}", f"decode-seen-{os.getpid()}"
    with CacheManager.create(names[0], CONFIG) as prefill, CacheManager.create(names[1], CONFIG) as decode:
        yield prefill, decode


def listed(ledger: str, *more: str) -> Any:
    done = CliRunner().invoke(app, ["pushes", ledger, *more])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()] if "--json" in more else done.stdout


def push(key: str, sender: Sender, receiver: Receiver, prefill: CacheManager, decode: CacheManager, step: int) -> None:
    prefill.admit(key, prompt(1), blocks=BLOCKS)
    decode.match(key, prompt(1))
    sender.send(key, receiver.reserve(key, BLOCKS, peer=prefill.name), step=step)


def levels(exporter: Exporter) -> dict[tuple[str, tuple[str, ...]], float]:
    exporter._picture = exporter._take()
    return {(sample.name, sample.labels): sample.value for sample in exporter.picture()[1] if sample.name in PUSHES}


def until(exporter: Exporter, wanted: Callable[[dict[tuple[str, tuple[str, ...]], float]], bool]) -> None:
    wait_until("the exporter says so", lambda: wanted(levels(exporter)))


def test_pushes_are_counted_and_listed(pair: tuple[CacheManager, CacheManager]) -> None:
    prefill, decode = pair
    exporter = Exporter(prefill.name)
    assert not levels(exporter) and not exporter._pushes.known  # there is no sender
    assert CliRunner().invoke(app, ["pushes", prefill.name]).exit_code == 2

    sender, receiver = Sender(prefill), Receiver(decode)
    until(exporter, lambda found: found.get(("kvledger_messagers", ())) == 2)
    assert listed(prefill.name) == "nothing has been pushed\n"

    push("sent", sender, receiver, prefill, decode, step=0)
    wait_until("the push is done", lambda: [done.outcome.name for done in sender.poll()] == ["DONE"])
    push("given up", sender, receiver, prefill, decode, step=1)  # its step never comes
    prefill.release("given up")
    push("waits", sender, receiver, prefill, decode, step=1)
    until(exporter, lambda found: not found["kvledger_messager_lag_records", ("1",)])
    found = levels(exporter)
    assert {labels: value for (name, labels), value in found.items() if name == "kvledger_pushes_total"} == {
        ("done",): 1,
        ("failed",): 1,
        ("timed_out",): 0,
    }
    assert found["kvledger_push_bytes_total", ()] == PUSH_BYTES and found["kvledger_pushes_in_flight", ()] == 1
    histogram = exporter.picture()[2]["kvledger_push_seconds", ()]
    assert sum(histogram.counts) == 1 and 0 < histogram.sum < 60

    rows = listed(prefill.name, "--json")
    assert [(row["request"], row["outcome"], row["step"]) for row in rows] == [
        ("sent", "done", 0),
        ("given up", "failed", 1),
        ("waits", "", 1),
    ]
    assert all(row["to"] == decode.name and row["blocks"] == BLOCKS for row in rows)
    assert rows[0]["seconds"] > 0 and rows[2]["seconds"] is None and "released" in rows[1]["reason"]
    table = listed(prefill.name, "--most", "2")
    assert "1 older" in table and "under way" in table and "sent" not in table.replace("prefill-seen", "")

    # a pusher that dies is missed, and comes back
    os.kill(sender.pid(1) or 0, signal.SIGKILL)
    until(exporter, lambda found: found["kvledger_messagers", ()] == 1)
    wait_until("both pushers are there", lambda: levels(exporter)["kvledger_messagers", ()] == 2, meanwhile=sender.fold)

    sender.close()  # the push that is under way fails, which its log said before it went
    found = levels(exporter)
    assert found["kvledger_pushes_total", ("failed",)] == 2 and not found["kvledger_pushes_in_flight", ()]
    assert ("kvledger_messagers", ()) not in found
    sender = Sender(prefill)  # another one is followed too, and the totals go on
    until(exporter, lambda found: found.get(("kvledger_messagers", ())) == 2)
    assert levels(exporter)["kvledger_pushes_total", ("done",)] == 1
    exporter.close()


def test_the_metrics_process_exports_them(pair: tuple[CacheManager, CacheManager]) -> None:
    prefill, decode = pair
    sender, receiver = Sender(prefill), Receiver(decode)
    served = Served(prefill.name)
    push("sent", sender, receiver, prefill, decode, step=0)
    wait_until("the push ends", sender.poll)
    text = served.until(lambda found: found["kvledger_pushes_total"].get(("done",)) == 1)
    found = scraped(text)
    assert found["kvledger_push_seconds_count"][()] == 1 and found["kvledger_push_bytes_total"][()] == PUSH_BYTES
    assert set(found["kvledger_messager_lag_records"]) == {("0",), ("1",)}
    prefill.close()
    assert served.end() == 0


def test_the_decode_instance_tells_where_blocks_came_from(pair: tuple[CacheManager, CacheManager]) -> None:
    prefill, decode = pair
    sender, receiver = Sender(prefill), Receiver(decode)
    push("sent", sender, receiver, prefill, decode, step=0)
    wait_until("the push arrives", receiver.poll, meanwhile=sender.poll)
    done = CliRunner().invoke(app, ["explain", decode.name, "request", "sent"])
    assert done.exit_code == 0 and "(receiving " in done.stdout, done.stdout
