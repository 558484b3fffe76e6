"""Split prefill and decode through the drop-in: two instances, real pushers, every byte verified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvledger.adapters.fastdeploy import PrefixCacheManager
from kvledger.errors import HandoffError
from kvledger.run.pattern import PatternEngine, chain
from statemachine.check import check
from statemachine.content import words_of
from statemachine.events import Outcome
from tests.adapters.fastdeploy_engine import config, finish, port, request
from tests.waiting import wait_until

PROMPT = [11, 12, 13, 14, 15, 16, 17]
"""Three full blocks, and a token in a fourth."""


@pytest.fixture
def pair() -> Iterator[tuple[PrefixCacheManager, PrefixCacheManager]]:
    settings = config()
    with PrefixCacheManager(settings, 1, "prefill") as prefill, PrefixCacheManager(settings, 1, "decode") as decode:
        for it, pushers in ((prefill, 1), (decode, 0)):
            handles = it.launch_cache_manager(settings.cache_config, 1, [0], "127.0.0.1", port(), "", True)
            assert len(handles) == pushers + 1 and all(handle.pid and handle.poll() is None for handle in handles)
        yield prefill, decode
        for it in (prefill, decode):
            assert not check(it.manager.state)


def seeds() -> np.ndarray:
    """Of all four blocks; the last one's content is whatever is written there."""
    return chain(words_of([*PROMPT, 0]), 8, b"")


def prefilled(it: PrefixCacheManager) -> Any:
    """A request as the scheduler of a prefill instance handles it."""
    task = request("r", PROMPT)
    task.block_tables, _, _ = it.request_match_blocks(task, 2)
    task.block_tables = task.block_tables + it.allocate_gpu_blocks(4 - len(task.block_tables))
    it.update_cache_blocks(task, 2, len(PROMPT))
    PatternEngine(it.manager.pools).write(np.array(task.block_tables), seeds())
    return task


def finished(it: PrefixCacheManager) -> Any:
    found: list[Any] = []
    wait_until("a request has finished", lambda: found, meanwhile=lambda: found.extend(it.get_finished_req()))
    return found[0]


def test_a_request_goes_from_the_prefill_to_the_decode_instance(pair: tuple[Any, Any]) -> None:
    prefill, decode = pair
    task, here = prefilled(prefill), request("r", PROMPT)
    assert decode.request_match_blocks(here, 2)[0] == []
    prefill.send_cache(task, decode.reserve_cache("r", 4, prefill.ledger))
    assert finished(prefill)[:2] == ("r", Outcome.DONE)
    finish(prefill, task)
    assert prefill.dropped_recycles == 0 and len(prefill.gpu_free_block_list) == 8 - 3

    received = finished(decode)
    assert received[:2] == ("r", Outcome.DONE)
    here.block_tables, here.cached_block_num = received.block_table.tolist(), 4
    PatternEngine(decode.manager.pools).verify("r", received.block_table, seeds(), 0)
    decode.update_cache_blocks(here, 2, 6)
    again = request("again", PROMPT)
    assert decode.request_match_blocks(again, 2)[1] == 6  # the decode instance has it cached now
    decode.release_block_ids(again)
    decode.release_block_ids(here)
    assert len(decode.gpu_free_block_list) == 8 - 3 and decode.dropped_recycles == 0


def test_the_decode_instance_is_told_when_nothing_comes(pair: tuple[Any, Any]) -> None:
    prefill, decode = pair
    task = prefilled(prefill)
    decode.request_match_blocks(request("r", PROMPT), 2)
    prefill.send_cache(task, decode.reserve_cache("r", 4, prefill.ledger), step=1)
    finish(prefill, task)  # aborted before its step has run
    received = finished(decode)
    assert received.outcome == Outcome.FAILED and "has released the request" in received.reason
    wait_until("the thread of the launch frees the blocks", lambda: not decode.handing_over())
    assert len(decode.gpu_free_block_list) == 8


def test_each_role_has_its_side(pair: tuple[Any, Any]) -> None:
    prefill, decode = pair
    with pytest.raises(HandoffError, match="only a decode instance"):
        prefill.reserve_cache("r", 1, decode.ledger)
    with pytest.raises(HandoffError, match="only a prefill instance"):
        decode.send_cache(request("r", PROMPT), "")
    with pytest.raises(ValueError, match="not the address"):
        prefill.send_cache(prefilled(prefill), "nonsense")
