"""Golden transcripts of the main stories. ``KVLEDGER_REWRITE=1 pytest`` on this file writes them anew."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.commands import (
    Admit,
    Allocate,
    Backup,
    Cache,
    Command,
    EndQuarantine,
    Extend,
    FinishTransfer,
    Match,
    Release,
    Trim,
)
from statemachine.decide import decide
from statemachine.errors import CommandRejected
from statemachine.events import Event, HostPolicy, IntArray, LedgerOpened, Outcome, ReleaseReason
from statemachine.records.snapshot import state_digest
from tests.statemachine.test_machine import words

FOLDER = Path(__file__).parent / "golden"


def admit(key: str, *prompt: int) -> Command:
    return Admit(key, words(list(prompt)), b"", 99, len(prompt))


def cache(key: str, blocks: int) -> Command:
    return Cache(key, blocks, b"")


def release(key: str, final: bool = False) -> Command:
    return Release(key, ReleaseReason.FINISHED, final)


def finish(transfer: int, outcome: Outcome = Outcome.DONE, valid: int = 0) -> Command:
    return FinishTransfer(transfer, outcome, valid)


FIRST = [admit("a", 1, 2, 3, 4), cache("a", 4), release("a")]
SWAPPED = [*FIRST, admit("b", 7, 8, 9), finish(1, Outcome.DONE, 2), release("b")]
STORIES: dict[str, tuple[HostPolicy, list[Command]]] = {
    "hit": (HostPolicy.OFF, [*FIRST, admit("b", 1, 2, 3, 4), release("b")]),
    "partial hit splits the run": (HostPolicy.OFF, [*FIRST, admit("b", 1, 2, 9), cache("b", 3)]),
    "merge": (
        HostPolicy.OFF,
        [admit("a", 1, 2), cache("a", 2), admit("b", 1, 2, 3), cache("b", 3), release("a"), release("b")],
    ),
    "evict": (HostPolicy.OFF, [*FIRST, admit("b", 7, 8, 9), admit("c", 5, 5, 5, 5, 5)]),
    "final is evicted first": (
        HostPolicy.OFF,
        [
            admit("a", 1),
            cache("a", 1),
            release("a"),
            admit("b", 2),
            cache("b", 1),
            release("b", True),
            admit("c", *[3] * 5),
        ],
    ),
    "duplicate": (
        HostPolicy.OFF,
        [admit("a", 1, 2), admit("b", 1, 2), cache("a", 2), cache("b", 2), release("a"), release("b")],
    ),
    "computed again": (  # the everyday full hit: the run takes the request's copy, and gives back its own
        HostPolicy.OFF,
        [*FIRST, Admit("b", words([1, 2, 3]), b"", 2, 3), cache("b", 3), Allocate(["b"], [1]), release("b")],
    ),
    "computed again ahead of its step": (
        HostPolicy.WRITE_THROUGH,
        [
            *[*FIRST[:2], Backup(1), FIRST[2]],
            Admit("b", words([1, 2, 3, 4]), b"", 3, 4),
            Cache("b", 4, b"", 3),
            finish(1, Outcome.DONE, 4),
            Cache("b", 4, b"", 4),
            release("b"),
        ],
    ),
    "two of three have copies": (
        HostPolicy.OFF,
        [
            *[admit("a", 1), admit("b", 1), admit("c", 1), cache("a", 1), cache("b", 1), cache("c", 1)],
            *[release("a"), release("b"), admit("d", 1), release("c"), release("d")],
        ],
    ),
    "swap out and in": (
        HostPolicy.EXCLUSIVE,
        [*SWAPPED, admit("c", 1, 2, 3, 4), finish(2, Outcome.DONE, 2), cache("c", 4)],
    ),
    "failed swap-in": (HostPolicy.EXCLUSIVE, [*SWAPPED, admit("c", 1, 2, 3, 4), finish(2, Outcome.FAILED, 1)]),
    "corrupt swap-in": (
        HostPolicy.EXCLUSIVE,
        [*SWAPPED, admit("c", 1, 2, 3, 4), finish(2, Outcome.CORRUPT, 0), release("c"), admit("d", 1, 2, 3, 4)],
    ),
    "failed swap-out": (HostPolicy.EXCLUSIVE, [*FIRST, admit("b", 7, 8, 9), finish(1, Outcome.FAILED, 1)]),
    "timed out": (
        HostPolicy.EXCLUSIVE,
        [*FIRST, admit("b", 7, 8, 9), finish(1, Outcome.TIMED_OUT), release("b"), EndQuarantine(1)],
    ),
    "timed-out swap-in": (
        HostPolicy.EXCLUSIVE,
        [*SWAPPED, admit("c", 1, 2, 3, 4), finish(2, Outcome.TIMED_OUT), release("c"), EndQuarantine(2)],
    ),
    "released while its blocks are copied out": (
        HostPolicy.EXCLUSIVE,
        [*FIRST, admit("b", 7, 8, 9), release("b"), admit("c", 5, 6, 7), finish(1, Outcome.DONE, 2), release("c")],
    ),
    "trimmed while its blocks are copied out": (
        HostPolicy.EXCLUSIVE,
        [*FIRST, admit("b", 7, 8, 9), Trim("b", 1), finish(1, Outcome.DONE, 2), release("b")],
    ),
    "no merge across copies": (
        HostPolicy.WRITE_THROUGH,
        [
            admit("a", 1, 2),
            cache("a", 2),
            Backup(1),
            finish(1, Outcome.DONE, 2),
            release("a"),
            admit("b", 1, 2, 3),
            cache("b", 3),
            release("b"),
        ],
    ),
    "no merge with what is in flight": (
        HostPolicy.WRITE_THROUGH,
        [
            admit("a", 1, 2),
            cache("a", 2),
            Backup(1),
            release("a"),
            admit("b", 1, 2, 3),
            cache("b", 3),
            Backup(2),
            finish(2, Outcome.DONE, 1),
            release("b"),
            finish(1, Outcome.DONE, 2),
        ],
    ),
    "extend": (
        HostPolicy.OFF,
        [
            admit("a", 1, 2, 3),
            Match("b", words([1, 2, 3]), b"", 99),
            cache("a", 2),
            Extend("b", 2),
            Allocate(["b"], [1]),
            cache("a", 3),
            cache("b", 3),
            Extend("b", 3),
            release("a"),
            release("b"),
        ],
    ),
    "cached ahead": (
        HostPolicy.WRITE_THROUGH,
        [
            admit("a", 1, 2, 3),
            Cache("a", 2, b"", 0),
            Backup(1),
            Cache("a", 3, b"", 2),
            Backup(2),
            finish(1, Outcome.DONE, 2),
            release("a"),
        ],
    ),
    "write-through": (
        HostPolicy.WRITE_THROUGH,
        [*FIRST[:2], Backup(1), finish(1, Outcome.DONE, 4), release("a"), admit("b", 7, 8, 9), admit("c", 1, 2, 3, 4)],
    ),
}


def shown(event: Event) -> str:
    fields = []
    for name, value in zip(event._fields, event, strict=True):
        if name == "words" or name == "namespace":
            value = list(struct.unpack(f"<{len(value) // 4}i", value))
        elif isinstance(value, IntArray):
            value = list(value)
        if value not in ([], "", 0, b""):
            fields.append(f"{name}={value}")
    return f"    {type(event).__name__} {' '.join(fields)}"


def transcript(policy: HostPolicy, story: list[Command]) -> str:
    host = 4 if policy != HostPolicy.OFF else 0
    state = genesis(LedgerOpened(1, 5, host, 2 if host else 0, policy, 1, "", ""))
    lines = [f"5 device blocks of one token, {host} host blocks, {policy.name.lower()}"]
    for command in story:
        said = ", ".join(
            str(list(v.cast("i")) if isinstance(v, memoryview) else v)
            for name, v in command._asdict().items()
            if v not in (b"", 99) and v is not command._field_defaults.get(name, 99)
        )
        lines.append(f"> {type(command).__name__} {said}")
        try:
            for event in decide(state, command):
                lines.append(shown(event))
                apply(state, event)
                assert not check(state), (command, check(state))
        except CommandRejected as error:
            lines.append(f"    {type(error).__name__}: {error}")
        for request in state.requests.values():
            lines.append(f"      {request.request_id}: {list(request.table)}" + (" waits" if request.waits_for else ""))
    return "\n".join([*lines, state_digest(state).hex(), ""])


@pytest.mark.parametrize("name", STORIES)
def test_story(name: str) -> None:
    path = FOLDER / f"{name.replace(' ', '_')}.txt"
    text = transcript(*STORIES[name])
    if os.environ.get("KVLEDGER_REWRITE"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
