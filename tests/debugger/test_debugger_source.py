"""Sources: recordings and ledgers, living and dead, tell the same story."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ipc import snapshots
from ipc.ownership import remove_objects
from kvledger import CacheConfig, CacheManager, HostPolicy
from kvledger.debugger import SourceError, open_source
from kvledger.debugger.source import ledger as ledger_source
from kvledger.run import sample
from kvledger.run.run import Run, RunOptions
from statemachine.events import LedgerOpened
from statemachine.records.replay import Replay
from statemachine.records.snapshot import snapshot, state_digest

NAME = f"source-{os.getpid()}"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recording, and the ledger it was made from, whose engine has ended."""
    path = tmp_path_factory.mktemp("source") / "run.kvlog"
    options = RunOptions(device_blocks=300, host_blocks=600, data=False, in_flight=4, record=path, keep=True)
    Run(sample.generate(200, seed=5), options).execute(NAME)
    yield path
    remove_objects(NAME)


@pytest.fixture(autouse=True)
def nothing_left_behind(recorded: Path) -> None:  # the module's ledger is there throughout
    return


def test_a_recording_and_a_dead_ledger_agree(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_source, "_CHECKPOINT_EVERY", 100)
    monkeypatch.setattr(ledger_source, "_MOST_CHECKPOINTS", 3)
    with open_source(str(recorded)) as file, open_source(NAME) as ledger:
        assert (file.first, file.last, file.last_state) == (ledger.first, ledger.last, ledger.last_state)
        assert file.first == 1 and file.last > 600 and not file.damage and not ledger.contradiction
        assert list(file.entries()) == list(ledger.entries())
        assert [e.sequence for e in ledger.entries(17, 40)] == list(range(17, 41))
        digests = {}
        for entry, state in file.replay():
            digests[entry.sequence] = state_digest(state)
        for sequence in (1, 7, 300, 299, 301, file.last, 555, 2):
            assert state_digest(file.at(sequence)) == state_digest(ledger.at(sequence)) == digests[sequence]
        assert [state_digest(s) for _, s in ledger.replay(500, 510)] == [digests[i] for i in range(500, 511)]
        for each in (file, ledger):
            with pytest.raises(SourceError, match="holds the events 1 to"):
                each.at(file.last + 1)
        transactions = list(file.transactions())
        assert [e for transaction in transactions for e in transaction] == list(file.entries())
        assert isinstance(transactions[0][0].event, LedgerOpened) and any(len(t) > 1 for t in transactions)
        inside = next(t[0].sequence for t in transactions if len(t) > 1) + 1
        assert next(file.transactions(inside))[0].sequence > inside


def test_snapshots_of_a_ledger_are_used(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(str(recorded)) as file, open_source(NAME) as ledger:
        snapshots.write(NAME, 400, snapshot(file.at(400)))
        fed: list[int] = []
        real = Replay.feed
        monkeypatch.setattr(Replay, "feed", lambda self, records: (fed.append(len(records)), real(self, records))[1])
        assert state_digest(ledger.at(420)) == state_digest(file.at(420))
        assert fed[0] == 20
        snapshots.write(NAME, 500, b"of another version")
        assert state_digest(ledger.at(510)) == state_digest(file.at(510))
        for sequence in (400, 500):
            snapshots.remove(NAME, sequence)


def test_a_living_ledger_is_followed() -> None:
    name = f"living-{os.getpid()}"
    with CacheManager.create(name, CacheConfig(device_blocks=64)) as manager, open_source(name) as ledger:
        assert ledger.last == 1
        tail = ledger.tail()
        assert tail.poll() == [] and tail.alive
        manager.admit("a", np.arange(40, dtype=np.int32))
        assert [entry.sequence for entry in tail.poll()] == [2, 3]
        assert ledger.last == 3 and "a" in ledger.at(3).numbers
        tail.close()
        tail = ledger.tail(3)
        assert [entry.sequence for entry in tail.poll(1.0)] == [3]
        tail.close()


def test_following_ends_with_the_writer() -> None:
    name = f"ending-{os.getpid()}"
    code = (
        "import sys, numpy as np\n"
        "from kvledger import CacheConfig, CacheManager\n"
        f"manager = CacheManager.create({name!r}, CacheConfig(device_blocks=64))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "manager.admit('a', np.arange(40, dtype=np.int32))\n"
        "import os; os._exit(0)\n"
    )
    engine = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None and engine.stdin is not None
        engine.stdout.readline()
        with open_source(name) as ledger:
            following = ledger.follow()
            engine.stdin.write("go\n")
            engine.stdin.flush()
            assert [entry.sequence for entry in following] == [2, 3]
    finally:
        engine.kill()
        engine.communicate()
        remove_objects(name)


def test_a_ledger_that_has_dropped_its_beginning() -> None:
    name = f"dropped-{os.getpid()}"
    config = CacheConfig(device_blocks=64, segment_bytes=64 << 10, retain_bytes=128 << 10)
    with CacheManager.create(name, config) as manager:
        number = 0
        while True:
            manager.admit(str(number), np.arange(number, number + 640, dtype=np.int32))
            manager.release(str(number))
            number += 1
            with open_source(name) as ledger:
                if ledger.first > 1:
                    break
        manager._retention.stop()  # its snapshots are what usually remains
        for sequence in snapshots.sequences(name):
            snapshots.remove(name, sequence)
        with open_source(name) as ledger:
            with pytest.raises(SourceError, match=r"no snapshot of a state before .* no event on"):
                ledger.at(ledger.last)
            snapshots.write(name, manager.next_sequence - 1, snapshot(manager.state))
            assert state_digest(ledger.at(ledger.last)) == state_digest(manager.state)
            manager.admit("x", np.arange(40, dtype=np.int32))
            assert state_digest(ledger.at(ledger.last)) == state_digest(manager.state)
            with pytest.raises(SourceError, match=r"its states are known from event \d+ on"):
                ledger.at(ledger.first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("absent.kvlog", "cannot read absent.kvlog: "),
        ("no-such-ledger", r"'no-such-ledger' is neither a \.kvlog file nor a ledger; "),
        ("not a name!", r"is neither a \.kvlog file nor a ledger; "),
        ("", r"'' is neither a \.kvlog file nor a ledger; "),
        ("/dev/null", "cannot read /dev/null"),
        (__file__, r"not a \.kvlog file"),
        ("/tmp", "cannot read /tmp: "),
    ],
)
def test_what_is_no_source(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(text)
    assert "\n" not in str(caught.value)


def test_host_policy_of_a_source_is_in_its_state(recorded: Path) -> None:
    with open_source(NAME) as ledger:
        assert ledger.at(1).policy == HostPolicy.EXCLUSIVE
