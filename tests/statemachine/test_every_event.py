"""Every kind of event is known wherever events are told apart, so that a new one cannot be forgotten.

What tells them apart by ``match`` ends in ``assert_never``: ``make check`` finds a kind that is missing, and so does
running a log with every kind through it, which is what happens here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.garbled.engine import Engine
from kvledger.debugger import Source, open_source
from kvledger.debugger.explain.explain import explain_block, explain_request, explain_transfer
from kvledger.debugger.explain.wording import WORDS, Wording
from kvledger.debugger.export.perfetto import write_timeline
from kvledger.debugger.export.plain import entry_fields
from kvledger.debugger.export.rows import rows
from kvledger.debugger.source.replay import decisions
from kvledger.debugger.verify.check import check_log
from kvledger.debugger.verify.diff import differences
from kvledger.debugger.whatif.curve import curve
from kvledger.debugger.whatif.traffic import Again, traffic
from kvledger.debugger.whatif.whatif import Hints, Scenario, what_if
from kvledger.recordings.redaction import redact
from kvledger.telemetry.derivation import OBSERVERS, Derivation
from kvledger.view.picture import Picture
from statemachine.apply import HANDLERS, genesis
from statemachine.decide.derive import DERIVERS
from statemachine.events import (
    KINDS,
    BlocksChosen,
    BlocksComputed,
    BlocksDistrusted,
    BlocksReassigned,
    BlocksTrimmed,
    DigestTaken,
    EngineDeparted,
    EpochStarted,
    Event,
    HostPolicy,
    LedgerOpened,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    SideAllocated,
    SideFreed,
    Tier,
    TransferFinished,
    TransferStarted,
    WeightsLoaded,
    WindowPassed,
)
from statemachine.mentions import FINDERS
from statemachine.records.snapshot import state_digest
from tests.data.generate import GROUPS, drive

EVERY: set[type[Event]] = set(KINDS.values())


@pytest.fixture(
    scope="module", params=[*HostPolicy, GROUPS], ids=lambda param: getattr(param, "name", "groups").lower()
)
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    path = tmp_path_factory.mktemp("every") / "every.kvlog"
    policy, groups = (HostPolicy.OFF, GROUPS) if request.param == GROUPS else (request.param, "")
    host = (0, 0) if policy == HostPolicy.OFF else (10, 5)
    engine = Engine(path, 14, *host, policy, backup_after=1 if groups else 2, groups=groups)
    drive(engine, random.Random(7 if groups else policy))
    engine.close()
    with open_source(str(path)) as source:
        assert state_digest(source.at(source.last)) == state_digest(engine.state)
        yield source


def test_every_table_has_every_event() -> None:
    for table in (HANDLERS, FINDERS, WORDS):
        assert set(table) == EVERY
    assert set(DERIVERS) == EVERY - {LedgerOpened}, "nobody commands a ledger's first event"
    uncounted = {LedgerOpened, BlocksReassigned, BlocksTrimmed, QuarantineEnded, PoolResized, EpochStarted, DigestTaken}
    of_groups = {SideAllocated, WindowPassed, SideFreed}
    uncounted |= {BlocksChosen, EngineDeparted}
    assert set(OBSERVERS) == EVERY - uncounted - {BlocksComputed, BlocksDistrusted, WeightsLoaded} - of_groups


def test_the_log_has_every_event(log: Source) -> None:
    kinds = {type(entry.event) for entry in log.entries()}
    missing = EVERY - kinds
    if log.at(1).policy == HostPolicy.OFF:
        missing -= {TransferStarted, TransferFinished, QuarantineEnded}
    else:
        missing -= {BlocksChosen}  # a manager that is recorded has no host tier here
    if log.at(1).groups:
        missing &= {SideAllocated, WindowPassed, SideFreed, BlocksTrimmed}
    else:
        missing -= {SideAllocated, WindowPassed, SideFreed}
    assert not missing


def test_all_are_put_into_words(log: Source) -> None:
    say = Wording()
    for entry in log.entries():
        text = say(entry.event)
        assert len(text) > 15 and "\n" not in text, entry
        fields = entry_fields(entry)
        assert fields["kind"] == type(entry.event).__name__
        assert (fields["sequence"], fields["time_ns"], fields["step"]) == (entry.sequence, entry.time_ns, entry.step)
    assert len(list(rows(log, words=True))) == log.last


def test_all_are_checked_derived_and_explained(log: Source) -> None:
    assert check_log(log, 1, log.last, every_event_in_full=True).violation is None
    different = [decision for decision in decisions(log, 1, log.last) if not decision.same]
    assert not different, different[0]
    state = log.at(log.last)
    told = set()
    for at in range(20, log.last, 41):
        for tier in Tier:
            for block in range(log.at(at).pool(tier).capacity):
                told.update(fact.text for fact in explain_block(log, block, tier, at).history)
    for number in range(1, state.next_request):
        told.update(fact.text for fact in explain_request(log, f"#{number}", log.last).history)
    for number in range(1, state.next_transfer):
        told.update(fact.text for fact in explain_transfer(log, number, log.last).history)
    phrases = ["goes on with what others have cached", "finds it between two chunks", "has computed its first"]
    if state.groups:
        phrases = ["the window of group 1 has left", "gives back group 2 blocks", "gets group 3 block"]
    for phrase in phrases:
        assert any(phrase in text for text in told), phrase
    assert list(differences(log.at(log.last // 2), state))


def test_all_are_drawn(log: Source, tmp_path: Path) -> None:
    entries = log.entries()
    picture = Picture(genesis(next(entries).event))
    for entry in entries:
        picture.step(entry.event)
    assert picture.keyframe() == Picture(log.at(log.last)).keyframe()
    write_timeline(log, tmp_path / "trace")
    assert (tmp_path / "trace").stat().st_size > 1000


def test_all_are_traffic_or_are_not(log: Source) -> None:
    asks = [ask for moment in traffic(log) for ask in moment.asks]
    extended = [entry.event for entry in log.entries() if isinstance(entry.event, RequestExtended)]
    assert [ask.found for ask in asks if isinstance(ask, Again)] == [event.device_blocks for event in extended]
    for policy in HostPolicy:
        host = 0 if policy == HostPolicy.OFF else 12
        scenario = Scenario(device_blocks=14, host_blocks=host, host_policy=policy, hints=Hints.RECORDED)
        (result,) = what_if(log, [scenario]).results
        assert result.device_hit_blocks and bool(result.swapped_out_blocks or result.backed_up_blocks) == bool(host)
    assert sorted(curve(log).hit_rates) == curve(log).hit_rates


def test_all_are_counted_and_redacted(log: Source, tmp_path: Path) -> None:
    derivation = Derivation(None)
    for records in log.records(1):
        derivation.feed(records)
    told = {name: value for (name, *_), value in derivation.totals.items()}
    counters = log.at(log.last).counters
    assert derivation.totals["kvledger_hit_blocks_total", ("device",)] == counters.device_hit_blocks
    assert told["kvledger_allocated_blocks_total"] == counters.allocated_blocks
    found = redact(Path(log.name), tmp_path / "redacted.kvlog", bytes(32))
    assert (found.events, found.damage, found.broken) == (log.last, "", "")
    with open_source(str(tmp_path / "redacted.kvlog")) as redacted:
        assert check_log(redacted, 1, redacted.last).violation is None
