"""What an engine needs beyond match, allocate, cache, release: every promise of the manager, one test each."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from ipc import SharedMemoryFull
from kvledger import (
    Busy,
    CacheConfig,
    CacheManager,
    ConfigError,
    HostPolicy,
    InvalidCommand,
    Item,
    OutOfBlocks,
    Paused,
    ReleaseReason,
    RequestNotReady,
    Tier,
    UnknownRequest,
    WrongThread,
)
from kvledger.run.pattern import PatternEngine, chain
from statemachine.commands import LoseTier
from statemachine.content import words_of
from statemachine.events import KIND_OF, KINDS, BlocksCached, Direction, TransferStarted
from tests.manager.test_manager import replays, serve
from tests.waiting import PATIENCE_S, wait_until


def tokens(blocks: int, seed: int = 0) -> np.ndarray:
    """So many blocks of four tokens."""
    return np.arange(4 * blocks, dtype=np.int32) + 10_000 * seed


@contextmanager
def ledger(**settings: Any) -> Iterator[CacheManager]:
    config = CacheConfig(**{"block_size": 4, "device_blocks": 16, **settings})
    with CacheManager.create(f"e{os.getpid()}", config) as manager:
        yield manager
        assert replays(manager)


WITH_HOST = {"host_blocks": 16, "host_policy": HostPolicy.EXCLUSIVE, "ranks": 2, "layers": 2, "block_bytes": 64}


def test_two_requests_prefill_the_same_prompt_in_chunks_without_duplicates() -> None:
    with ledger() as manager:
        manager.match("a", tokens(8))
        manager.match("b", tokens(8))
        for chunk in range(1, 4):
            manager.allocate({"a": 2})
            manager.cache("a", 2 * chunk)
            progress = manager.extend("b")  # needs no block of its own
            assert progress.cached_blocks == 2 * chunk
            assert progress.block_table.tolist() == manager.block_table("a").tolist()
        assert manager.available_blocks() == 16 - 6
        manager.allocate({"a": 2, "b": 2})
        manager.cache("a", 8)
        table = manager.extend("b").block_table  # one token is left to compute: block 7 stays b's own
        assert table[:7].tolist() == manager.block_table("a")[:7].tolist() and table[7] not in manager.block_table("a")
        assert manager.available_blocks() == 16 - 9
        manager.release("a")
        manager.release("b")
        assert manager.available_blocks() == 16


def test_extend_gives_the_copies_back_that_caching_left() -> None:
    with ledger() as manager:
        for key in "ab":
            manager.admit(key, tokens(4))
        manager.cache("a")
        manager.cache("b")
        assert manager.stats()["duplicate_blocks"] == 4 and manager.available_blocks() == 16 - 8
        assert manager.extend("b").block_table.tolist() == manager.block_table("a").tolist()
        assert manager.available_blocks() == 16 - 4
        with pytest.raises(UnknownRequest):
            manager.extend("c")


def test_extend_waits_for_the_swap_in_first() -> None:
    with ledger(**WITH_HOST) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", tokens(16))
        serve(manager, engine, "b", tokens(12, 1))  # sends a to the host
        admission = manager.match("c", tokens(16))
        assert admission.host_blocks and not admission.ready
        with pytest.raises(RequestNotReady):
            manager.extend("c")
        manager.wait("c")
        assert manager.extend("c").cached_blocks == 15


def test_what_is_cached_ahead_matches_but_is_not_copied_out_before_it_is_computed() -> None:
    settings = {**WITH_HOST, "host_policy": HostPolicy.WRITE_THROUGH, "ranks": 0}
    with ledger(**settings) as manager:
        manager.admit("a", tokens(8))
        manager.cache("a", 4, computed=0)
        assert manager.peek(tokens(8), max_blocks=99) == (4, 0) and manager.stats()["backed_up_blocks"] == 0
        manager.admit("b", tokens(8))
        manager.cache("b", 4)  # nothing of its own: still not computed
        assert manager.stats()["backed_up_blocks"] == 0
        manager.cache("a", 8, computed=4)
        assert manager.stats()["backed_up_blocks"] == 4
        with pytest.raises(InvalidCommand, match="less than before"):
            manager.cache("a", 8, computed=3)
        manager.cache("a", 8)
        assert manager.stats()["backed_up_blocks"] == 8
        manager.admit("c", tokens(4, 1))
        manager.cache("c", computed=0)
        manager.release("c")
        assert not any(node.uncomputed for node in manager.state.nodes.values())


def test_selective_write_through_copies_at_the_second_use() -> None:
    settings = {**WITH_HOST, "host_policy": HostPolicy.WRITE_THROUGH, "backup_after": 2}
    with ledger(**settings) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", tokens(4))
        assert manager.stats()["backed_up_blocks"] == 0
        serve(manager, engine, "b", np.concatenate([tokens(4), tokens(4, 1)]))
        assert manager.stats()["backed_up_blocks"] == 4
        assert all(transfer.direction == Direction.BACKUP for transfer in manager.state.transfers.values())
        for i in range(12):
            serve(manager, engine, f"c{i}", tokens(8, 2 + i))  # drops them from the device
        assert manager.peek(tokens(4), max_blocks=99) == (0, 4)  # used once more: the others were dropped for good
        assert serve(manager, engine, "d", np.concatenate([tokens(4), tokens(4, 1)])) == 4


@contextmanager
def no_room_for(manager: CacheManager, *kinds: type) -> Iterator[None]:
    """The log takes no transaction with such an event in it; from the part that is kept it takes any."""
    writer, refused = manager._writer, {KIND_OF[kind] for kind in kinds}
    stage = writer.stage

    def full(records: Any, step: int = 0, *, giving_back: bool = False) -> None:
        if not giving_back and refused.intersection(record[0] for record in records):
            raise SharedMemoryFull("no room, as planned")
        stage(records, step, giving_back=giving_back)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "stage", full)
        yield


def test_a_backup_that_cannot_be_logged_fails_no_call_that_was() -> None:
    """What was cached is; an error would make the engine cache it again. The next call copies it."""
    settings = {"host_blocks": 16, "host_policy": HostPolicy.WRITE_THROUGH}
    with ledger(**settings) as manager:
        manager.admit("a", tokens(4), blocks=6)
        with no_room_for(manager, TransferStarted):
            manager.cache("a")
            manager.cache("a", 5, generated=tokens(1, 5))
            assert manager.cached_blocks("a") == 5 and manager.stats()["backed_up_blocks"] == 0
        before = manager.digest()
        with no_room_for(manager, BlocksCached), pytest.raises(SharedMemoryFull):
            manager.cache("a", 6, generated=tokens(1, 6))
        assert manager.digest() == before
        manager.cache("a", 6, generated=tokens(1, 6))
        assert manager.stats()["backed_up_blocks"] == 6
        manager.release("a")


def test_what_was_cached_ahead_is_released_without_room_for_more_log() -> None:
    settings = {"host_blocks": 16, "host_policy": HostPolicy.WRITE_THROUGH}
    with ledger(**settings) as manager:
        manager.admit("a", tokens(8))
        manager.cache("a", 8, computed=2)
        everything = set(KINDS.values())
        with no_room_for(manager, *everything):
            manager.release("a")
        assert not manager.state.requests


def test_a_tier_is_lost_without_room_for_more_log() -> None:
    """Else a rank that keeps failing would end the service where the log is full."""
    with ledger(host_blocks=16, host_policy=HostPolicy.WRITE_THROUGH) as manager:
        manager.admit("a", tokens(4))
        manager.cache("a")
        with no_room_for(manager, *KINDS.values()):
            manager._execute(LoseTier(Tier.HOST, "rank 0 failed", ""))
        assert manager.state.policy == HostPolicy.OFF and not manager.state.host.resident
        manager.release("a")


def test_a_backup_larger_than_a_transaction_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"host_blocks": 4000, "host_policy": HostPolicy.WRITE_THROUGH, "segment_bytes": 64 << 10}
    with ledger(**settings, block_size=1, device_blocks=4000, retain_bytes=None) as manager:
        manager.match("a", tokens(500))
        manager.allocate({"a": 2000})
        manager.cache("a")
        assert manager.cached_blocks("a") == 2000 and manager.stats()["backed_up_blocks"] == 0
        assert "make segment_bytes larger" in caplog.text
        manager.release("a")


def test_a_short_host_takes_the_front_of_what_should_be_backed_up() -> None:
    settings = {"host_blocks": 3, "host_staging_blocks": 0, "host_policy": HostPolicy.WRITE_THROUGH}
    with ledger(**settings) as manager:
        manager.admit("a", tokens(8))
        manager.cache("a")
        assert manager.stats()["backed_up_blocks"] == 3
        manager.release("a")
        manager.admit("b", tokens(16, 1))
        assert manager.peek(tokens(8), max_blocks=99) == (0, 3)


def test_can_allocate_counts_what_can_be_evicted_and_evicts_nothing() -> None:
    with ledger() as manager:
        manager.admit("a", tokens(12))
        manager.cache("a")
        assert manager.can_allocate(4) and not manager.can_allocate(5)
        manager.release("a")
        digest = manager.digest()
        assert manager.can_allocate(16) and not manager.can_allocate(17)
        assert manager.digest() == digest


def test_the_watermark_keeps_blocks_for_those_that_run() -> None:
    with ledger(watermark_blocks=4) as manager:
        manager.admit("a", tokens(10))
        with pytest.raises(OutOfBlocks):
            manager.admit("b", tokens(3, 1))
        manager.admit("b", tokens(2, 1))
        manager.allocate({"a": 2, "b": 2})
        manager.release("a")
        manager.release("b")
        manager.admit("c", tokens(16, 2))  # nobody runs: no reason to keep anything


def test_blocks_are_reserved_for_decoding() -> None:
    with ledger() as manager:
        admission = manager.admit("a", tokens(4), blocks=7)
        assert len(admission.block_table) == 7 and manager.available_blocks() == 9
        manager.cache("a", 6, generated=tokens(2, 3))
        assert manager.peek(np.concatenate([tokens(4), tokens(2, 3)]), max_blocks=99) == (6, 0)


def test_preemption_takes_as_few_as_it_needs_in_the_order_given() -> None:
    with ledger() as manager:
        for i in range(4):
            manager.admit(f"r{i}", tokens(4, i))
            manager.cache(f"r{i}", 3)
        with pytest.raises(OutOfBlocks, match="17 device blocks"):
            manager.preempt(17, ["r0", "r1", "r2", "r3"])
        assert len(manager.state.requests) == 4
        assert manager.preempt(6, ["r3", "r3", "r2", "r1"]) == ["r3", "r2"]
        assert manager.preempt(6, ["r1"]) == []
        manager.allocate({"r0": 2, "r1": 4})
        assert manager.peek(tokens(4, 3), max_blocks=99) == (2, 0) or manager.peek(tokens(4, 2), max_blocks=99) == (
            2,
            0,
        )  # the rest is recomputed


def test_a_preempted_request_comes_back_from_the_host() -> None:
    with ledger(**WITH_HOST) as manager:
        engine = PatternEngine(manager.pools)
        prompt = tokens(15)
        seeds = chain(words_of(prompt), 16, b"")
        table = manager.admit("low", prompt).block_table
        engine.write(table[: len(seeds)], seeds)
        manager.cache("low")
        assert manager.preempt(12, ["low"]) == ["low"]
        serve(manager, engine, "high", tokens(12, 1))
        admission = manager.admit("low", prompt)
        assert admission.host_blocks > 8
        manager.wait("low")
        cached = manager.cached_blocks("low")
        engine.verify("low", manager.block_table("low")[:cached], seeds[:cached], 0)


def test_a_match_does_not_end_inside_an_image_if_the_model_cannot_begin_there() -> None:
    prompt = tokens(8)
    picture, other = Item(b"p" * 16, 6, 5), Item(b"q" * 16, 13, 14)  # tokens 6..10 and 13..26
    for chunked, expected in ((True, 5), (False, 1)):
        with ledger(chunked_multimodal=chunked) as manager:
            manager.admit("a", prompt, items=[picture, other])
            manager.cache("a", 5)
            admission = manager.admit("b", prompt, items=[picture, other])  # 20 tokens end in the second one,
            assert admission.device_blocks == expected + 2 * (not chunked)  # 12 are between the two
            assert manager.match("c", prompt, items=[picture, other], max_blocks=2).device_blocks == (
                2 if chunked else 1
            )


def test_blocks_of_other_weights_never_match() -> None:
    with ledger(weights="1") as manager:
        manager.admit("a", tokens(4))
        manager.cache("a")
        manager.pause()
        for call in (
            lambda: manager.match("b", tokens(4)),
            lambda: manager.admit("b", tokens(4)),
            lambda: manager.allocate({"a": 1}),
            lambda: manager.extend("a"),
        ):
            with pytest.raises(Paused):
                call()
        with pytest.raises(Busy):
            manager.resume(weights="2")
        manager.resume(weights="2", force=True)
        manager.cache("a", 4, generated=tokens(1))
        manager.release("a")
        assert manager.peek(tokens(4), max_blocks=99) == (0, 0)
        manager.admit("b", tokens(4))
        manager.cache("b")
        manager.release("b")
        manager.resume(weights="3")
        assert manager.peek(tokens(4), max_blocks=99) == (0, 0)
        manager.resume(weights="2")
        assert manager.peek(tokens(4), max_blocks=99) == (4, 0)


def test_pausing_waits_for_the_copies_in_flight() -> None:
    with ledger(**WITH_HOST) as manager:
        serve(manager, PatternEngine(manager.pools), "a", tokens(16))
        manager.admit("b", tokens(12, 1))
        assert manager.state.transfers
        manager.pause()
        assert not manager.state.transfers
        manager.resume()
        manager.release("b")


def test_clear_refuses_waits_or_forces() -> None:
    with ledger() as manager:
        manager.admit("a", tokens(4))
        manager.cache("a")
        with pytest.raises(Busy):
            manager.clear()
        other = threading.Timer(0.05, manager.release, ["a"])
        other.start()
        manager.clear(wait=PATIENCE_S)
        other.join()
        manager.admit("b", tokens(4))
        manager.cache("b")
        manager.clear(force=True)
        assert manager.peek(tokens(4), max_blocks=99) == (0, 0)
        manager.release("b")
        manager.clear()


def test_room_is_made_ahead_of_need() -> None:
    with ledger(**WITH_HOST) as manager:
        serve(manager, PatternEngine(manager.pools), "a", tokens(16))
        manager.make_room(6)
        wait_until("six blocks are free", lambda: manager.stats()["device_free_blocks"] >= 6, meanwhile=manager.poll)
        assert manager.stats()["device_free_blocks"] == 6 and manager.peek(tokens(16), max_blocks=99) == (10, 6)


def test_single_blocks_are_given_back() -> None:
    with ledger() as manager:
        table = manager.admit("a", tokens(6)).block_table
        manager.give_back("a", table[[1, 4]].tolist())
        assert manager.block_table("a").tolist() == table[[0, 2, 3, 5]].tolist()
        for wrong in ([int(table[1])], [99], [int(table[0])] * 2):
            with pytest.raises(InvalidCommand):
                manager.give_back("a", wrong)
        manager.give_back("a", [])


def test_both_tiers_shrink_and_grow() -> None:
    with ledger(host_blocks=16, host_policy=HostPolicy.EXCLUSIVE) as manager:
        manager.admit("a", tokens(16))
        manager.cache("a")
        with pytest.raises(Busy):
            manager.resize(Tier.DEVICE, 12)
        manager.release("a")
        for tier in Tier:
            manager.resize(tier, 8)
            manager.resize(tier, 20)
        assert manager.available_blocks() == 20


def test_data_parallel_ledgers_do_not_know_each_other() -> None:
    config = CacheConfig(block_size=4, device_blocks=16)
    with ledger() as one, CacheManager.create(f"e{os.getpid()}-dp1", config) as other:
        one.admit("a", tokens(4))
        one.cache("a")
        assert other.peek(tokens(4), max_blocks=99) == (0, 0)
        other.admit("a", tokens(4))
        one.release("a")
        assert not one.state.requests and other.state.requests


def from_another_thread(call: Callable[[], object]) -> BaseException | None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_only_the_owner_changes_anything_but_a_release_comes_from_anywhere() -> None:
    with ledger() as manager:
        manager.admit("a", tokens(4))
        manager.admit("b", tokens(4, 1))
        digest = manager.digest()
        calls: list[Callable[[], object]] = [
            lambda: manager.admit("c", tokens(4)),
            lambda: manager.match("c", tokens(4)),
            lambda: manager.allocate({"a": 1}),
            lambda: manager.cache("a"),
            lambda: manager.trim("a", 0),
            lambda: manager.poll(),
            lambda: manager.clear(force=True),
            lambda: manager.resize(Tier.DEVICE, 8),
            lambda: manager.preempt(16, ["a"]),
            lambda: manager.extend("a"),
            lambda: manager.pause(),
            lambda: manager.resume(weights="2"),
            lambda: manager.make_room(4),
        ]
        for call in calls:
            assert isinstance(from_another_thread(call), WrongThread)
        assert manager.digest() == digest
        assert from_another_thread(lambda: manager.release("a", ReleaseReason.ABORTED)) is None
        assert isinstance(from_another_thread(lambda: manager.release("x")), UnknownRequest)
        assert manager.digest() == digest
        from_another_thread(lambda: manager.release("a"))  # twice: reported in the log, harmless
        manager.poll()
        assert list(manager.state.numbers) == ["b"]
        assert from_another_thread(manager.adopt_thread) is None
        with pytest.raises(WrongThread):
            manager.admit("d", tokens(4))
        manager.adopt_thread()
        manager.admit("d", tokens(4))


def test_releases_from_many_threads_all_count() -> None:
    with ledger(device_blocks=400) as manager:
        for i in range(200):
            manager.admit(str(i), tokens(2, i))
        threads = [
            threading.Thread(target=lambda first=first: [manager.release(str(i)) for i in range(first, 200, 4)])
            for first in range(4)
        ]
        for thread in threads:
            thread.start()
        step = 0
        while any(thread.is_alive() for thread in threads):
            manager.admit(f"s{step}", tokens(1, 900))
            manager.release(f"s{step}")
            step += 1
        for thread in threads:
            thread.join()
        manager.poll()
        assert not manager.state.requests and manager.available_blocks() == 400


def test_tasks_wait_beside_each_other() -> None:
    with ledger(**WITH_HOST) as manager:
        engine = PatternEngine(manager.pools)
        serve(manager, engine, "a", tokens(16))
        serve(manager, engine, "b", tokens(15, 1))
        ticks = 0

        async def main() -> None:
            nonlocal ticks

            async def tick() -> None:
                nonlocal ticks
                while True:
                    ticks += 1
                    await asyncio.sleep(0)

            ticking = asyncio.create_task(tick())
            manager.match("c", tokens(9))
            manager.match("d", tokens(9))  # shares the swap-in
            assert not manager.ready("c") and not manager.ready("d")
            done = await asyncio.gather(manager.wait_async("c"), manager.wait_async("d"))
            assert [progress.request_id for progress in done] == ["c", "d"]
            assert done[0].block_table.tolist() == done[1].block_table.tolist() and not done[0].shortened
            ticking.cancel()
            with pytest.raises(UnknownRequest):
                await manager.wait_async("e")

        asyncio.run(main())
        assert ticks > 1


def test_a_successor_keeps_what_others_vouch_for() -> None:
    """What a request joined between two chunks is not its own: it is trusted although the request never ended."""
    config = CacheConfig(block_size=4, device_blocks=16)
    with CacheManager.create(f"e{os.getpid()}", config) as dead:
        dead.match("b", tokens(8), max_blocks=0)
        dead.admit("a", tokens(4))
        dead.cache("a")
        dead.release("a")
        dead.allocate({"b": 2})
        assert dead.extend("b").cached_blocks == 4
        dead.allocate({"b": 4})
        dead.cache("b", 6, computed=4)
        dead.close(keep=True)
    with CacheManager.open(f"e{os.getpid()}") as successor:
        assert successor.peek(tokens(8), max_blocks=99) == (4, 0) and successor.available_blocks() == 16
        assert not any(node.uncomputed for node in successor.state.nodes.values()) and replays(successor)


def test_what_a_refusal_says() -> None:
    with ledger(device_blocks=20, watermark_blocks=13) as manager:
        manager.admit("a", list(range(5 * 4)))
        with pytest.raises(OutOfBlocks, match="5 device blocks wanted, 2 free or evictable beyond the 13") as refused:
            manager.admit("b", list(range(1000, 1000 + 5 * 4)))
        assert refused.value.reserved == 13 and not refused.value.never_fits
        assert "requests would fit" not in str(refused.value)
        with pytest.raises(OutOfBlocks, match="the pool is too small for request 'b'") as refused:
            manager.admit("b", list(range(21 * 4)))
        assert refused.value.never_fits
        manager.admit("b", [7])
        with pytest.raises(OutOfBlocks, match="1 of the 2 requests would fit") as refused:
            manager.allocate({"b": 3, "a": 13})
        assert refused.value.fitting == 1 and not refused.value.never_fits
        assert refused.value.request_id == "a" and "request 'a' does not" in str(refused.value)
        with pytest.raises(OutOfBlocks) as refused:
            manager.allocate({"b": 20})
        assert refused.value.never_fits and refused.value.request_id == "b"
        with pytest.raises(OutOfBlocks, match="too small for request 'a'") as refused:
            manager.allocate({"b": 15, "a": 16})
        assert refused.value.never_fits and refused.value.request_id == "a" and refused.value.fitting == 0


def test_a_batch_is_not_told_that_would_fit_what_a_copy_is_in_the_way_of() -> None:
    config = CacheConfig(
        block_size=4,
        device_blocks=8,
        host_blocks=2,
        host_staging_blocks=0,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=1,
        block_bytes=16,
    )
    with CacheManager.create(f"e{os.getpid()}", config) as manager:
        manager.admit("old", tokens(4))
        manager.cache("old")
        manager.release("old")
        pid = manager.worker_pid(0)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            manager.match("r0", ())
            manager.allocate({"r0": 6})  # half of the old run goes to the host, which is full then
            manager.match("r1", ())
            manager.match("r2", ())
            assert manager.available_blocks() == 2 and not manager.can_allocate(1)
            with pytest.raises(OutOfBlocks, match="0 of the 2 requests would fit, request 'r1' does not") as refused:
                manager.allocate({"r1": 1, "r2": 1})
            assert refused.value.fitting == 0
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_batch_goes_on_without_requests_that_another_thread_has_released() -> None:
    with ledger() as manager:
        for number in range(4):
            manager.admit(f"r{number}", tokens(2, number))
        from_another_thread(lambda: manager.release("r1", ReleaseReason.ABORTED))
        assert manager.allocate({f"r{number}": 1 for number in range(3)}).keys() == {"r0", "r2"}
        with pytest.raises(UnknownRequest):  # told once: who goes on naming it makes a mistake
            manager.allocate({"r0": 1, "r1": 1})
        from_another_thread(lambda: manager.release("r2", ReleaseReason.ABORTED))
        assert manager.preempt(12, ["r2", "r3"]) == ["r3"]
        from_another_thread(lambda: manager.release("r0", ReleaseReason.ABORTED))
        manager.release("r0")  # it had just finished
        with pytest.raises(UnknownRequest):
            manager.release("r0")
        from_another_thread(lambda: manager.admit("r0", tokens(2)))
        manager.admit("again", tokens(2))
        from_another_thread(lambda: manager.release("again"))
        manager.poll()
        manager.admit("again", tokens(2))  # another request of that name
        assert manager.allocate({"again": 1}).keys() == {"again"} and manager.ready("again")


def test_an_admission_gives_at_least_what_matches() -> None:
    prompt = list(range(8 * 4))
    with ledger(device_blocks=20) as manager:
        first = manager.admit("a", prompt, blocks=2)
        assert len(first.block_table) == 2 and first.cached_blocks == 0
        manager.allocate({"a": 6})
        manager.cache("a")
        second = manager.admit("b", prompt, blocks=2)
        assert len(second.block_table) == second.cached_blocks == 7


def test_numbers_may_be_numpys_and_never_bools() -> None:
    with ledger(device_blocks=20) as manager:
        manager.admit("a", list(range(4 * 4)), blocks=np.int64(4), max_blocks=np.int32(0))
        assert len(manager.allocate({"a": np.int64(2)})["a"]) == 2
        manager.cache("a", np.int16(2), computed=np.uint8(2))
        manager.trim("a", np.int64(4))
        assert manager.can_allocate(np.int64(16)) and not manager.can_allocate(np.int64(17))
        calls: list[Callable[[], object]] = [
            lambda: manager.allocate({"a": True}),
            lambda: manager.admit("b", [1], blocks=True),
            lambda: manager.trim("a", True),
            lambda: manager.cache("a", True),
            lambda: manager.make_room(True),
            lambda: manager.evict(Tier.DEVICE, True),
            lambda: manager.step(True),
            lambda: manager.step(-1),
            lambda: manager.forget(-1),
            lambda: manager.can_allocate(np.float64(1)),  # type: ignore[arg-type]
        ]
        for call in calls:
            with pytest.raises(InvalidCommand, match="whole number from 0, not"):
                call()


def test_what_is_dropped_on_request_is_told() -> None:
    with ledger(device_blocks=8) as manager:
        manager.admit("a", list(range(5 * 4)))
        manager.cache("a")
        manager.release("a")
        assert manager.make_room(500) == 5 == manager.stats()["device_evicted_blocks"]
        assert manager.make_room(1) == 0
        manager.admit("b", list(range(5 * 4)))
        manager.cache("b")
        (run,) = manager.state.nodes
        assert not manager.forget(run) and not manager.forget(999)
        manager.release("b")
        assert manager.forget(run) and not manager.state.nodes


def test_there_is_no_host_tier_to_resize() -> None:
    with ledger(device_blocks=8) as manager, pytest.raises(InvalidCommand, match="there is no host tier"):
        manager.resize(Tier.HOST, 5)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"watermark_blocks": 8}, "watermark_blocks 8 of 8 device_blocks"),
        ({"backup_after": 2}, "backup_after 2 needs host_policy write-through"),
    ],
)
def test_settings_that_could_never_work(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CacheConfig(device_blocks=8, **settings)
