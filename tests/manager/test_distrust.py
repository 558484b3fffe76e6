"""What turned out bad never matches again, for nobody, with all below, though others go on reading it."""

from __future__ import annotations

import os

import pytest

from kvledger import CacheConfig, CacheManager, HostPolicy, InvalidCommand, UnknownRequest
from statemachine.check import check
from statemachine.events import Tier
from tests.manager.test_manager import replays
from tests.manager.test_tokens import ledger


def serve(manager: CacheManager, name: str, tokens: list[int]) -> int:
    """Admit a prompt and compute it. Returns how many tokens were cached."""
    cached = manager.admit(name, tokens).cached_tokens
    manager.commit({name: len(tokens)})
    return cached


def cached(manager: CacheManager, tokens: list[int]) -> int:
    return sum(manager.peek(tokens, max_blocks=99))


def test_nobody_finds_it_and_its_readers_go_on() -> None:
    prompt = [*range(16)]
    with ledger() as manager:
        serve(manager, "a", prompt)
        assert serve(manager, "b", [*prompt, 99]) == 16
        tables = [manager.block_table(name).tolist() for name in "ab"]
        manager.distrust("b", 6)  # in the second block, which goes as a whole
        assert cached(manager, prompt) == 1
        assert [manager.block_table(name).tolist() for name in "ab"] == tables
        assert (manager.computed("a"), manager.computed("b")) == (16, 16), "b's last token was computed from it"
        sequence = manager.next_sequence
        manager.distrust("a", 8)  # that is bad already
        assert manager.next_sequence == sequence
        assert serve(manager, "c", prompt) == 4
        assert cached(manager, prompt) == 4, "what was computed anew is as good as any"
        for name in "abc":
            manager.release(name)
        assert cached(manager, prompt) == 4
        assert manager.evict(Tier.DEVICE, 99) == 4 + 3


def test_what_its_holders_cache_below_never_matches_either() -> None:
    prompt = [*range(8)]
    with ledger() as manager:
        serve(manager, "a", prompt)
        serve(manager, "b", prompt)
        manager.distrust("a", 4)
        for name in "ab":
            manager.append(name, [7, 7, 7, 7])
            manager.grow({name: 12})
            manager.commit({name: 12})
        assert cached(manager, [*prompt, 7, 7, 7, 7]) == 1
        table = manager.block_table("b").tolist()
        assert table[1:] != manager.block_table("a").tolist()[1:]
        assert manager.extend("b").cached_blocks == 3
        assert manager.block_table("b").tolist() == table, "nor does it match for those who read it"


def test_what_nobody_holds_of_it_is_dropped_at_once() -> None:
    with ledger() as manager:
        serve(manager, "a", [*range(8)])
        for last in (1, 2, 3):
            serve(manager, f"more{last}", [*range(8), last, last, last, last])
            manager.release(f"more{last}")
        assert manager.stats()["device_free_blocks"] == 16 - 5
        manager.distrust("a", 0)
        assert manager.stats()["device_free_blocks"] == 16 - 2


def test_it_goes_first_once_it_is_released() -> None:
    with ledger(device_blocks=6) as manager:
        serve(manager, "bad", [*range(8)])
        manager.distrust("bad", 0)
        serve(manager, "good", [*range(50, 58)])
        manager.release("good")
        manager.release("bad")
        manager.admit("new", [*range(90, 106)])
        assert cached(manager, [*range(50, 58)]) == 2


def test_what_is_not_published_is_computed_once_more() -> None:
    with ledger() as manager:
        manager.admit("a", range(11))
        manager.commit({"a": 11})
        sequence = manager.next_sequence
        manager.distrust("a", 9)
        assert (manager.computed("a"), manager.next_sequence) == (9, sequence)
        manager.append("a", 11)
        manager.commit({"a": 12})
        assert cached(manager, [*range(12)]) == 3


def test_what_was_cached_ahead_of_its_step_can_be_bad() -> None:
    with ledger() as manager:
        manager.admit("a", range(12))
        manager.cache("a", 3, computed=1)
        manager.distrust("a", 8)
        assert cached(manager, [*range(12)]) == 2


def test_only_what_is_computed_can_be_bad() -> None:
    with ledger() as manager:
        manager.admit("a", range(11))
        manager.commit({"a": 5})
        with pytest.raises(InvalidCommand, match="only 5 tokens"):
            manager.distrust("a", 5)
        with pytest.raises(InvalidCommand):
            manager.distrust("a", -1)
        with pytest.raises(UnknownRequest):
            manager.distrust("b", 0)


@pytest.mark.parametrize("policy", [HostPolicy.EXCLUSIVE, HostPolicy.WRITE_THROUGH])
def test_copies_on_the_host_never_match_either(policy: HostPolicy) -> None:
    prompt = [*range(16)]
    with ledger(device_blocks=6, host_blocks=32, host_policy=policy) as manager:
        serve(manager, "whole", prompt)
        manager.release("whole")
        serve(manager, "other", [*range(50, 70)])  # whose blocks send the end of the first path to the host
        manager.release("other")
        manager.admit("a", prompt[:9])
        manager.commit({"a": 9})
        assert manager.peek(prompt, max_blocks=99)[1] == 2
        manager.distrust("a", 4)
        assert cached(manager, prompt) == 1
        manager.release("a")
        assert serve(manager, "b", prompt) == 4
        assert cached(manager, prompt) == 4


def test_what_turned_out_bad_is_not_copied_out() -> None:
    with ledger(host_blocks=32, host_policy=HostPolicy.WRITE_THROUGH) as manager:
        serve(manager, "a", [*range(8)])
        assert manager.stats()["backed_up_blocks"] == 2
        manager.distrust("a", 4)
        manager.append("a", range(4))
        manager.grow({"a": 12})
        manager.commit({"a": 12})
        assert manager.stats()["backed_up_blocks"] == 2


def test_the_parts_of_a_run_that_is_cut_never_match_either() -> None:
    prompt = [*range(16)]
    with ledger(host_blocks=32, host_policy=HostPolicy.WRITE_THROUGH) as manager:
        serve(manager, "a", prompt)
        manager.distrust("a", 0)
        manager.release("a")
        assert manager.evict(Tier.DEVICE, 2) == 2, "its end, which stays on the host: the run is cut"
        assert len(manager.state.nodes) == 2 and cached(manager, prompt) == 0


def test_a_chain_that_turned_out_bad_is_dropped_where_others_are_swapped_out() -> None:
    with ledger(device_blocks=6, host_blocks=32, host_policy=HostPolicy.EXCLUSIVE) as manager:
        serve(manager, "a", [*range(8)])
        serve(manager, "b", [*range(8), 1, 2, 3, 4])
        manager.distrust("b", 0)
        manager.release("a")
        manager.append("b", [5, 6, 7, 8])
        manager.grow({"b": 16})
        manager.commit({"b": 16})
        manager.release("b")
        manager.admit("new", range(50, 74))
        assert manager.stats()["swapped_out_blocks"] == 0


def test_a_restart_remembers_what_turned_out_bad() -> None:
    prompt = [*range(12)]
    name = f"distrust-{os.getpid()}"
    manager = CacheManager.create(name, CacheConfig(block_size=4, device_blocks=16))
    serve(manager, "a", prompt)
    manager.release("a")
    manager.admit("b", prompt, max_blocks=3)
    manager.distrust("b", 4)
    manager.close(keep=True)
    with CacheManager.open(name) as again:
        assert cached(again, prompt) == 1
        assert not check(again.state) and replays(again)


def test_inside_a_step() -> None:
    with ledger() as manager:
        with manager.step(1):
            serve(manager, "a", [*range(12)])
            manager.distrust("a", 4)
            manager.release("a")
            assert serve(manager, "a", [*range(12)]) == 4
        assert cached(manager, [*range(12)]) == 3
