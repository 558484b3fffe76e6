"""``kvledger view`` without a browser: pictures, timelines, windows, the server and its locks, exported files."""

from __future__ import annotations

import base64
import random
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvledger.view.picture import Kind, Picture
from statemachine.apply import genesis
from statemachine.decide import decide
from statemachine.encoding import restore, snapshot
from statemachine.errors import CommandRejected
from statemachine.events import HostPolicy, LedgerOpened, Tier

ROOT = Path(__file__).parents[1]
NAMES = ("runs", "requests", "transfers")


class Page:
    """What the page's script does with a window: a keyframe, then changes."""

    def __init__(self, keyframe: dict[str, Any]) -> None:
        self.rows = {name: dict(keyframe[name]) for name in NAMES}
        self.blocks = {
            tier: [
                np.frombuffer(base64.b64decode(keyframe[tier]["kinds"]), np.uint8).copy(),
                np.frombuffer(base64.b64decode(keyframe[tier]["owners"]), "<u4").copy(),
            ]
            for tier in ("device", "host")
        }

    def apply(self, delta: dict[str, Any]) -> None:
        for name in NAMES:
            for id, row in delta.get(name, {}).items():
                if row is None:
                    del self.rows[name][id]
                else:
                    self.rows[name][id] = row
        for tier, size in zip(("device", "host"), delta.get("capacity", ())):
            self.blocks[tier] = [np.resize(np.append(old, [0] * size), size) for old in self.blocks[tier]]
        for tier in ("device", "host"):
            if tier in delta:
                ids, *values = delta[tier]
                for array, value in zip(self.blocks[tier], values):
                    array[ids] = value

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Page)
        return self.rows == other.rows and all(
            np.array_equal(mine, theirs)
            for tier in self.blocks
            for mine, theirs in zip(self.blocks[tier], other.blocks[tier])
        )


@pytest.mark.parametrize("policy", list(HostPolicy))
def test_a_picture_that_follows_equals_one_that_is_painted_anew(policy: HostPolicy) -> None:
    """At every event of random traffic through every kind of command."""
    command = runpy.run_path(str(ROOT / "docs" / "generate.py"))["_command"]
    host = (0, 0) if policy == HostPolicy.OFF else (8, 4)
    seen: set[str] = set()
    for seed in range(6):
        rng = random.Random(seed)
        picture = Picture(genesis(LedgerOpened(1, 12, *host, policy, 1, "", "")))
        page = Page(picture.keyframe())
        for number in range(300):
            wanted = command(picture.state, rng, number)
            if wanted is None:
                continue
            try:
                events = decide(picture.state, wanted)
            except CommandRejected:
                continue
            for event in events:
                page.apply(picture.step(event))
                seen.add(type(event).__name__)
                anew = Picture(restore(snapshot(picture.state)))
                assert page == Page(anew.keyframe()), event
    assert {"BlocksEvicted", "CacheCleared", "RequestReleased", "BlocksCached", "BlocksTrimmed"} <= seen
    if policy != HostPolicy.OFF:
        assert {"TransferStarted", "TransferFinished", "QuarantineEnded"} <= seen


def test_every_block_has_the_kind_of_its_owner() -> None:
    picture = Picture(genesis(LedgerOpened(1, 12, 0, 0, HostPolicy.OFF, 1, "", "")))
    frame = Page(picture.keyframe())
    assert [len(kinds) for kinds, _ in frame.blocks.values()] == [12, 0] and not frame.blocks["device"][0].any()
    assert Kind.FREE == 0 and Tier.DEVICE == 0
