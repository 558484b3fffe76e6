"""A match that is refused stops neither the scheduler nor the requests behind it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvledger import OutOfBlocks
from statemachine.check import check
from tests.adapters.fastdeploy_engine import finish, manager, request, serve


def image(offset: Any, length: Any) -> SimpleNamespace:
    return SimpleNamespace(offset=offset, length=length)


def images(*positions: SimpleNamespace, hashes: Any = ("cat",)) -> dict[str, Any]:
    return {"mm_positions": list(positions), "mm_hashes": list(hashes)}


def test_a_new_request_whose_match_is_refused_can_be_cleaned_up_and_tried_again() -> None:
    """FastDeploy's clean-up reads ``cached_block_num``, which a new request has from its match alone."""
    with manager(4, 8) as it:
        serve(it, "a", list(range(8)))
        it.free_block_ids(4)
        held = it.allocate_gpu_blocks(2)
        task = request("b", list(range(8)))
        with pytest.raises(OutOfBlocks):
            it.request_match_blocks(task, 2)
        finish(it, task)
        it.recycle_gpu_blocks(held)
        assert it.request_match_blocks(task, 2)[1] == 8 and task.cached_block_num == 4
        finish(it, task)


def test_also_where_the_ledger_does_not_answer_at_all() -> None:
    with manager() as it:
        it.manager.pause()
        task = request("b", list(range(8)))
        with pytest.raises(Exception, match="paused"):
            it.request_match_blocks(task, 2)
        finish(it, task)
        it.manager.resume()
        assert serve(it, "b", list(range(8))).matched == 0


@pytest.mark.parametrize(
    ("prompt", "inputs", "says"),
    [
        ([1, 2, -1, 4], None, "token -1 at position 2"),
        ([1, 2, 1 << 31, 4], None, "token 2147483648 at position 2"),
        ([1, 2, -1, 4], images(image(0, 2)), "token -1 at position 2"),  # not inside the image
        ([1, 2, 3, 4], images(image(2, 3)), "does not fit in 4 tokens"),
        ([1, 2, 3, 4], images(image(0, 2), image(1, 2), hashes=("cat", "dog")), "overlaps"),
        ([1, 2, 3, 4], images(image(0, 2), hashes=("cat", "dog")), "do not describe items"),
        ([1, 2, 3, 4], images(image(0.5, 2)), "do not describe items"),
        (None, None, "one dimension"),
    ],
)
def test_a_request_that_cannot_be_cached_runs_uncached(
    prompt: Any, inputs: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    """There, it stayed the first of the queue for ever, and nothing behind it was served."""
    with manager(8) as it:
        for _ in range(2):
            task = request("odd", prompt, multimodal_inputs=inputs)
            common, tokens, hit = it.request_match_blocks(task, 2)
            assert (common, tokens, hit["gpu_match_token_num"], task.cached_block_num) == ([], 0, 0, 0)
            assert says in caplog.text
            for chunk in (1, 2):
                task.block_tables += it.allocate_gpu_blocks(1)
                it.update_cache_blocks(task, 2, 2 * chunk)
                assert task.cached_block_num == 0
            serve(it, f"behind {_}", [7, 7])
            assert not check(it.manager.state)
            finish(it, task)
        assert len(it.gpu_free_block_list) == 7 and it.dropped_recycles == 0
        assert len(it.req_leaf_map) == 0 and it.metrics.req_count == 4


def test_the_old_scheduler_is_given_the_blocks_of_such_a_request() -> None:
    with manager(8) as it:
        task = request("odd", [1, -1, 3])
        common, unique, _ = it.request_block_ids(task, 2, 2)
        assert common == [] and len(unique) == 3 and len(it.gpu_free_block_list) == 5
        again, unique, _ = it.request_block_ids(task, 2, 2)  # without a release: its first blocks are freed
        assert again == [] and len(unique) == 3 and len(it.gpu_free_block_list) == 5
        it.release_block_ids(task)
        assert len(it.gpu_free_block_list) == 8 and it.dropped_recycles == 0
        it.request_block_ids(task, 2, 2)
        it.reset()
        it.release_block_ids(task)
        assert len(it.gpu_free_block_list) == 8 and it.dropped_recycles == 0


def test_a_request_of_the_old_scheduler_counts_once() -> None:
    with manager(8) as it:
        for name in "ab":
            it.request_block_ids(request(name, [1, 2]), 2, 0)
        assert (it.metrics.req_count, it.metrics.hit_req_ratio) == (2, 0.5)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_a_placeholder_inside_an_item_may_be_anything(kind: Callable[[Any], Any]) -> None:
    """The item's content is what counts there."""
    with manager(8) as it:
        for name, filler in (("a", -1), ("b", 99)):
            task = request(name, kind([1, filler, filler, 4, 5, 6]), multimodal_inputs=images(image(1, np.int64(2))))
            _, tokens, _ = it.request_match_blocks(task, 2)
            task.block_tables = it.allocate_gpu_blocks(3 - tokens // 2)
            it.update_cache_blocks(task, 2, 6)
            assert tokens == (0 if name == "a" else 6)


def test_what_follows_a_generated_token_that_is_none_is_not_cached(caplog: pytest.LogCaptureFixture) -> None:
    with manager(8) as it:
        task = serve(it, "a", [1, 2], release=False)
        task.output_token_ids, task.block_tables = [3, -1], task.block_tables + it.allocate_gpu_blocks(1)
        it.update_cache_blocks(task, 2, 4)
        assert task.cached_block_num == 1 and "caches nothing more: token -1" in caplog.text
        finish(it, task)
        assert len(it.gpu_free_block_list) == 7 and it.dropped_recycles == 0 and not check(it.manager.state)
