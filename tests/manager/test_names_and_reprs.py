"""Members of enumerations by name, a watermark as a share, and what configurations, managers and answers show."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy, InvalidCommand, ReleaseReason, Tier
from statemachine.events import RequestReleased
from tests.manager.test_tokens import ledger


@pytest.mark.parametrize("name", ["write-through", "write_through", "WRITE_THROUGH", HostPolicy.WRITE_THROUGH])
def test_a_policy_by_its_name(name: str) -> None:
    config = CacheConfig(device_blocks=8, host_blocks=8, host_policy=name)
    assert config.host_policy is HostPolicy.WRITE_THROUGH
    assert config == replace(config, host_policy=HostPolicy.WRITE_THROUGH)
    assert config.opened().host_policy == HostPolicy.WRITE_THROUGH


@pytest.mark.parametrize("name", ["", "both", 2, None, b"exclusive"])
def test_what_is_no_policy_is_told_which_there_are(name: Any) -> None:
    with pytest.raises(ConfigError, match="host_policy must be one of 'off', 'exclusive', 'write-through'"):
        CacheConfig(device_blocks=8, host_blocks=8, host_policy=name)


def test_tiers_and_reasons_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with ledger(host_blocks=8, host_policy="exclusive") as manager:
        manager.admit("a", range(9))
        manager.commit({"a": 9})
        with pytest.raises(InvalidCommand, match="'finished', 'preempted', 'aborted'"):
            manager.release("a", "bored")
        released = []
        execute = manager._execute

        def watched(command: Any) -> Any:
            events = execute(command)
            released.extend(event for event in events if isinstance(event, RequestReleased))
            return events

        monkeypatch.setattr(manager, "_execute", watched)
        manager.release("a", "aborted")
        assert [event.reason for event in released] == [ReleaseReason.ABORTED]
        for wrong in ("disk", 0, None):
            with pytest.raises(InvalidCommand, match="'device', 'host'"):
                manager.evict(wrong, 1)  # type: ignore[arg-type]
        assert manager.evict("device", 1) == 1
        manager.resize("HOST", 4)
        assert manager.state.place(Tier.HOST).limit == 4


@pytest.mark.parametrize(("share", "blocks"), [(0.01, 1), (0.07, 5), (0.6875, 44), (0.25, 16), (0.0, 0), (0.999, 64)])
def test_a_watermark_as_a_share(share: float, blocks: int) -> None:
    if blocks == 64:
        with pytest.raises(ConfigError, match="nothing could be"):
            CacheConfig(device_blocks=64, watermark_blocks=share)
        return
    config = CacheConfig(device_blocks=64, watermark_blocks=share)
    assert config.watermark_blocks == blocks and type(config.watermark_blocks) is int


@pytest.mark.parametrize("wrong", [1.0, 1.5, -0.1, float("nan"), "0.1", True])
def test_what_is_no_share(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="watermark_blocks"):
        CacheConfig(device_blocks=64, watermark_blocks=wrong)


def test_a_configuration_shows_what_is_not_the_default_and_can_be_typed_again() -> None:
    config = CacheConfig(device_blocks=64, host_blocks=8, host_policy="exclusive", watermark_blocks=0.25)
    text = "CacheConfig(device_blocks=64, host_blocks=8, host_policy=HostPolicy.EXCLUSIVE, watermark_blocks=16)"
    assert repr(config) == text
    assert eval(text, {"CacheConfig": CacheConfig, "HostPolicy": HostPolicy}) == config


def test_answers_show_what_they_say() -> None:
    with ledger(device_blocks=64) as manager:
        assert repr(manager.admit("a", range(9))) == (
            "<admitted to [0, 1, 2]: 0 tokens cached (0 blocks on the device, 0 on the host)>"
        )
        manager.commit({"a": 9})
        asked = manager.can_admit("b", range(50))
        assert repr(asked) == "<fits: 8 tokens cached>"
        assert repr(manager.admit("b", asked)).startswith("<admitted to [0, 1, 3, 4, 5, 6, 7, 8, and 5 more]: 8 tokens")
        assert repr(manager.can_admit("c", range(999, 1999))).startswith("<does not fit: 0 tokens cached; ")
        grown = manager.grow({"a": 13, "b": 999, "nobody": 1})
        assert repr(grown) == "<'a' gets [14]; refused: 'b'; gone: 'nobody'>"
        assert repr(manager.grow({})) == "<all have room>"
        assert repr(manager) == f"<CacheManager {manager.name!r}: 2 requests, 15 of 64 device blocks in use>"


def test_a_start_and_an_end_show_how_they_went() -> None:
    name = f"shown-{os.getpid()}"
    started = CacheManager.open_or_create(name, CacheConfig(device_blocks=8))
    assert repr(started) == (
        f"<started anew (there was none): <CacheManager {name!r}: 0 requests, 0 of 8 device blocks in use>>"
    )
    started.manager.close()
    assert repr(started.manager) == f"<CacheManager {name!r}: closed>"
