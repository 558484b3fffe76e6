"""Split prefill and decode with real pushers: every byte arrives, layer by layer, and anybody may be killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from ipc import TooManyFiles
from ipc.names import SHM
from ipc.ownership import objects_of, remove_objects
from ipc.processes import start_time
from ipc.signals import Signals
from kvledger import CacheConfig, CacheManager, ConfigError, HostPolicy, InvalidCommand, OutOfBlocks, RequestNotReady
from kvledger.doctor.ledgers import ledgers
from kvledger.errors import HandoffError
from kvledger.handoff.peer import Received
from kvledger.handoff.receiver import Receiver
from kvledger.handoff.sender import Sender
from kvledger.run.pattern import PatternEngine, WrongBytes, chain
from statemachine.check import check
from statemachine.content import words_of
from statemachine.events import Outcome
from tests.handoff.split_instance import CONFIG, LAYERS, prompt, write_layer
from tests.processes import alive
from tests.waiting import PATIENCE_S, wait_until
from workers import WorkerFailed
from workers.handoff import pusher
from workers.handoff.progress import LayerProgress
from workers.handoff.pushes import Address, PushStarted
from workers.handoff.shared_memory import MappedPool
from workers.handoff.tickets import CLAIM, Tickets, board_name, claimed
from workers.handoff.transport import Refused
from workers.processes import supervisor

BLOCKS = 6
steps = itertools.count(2)


@pytest.fixture
def names() -> Iterator[tuple[str, str]]:
    both = f"prefill-{os.getpid()}", f"decode-{os.getpid()}"
    yield both
    for name in both:
        remove_objects(name)


class Split(NamedTuple):
    """Both instances in this process; their pushers are real."""

    prefill: CacheManager
    decode: CacheManager
    sender: Sender
    receiver: Receiver
    writes: PatternEngine
    reads: PatternEngine

    def reserve(self, key: str = "r", blocks: int = BLOCKS, **more: Any) -> Address:
        self.decode.match(key, prompt(1))
        return self.receiver.reserve(key, blocks, peer=self.prefill.name, **more)

    def compute(self, key: str = "r", number: int = 1) -> None:
        admission = self.prefill.admit(key, prompt(number), blocks=BLOCKS)
        self.writes.write(admission.block_table, seeds(number))

    def settle(self) -> list[Received]:
        """Until the decode instance has heard of it, and nothing is under way."""
        received: list[Received] = []
        wait_until(
            "the decode instance hears of it, and nothing is under way",
            lambda: received and not self.sender.busy() and not self.receiver.busy(),
            meanwhile=lambda: (self.sender.fold(), received.extend(self.receiver.poll())),
        )
        return received

    def reset(self) -> None:
        """Nothing is under way, and every block is free."""
        for manager in (self.prefill, self.decode):
            for key in list(manager.state.numbers):
                if not key.startswith("(receiving"):
                    manager.release(key)
        wait_until(
            "nothing is under way, and every rank has its pusher",
            lambda: not self.receiver.busy() and len(self.sender.supervisor.ready_pids()) == CONFIG.ranks,
            meanwhile=lambda: (self.sender.poll(), self.receiver.poll()),
        )
        for manager in (self.prefill, self.decode):
            assert not check(manager.state)
            manager.clear()
            assert len(manager.state.device.pool.free) == CONFIG.device_blocks
            for pool in manager.pools:
                for layer in range(LAYERS):
                    pool.tensor(layer, "kv")[:] = 0


@pytest.fixture(scope="module")
def instances() -> Iterator[Split]:
    # In hexadecimal: what a pusher's successor makes outlives a test, and is looked for here.
    names = f"prefill-{os.getpid():x}-both", f"decode-{os.getpid():x}-both"
    with CacheManager.create(names[0], CONFIG) as prefill, CacheManager.create(names[1], CONFIG) as decode:
        engines = PatternEngine(prefill.pools), PatternEngine(decode.pools)
        yield Split(prefill, decode, Sender(prefill), Receiver(decode), *engines)
    assert not objects_of(names[0]) + objects_of(names[1])


@pytest.fixture
def split(instances: Split) -> Iterator[Split]:
    yield instances
    instances.reset()


def seeds(number: int = 1) -> np.ndarray:
    return chain(words_of(prompt(number)), 4 * CONFIG.block_size, b"")


def test_a_request_is_handed_over_and_every_byte_is_there(split: Split) -> None:
    split.compute()
    address = Address.parse(split.reserve().text())
    assert len(split.decode.block_table("r")) == 0, "nobody can use what has not arrived"
    split.sender.send("r", address)
    (received,) = split.settle()
    assert (received.request_id, received.outcome, received.reason) == ("r", Outcome.DONE, "")
    assert received.block_table.tolist() == list(address.blocks) == split.decode.block_table("r").tolist()
    split.reads.verify("r", received.block_table, seeds(), split.decode.next_sequence)
    split.writes.verify("r", split.prefill.block_table("r"), seeds(), split.prefill.next_sequence)
    assert [tuple(done)[:2] for done in split.sender.poll()] == [("r", Outcome.DONE)]
    split.decode.cache("r", BLOCKS)  # and it can be matched by the next request, as if it had been computed here
    assert split.decode.peek(prompt(1), max_blocks=99) == (BLOCKS, 0)


def test_what_the_decode_instance_has_cached_is_not_sent(split: Split) -> None:
    split.compute()
    admission = split.decode.admit("first", prompt(1), blocks=2)
    split.reads.write(admission.block_table, seeds()[:2])
    split.decode.cache("first", 2)
    address = split.reserve(blocks=BLOCKS - 2)
    assert address.first == 2
    split.sender.send("r", address)
    (received,) = split.settle()
    split.reads.verify("r", received.block_table, seeds(), 0)


def test_layer_by_layer_as_they_are_written(split: Split) -> None:
    table = split.prefill.admit("r", prompt(1), blocks=BLOCKS).block_table
    address = split.reserve()
    blocks = np.array(address.blocks)
    split.writes.write(table, seeds(9))  # what stands there is another request's
    step = next(steps)
    split.sender.send("r", address, step=step)
    for word in split.sender.progress:
        word.wrote(step - 1, LAYERS)
    for layer in range(LAYERS):
        for rank in range(CONFIG.ranks):
            write_layer(split.prefill, rank, layer, table, seeds())
            split.sender.progress[rank].wrote(step, layer + 1)
        here, there = split.prefill.pools, split.decode.pools
        for rank in range(CONFIG.ranks):
            source, target = (pools[rank].tensor(layer, "kv") for pools in (here, there))
            wait_until(
                f"layer {layer} arrives on rank {rank}",
                lambda one=source, other=target: np.array_equal(other[blocks], one[table]),
            )
            for later in range(layer + 1, LAYERS):  # it cannot have been sent: it is not said to be written
                assert not there[rank].tensor(later, "kv")[blocks].any()
        if layer < LAYERS - 1:
            split.sender.fold()
            assert split.receiver.poll() == [] and split.sender.busy()
    (received,) = split.settle()
    split.reads.verify("r", received.block_table, seeds(), 0)


def test_many_at_once_in_any_order(split: Split) -> None:
    numbers = range(4)
    for number in numbers:
        split.compute(f"r{number}", number)
    addresses = {}
    for number in reversed(numbers):
        split.decode.match(f"r{number}", prompt(number))
        addresses[number] = split.receiver.reserve(f"r{number}", BLOCKS, peer=split.prefill.name)
    for number in numbers:
        split.sender.send(f"r{number}", addresses[number])
    received: list[Received] = []
    wait_until(
        "all four arrive",
        lambda: len(received) == 4,
        meanwhile=lambda: (split.sender.fold(), received.extend(split.receiver.poll())),
    )
    for one in received:
        assert one.outcome == Outcome.DONE
        split.reads.verify(one.request_id, one.block_table, seeds(int(one.request_id[1:])), 0)
    assert not split.receiver.busy()


def test_a_killed_pusher_is_replaced_and_goes_on(split: Split) -> None:
    table = split.prefill.admit("r", prompt(1), blocks=BLOCKS).block_table
    address = split.reserve()
    step = next(steps)
    split.sender.send("r", address, step=step)
    for layer in range(LAYERS):
        for rank in range(CONFIG.ranks):
            write_layer(split.prefill, rank, layer, table, seeds())
            split.sender.progress[rank].wrote(step, layer + 1)
        before = split.sender.supervisor.pid(layer % 2)
        os.kill(before, signal.SIGKILL)
        wait_until(
            f"the pusher of rank {layer % 2} is replaced",
            lambda rank=layer % 2, pid=before: (
                split.sender.supervisor.ready_pids().keys() - {pid}
                and rank in split.sender.supervisor.ranks()
                and split.sender.supervisor.pid(rank) != pid
            ),
            meanwhile=split.sender.fold,
        )
    (received,) = split.settle()
    assert received.outcome == Outcome.DONE
    split.reads.verify("r", received.block_table, seeds(), 0)


def test_what_a_dead_pusher_had_answered_counts_no_more(split: Split) -> None:
    """Its successor sends once more, and must not be writing when the push counts as arrived."""
    table = split.prefill.admit("r", prompt(1), blocks=BLOCKS).block_table
    split.writes.write(table, seeds())
    step = next(steps)
    split.sender.send("r", split.reserve(), step=step)
    split.sender.progress[0].wrote(step, LAYERS)
    (push,) = split.sender._pushes.values()
    wait_until("rank 0 answers", lambda: push.answers, meanwhile=split.sender.fold)
    assert [*push.answers] == [0]
    os.kill(split.sender.supervisor.pid(0), signal.SIGKILL)
    wait_until(
        "the death of rank 0's pusher is noticed",
        lambda: 0 not in split.sender.supervisor.ranks(),
        meanwhile=split.sender.fold,
    )
    assert not push.answers
    split.sender.progress[1].wrote(step, LAYERS)
    (received,) = split.settle()
    assert received.outcome == Outcome.DONE and sorted(push.answers) == [0, 1]
    split.reads.verify("r", received.block_table, seeds(), 0)


def test_a_pusher_forgets_what_is_over(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    listen = split.sender.supervisor.acknowledgements
    monkeypatch.setattr(
        split.sender.supervisor, "acknowledgements", lambda: (answers.append(listen()), answers[-1])[-1]
    )
    split.compute()
    over, step = split.sender._next, next(steps)
    split.sender.send("r", split.reserve(), step=step)
    log = split.sender._writer
    control = log._control
    wait_until(
        "the push is taken up, which is not yet over",
        lambda: all(line.cursor >= log.next_sequence for line in control.readers() if line.worker),
    )
    split.prefill.release("r")
    split.settle()
    split.decode.release("r")
    split.compute()
    split.sender.send("r", split.reserve(), step=step)  # a pusher takes up pushes in their order
    for word in split.sender.progress:
        word.wrote(step, LAYERS)
    assert [received.outcome for received in split.settle()] == [Outcome.DONE]
    assert {answer.transfer for some in answers for answer in some} == {over + 1}  # type: ignore[union-attr]


def test_a_push_that_takes_too_long_times_out_and_its_room_is_quarantined(names: tuple[str, str]) -> None:
    hasty = CacheConfig(**{**vars(CONFIG), "transfer_timeout_s": 0.3})
    with CacheManager.create(names[0], hasty) as prefill, CacheManager.create(names[1], CONFIG) as decode:
        it = Split(prefill, decode, Sender(prefill), Receiver(decode), PatternEngine(prefill.pools), None)  # type: ignore[arg-type]
        it.compute()
        it.sender.send("r", it.reserve(), step=1)  # which nobody ever computes
        (received,) = it.settle()
        assert received.outcome == Outcome.TIMED_OUT and "ranks [0, 1]" in received.reason
        assert len(received.block_table) == 0
        assert not check(decode.state) and set(decode.state.numbers) == {"r"}


def test_a_claimed_room_stays_quarantined_until_its_writer_lets_go(split: Split) -> None:
    """A real pusher process stopped in the middle of a layer, played by its own claim word."""
    split.compute()
    address = split.reserve()
    pid = split.sender.supervisor.pid(0)
    os.kill(pid, signal.SIGSTOP)  # it cannot answer, nor clear the claim that we write for it
    worker = split.sender.supervisor._workers[0]
    worker.signals.words[CLAIM] = address.ticket
    split.sender.send("r", address)
    split.decode.release("r")  # the decode instance gives up: the room must not be used again
    for _ in range(20):
        time.sleep(0.002)
        split.receiver.fold()
        assert split.receiver.busy() and split.receiver.quarantined_blocks == BLOCKS
        assert not set(address.blocks) & set(split.decode.state.device.pool.free)
    os.kill(pid, signal.SIGKILL)  # it is proven dead: nobody writes any more
    wait_until("the room is free again", lambda: not split.receiver.busy(), meanwhile=split.receiver.fold)
    assert set(address.blocks) <= set(split.decode.state.device.pool.free)
    split.prefill.release("r")
    wait_until("rank 0 has a pusher again", lambda: 0 in split.sender.supervisor.ranks(), meanwhile=split.sender.fold)


def test_a_successor_waits_for_who_still_writes_into_its_pool(
    split: Split, names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = CacheManager.create(names[1], CONFIG)
    decode.match("r", prompt(1))
    address = Receiver(decode).reserve("r", BLOCKS, peer=split.prefill.name)
    decode.close(keep=True)  # as a killed engine leaves it
    pid = split.sender.supervisor.pid(1)
    os.kill(pid, signal.SIGSTOP)
    split.sender.supervisor._workers[1].signals.words[CLAIM] = address.ticket
    monkeypatch.setattr("kvledger.manager.handoffs.STILL_WRITING_S", 0.05)
    for _ in range(2):  # who gives up leaves the next one as careful
        with pytest.raises(HandoffError, match=rf"processes \[{pid}\] still write"):
            CacheManager.open(names[1])
    os.kill(pid, signal.SIGKILL)
    wait_until(
        "the pusher's death is noticed",
        lambda: pid not in split.sender.supervisor.ready_pids(),
        meanwhile=split.sender.fold,
    )
    with CacheManager.open(names[1]) as successor:
        assert len(successor.state.device.pool.free) == CONFIG.device_blocks
        Receiver(successor)


def test_a_file_in_the_place_of_the_board_is_in_nobodys_way(names: tuple[str, str]) -> None:
    stray = SHM / board_name(names[1])[1:]
    with CacheManager.create(names[1], CONFIG) as decode:
        stray.touch(0o600)
        Receiver(decode).close()
        decode.close(keep=True)
    with CacheManager.open(names[1]) as successor:
        Receiver(successor)
    stray.unlink()


def test_a_board_that_cannot_be_looked_at_is_not_taken_for_none(
    names: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its blocks would become free while somebody may still write them."""

    def refused(ledger: str, *, inherit: bool) -> Tickets:
        raise TooManyFiles("as many files are open as may be")

    CacheManager.create(names[1], CONFIG).close(keep=True)
    with monkeypatch.context() as patch:
        patch.setattr("kvledger.manager.handoffs.Tickets", refused)
        with pytest.raises(TooManyFiles):
            CacheManager.open(names[1])
    CacheManager.open(names[1]).close()


def test_a_pusher_claims_before_it_looks_and_lets_go_after(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    split.compute()
    address = split.reserve()
    order = PushStarted(
        1, 0, address.ticket, address.board, address.slot, "r", address.ledger, address.layout, address.pools,
        split.prefill.state.requests[split.prefill.state.numbers["r"]].table, array("i", address.blocks),
    )  # fmt: skip
    signals = Signals(f"/{split.decode.name}.test.signals", create=True)
    pool = MappedPool(0, split.prefill.pools[0], signals, order)  # type: ignore[arg-type]
    seen = []
    stands = Tickets.stands

    def looking(board: Tickets, slot: int, ticket: int) -> bool:
        seen.append((signals.words[CLAIM], split.decode.pools[0].tensor(0, "kv").any()))
        return stands(board, slot, ticket)

    monkeypatch.setattr(Tickets, "stands", looking)
    pool.send(order, 0)
    assert seen == [(address.ticket, False)] and signals.words[CLAIM] == 0
    assert split.decode.pools[0].tensor(0, "kv").any() and not split.decode.pools[0].tensor(1, "kv").any()
    split.decode.release("r")
    with pytest.raises(Refused, match="taken the blocks back"):
        pool.send(order, 1)
    assert signals.words[CLAIM] == 0 and not split.decode.pools[0].tensor(1, "kv").any()
    pool.close()
    signals.close(remove=True)


def test_a_revoked_ticket_is_refused_whatever_the_pusher_is_told(split: Split) -> None:
    split.compute()
    address = split.reserve()
    split.decode.release("r")
    wait_until("the room is free again", lambda: not split.receiver.busy(), meanwhile=split.receiver.fold)
    taken = split.decode.admit("other", prompt(2), blocks=CONFIG.device_blocks).block_table
    split.reads.write(taken[:BLOCKS], seeds(2))
    split.sender.send("r", address)  # an old address
    done: list[Any] = []
    wait_until("the push ends", lambda: done, meanwhile=lambda: done.extend(split.sender.poll()))
    assert done[0].outcome == Outcome.FAILED and "has taken the blocks back" in done[0].reason
    split.reads.verify("other", taken[:BLOCKS], seeds(2), 0)


def test_releasing_a_request_ends_its_push(split: Split) -> None:
    split.compute()
    split.sender.send("r", split.reserve(), step=next(steps) + 1)
    for refused in (
        lambda: split.prefill.trim("r", 1),
        lambda: split.prefill.extend("r"),
        lambda: split.prefill.give_back("r", [0]),
        lambda: split.decode.extend("r"),
    ):
        with pytest.raises(RequestNotReady, match="being handed over"):
            refused()
    with pytest.raises(TimeoutError, match="pushes"):
        split.prefill.pause(0)
    split.prefill.resume()
    split.prefill.release("r")
    (received,) = split.settle()
    assert received.outcome == Outcome.FAILED and "has released the request" in received.reason


def test_addresses_that_do_not_fit_are_refused(split: Split) -> None:
    split.compute()
    address = split.reserve()
    for change, error, words in (
        ({"peer": "somebody"}, HandoffError, "meant for instance 'somebody'"),
        ({"ledger": split.prefill.name}, HandoffError, "to itself"),
        ({"block_size": 8}, HandoffError, "same shape"),
        ({"layout": "{}"}, HandoffError, "not a pool layout"),
        ({"layout": CONFIG.layout._replace(layers=9).text()}, HandoffError, "same shape"),
        ({"blocks": tuple(range(BLOCKS + 1))}, InvalidCommand, "allocate all of them first"),
    ):
        with pytest.raises(error, match=words):
            split.sender.send("r", address._replace(**change))
    for text in ("", "{}", "[1]", address.text().replace('"blocks": [', '"blocks": [-1, '), "[" * 100_000):
        with pytest.raises(ValueError, match="not the address"):
            Address.parse(text)
    with pytest.raises(InvalidCommand, match="step"):
        split.sender.send("r", address, step=-1)
    assert not split.sender.busy()


@pytest.mark.parametrize("wrong", ["pools", "board", "ledger", "blocks"])
def test_another_pool_is_refused_by_the_pusher(split: Split, wrong: str) -> None:
    """What the prefill instance cannot know: the pool behind the name is another one, or gone."""
    split.compute()
    address = split.reserve()
    change: dict[str, Any] = {
        "pools": {"pools": ";".join(["0" * 32 + "," + "0" * 32] * 2)},
        "board": {"board": 1},
        "ledger": {"ledger": f"nobody-{os.getpid()}"},
        "blocks": {"blocks": tuple(range(1000, 1000 + BLOCKS))},
    }[wrong]
    split.sender.send("r", address._replace(**change))
    done: list[Any] = []
    wait_until("the push ends", lambda: done, meanwhile=lambda: done.extend(split.sender.poll()))
    assert done[0].outcome == Outcome.FAILED
    words = {"ledger": "cannot be attached", "blocks": "in a pool of"}.get(wrong, "is not the instance that gave")
    assert words in done[0].reason
    (received,) = split.settle()
    assert received.outcome == Outcome.FAILED
    assert not any(pool.tensor(layer, "kv").any() for pool in split.decode.pools for layer in range(LAYERS))


def test_reserving_says_what_is_wrong(split: Split) -> None:
    split.decode.match("r", prompt(1))
    with pytest.raises(HandoffError, match="no sender runs"):
        split.receiver.reserve("r", 1, peer=f"nobody-{os.getpid()}")
    with pytest.raises(OutOfBlocks):
        split.receiver.reserve("r", CONFIG.device_blocks + 1, peer=split.prefill.name)
    with pytest.raises(InvalidCommand, match="blocks"):
        split.receiver.reserve("r", 0, peer=split.prefill.name)
    split.receiver.reserve("r", 1, peer=split.prefill.name)
    with pytest.raises(HandoffError, match="already"):
        split.receiver.reserve("r", 1, peer=split.prefill.name)
    with pytest.raises(InvalidCommand, match="has a receiver already"):
        Receiver(split.decode)
    with pytest.raises(InvalidCommand, match="has a sender already"):
        Sender(split.prefill)
    with CacheManager.create(f"alone-{os.getpid()}", CacheConfig(device_blocks=4)) as alone:
        for kind in (Sender, Receiver):
            with pytest.raises(ConfigError, match="shared memory"):
                kind(alone)


def test_reserving_leaves_the_news_of_others() -> None:
    """It waits for copies out of what it reserves; who else became ready meanwhile is still reported."""
    names = f"prefill-{os.getpid():x}-news", f"decode-{os.getpid():x}-news"
    swapping = CacheConfig(
        block_size=4,
        device_blocks=16,
        host_blocks=64,
        host_policy=HostPolicy.EXCLUSIVE,
        ranks=1,
        block_bytes=64,
    )
    plain = CacheConfig(block_size=4, device_blocks=16, ranks=1, block_bytes=64)
    with CacheManager.create(names[0], plain) as prefill, CacheManager.create(names[1], swapping) as decode:
        Sender(prefill)
        receiver = Receiver(decode)
        for number in range(4):  # the device is full of unused cached blocks
            decode.admit(f"old{number}", np.arange(16) + 1000 * number)
            decode.cache(f"old{number}")
            decode.release(f"old{number}")
        decode.match("target", ())
        assert not decode.admit("other", np.arange(24) + 50_000).ready
        receiver.reserve("target", 4, peer=prefill.name)
        told: list[str] = []
        wait_until(
            "a request is reported", lambda: told.extend(progress.request_id for progress in decode.poll()) or told
        )
        assert told == ["other"]


def test_a_receive_that_never_begins_times_out(split: Split) -> None:
    address = split.reserve(timeout=0)
    (received,) = split.settle()
    assert received.outcome == Outcome.TIMED_OUT
    split.compute()
    split.sender.send("r", address)  # too late
    wait_until("the push ends", lambda: not split.sender.busy(), meanwhile=split.sender.fold)
    assert not any(pool.tensor(layer, "kv").any() for pool in split.decode.pools for layer in range(LAYERS))


def test_a_pusher_that_cannot_start_says_why(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with CacheManager.create(names[0], CONFIG) as prefill:
        monkeypatch.setattr(pusher, "PROGRAM", ("-c", "import sys; sys.exit('no such thing')"))
        with pytest.raises(WorkerFailed, match="no such thing"):
            Sender(prefill)
        monkeypatch.undo()
        assert not [own for own in objects_of(names[0]) if "pushes" in own.name]
        Sender(prefill)  # nothing is in the way of another try
    assert supervisor._PROGRAM != pusher.PROGRAM


def test_pushers_are_workers_of_their_ledger(split: Split) -> None:
    (entry,) = [ledger for ledger in ledgers() if ledger.name == split.prefill.name]
    pushers = {split.sender.pid(rank) for rank in range(CONFIG.ranks)}
    transfers = {split.prefill.worker_pid(rank) for rank in range(CONFIG.ranks)}
    assert entry.state == "alive" and set(entry.workers) == pushers | transfers and os.getpid() not in entry.workers


def test_progress_only_grows(names: tuple[str, str]) -> None:
    word = LayerProgress(names[0], 0, create=True)
    word.wrote(1, LAYERS)
    assert word.reached(1, LAYERS) and word.reached(1, 1) and not word.reached(2, 1)
    word.wrote(2, 1)
    assert word.reached(1, LAYERS) and word.reached(2, 1) and not word.reached(2, 2)
    for step, layers in ((1, LAYERS), (2, 0), (0, 1), (3, 1 << 16)):
        with pytest.raises(ValueError, match="only grows"):
            word.wrote(step, layers)
    word.close(remove=True)


def test_tickets() -> None:
    name = f"tickets-{os.getpid()}"
    board = Tickets(name, create=True)
    slot, ticket = board.issue() or (0, 0)
    seen = Tickets(name)
    assert seen.id == board.id and seen.stands(slot, ticket)
    assert not seen.stands(slot, ticket ^ 1) and not seen.stands(slot, ticket ^ 2) and not seen.stands(0, board.id)
    assert not seen.stands(1 << 20, ticket) and not seen.stands(slot, 0)
    heir = Tickets(name, inherit=True)
    assert heir.revoke_all() == {ticket} and not seen.stands(slot, ticket)
    assert heir.revoke_all() == {ticket}, "a successor that dies leaves them to the next"
    assert claimed(set()) == claimed({ticket}) == {}
    board.free(slot)
    while board.issue():
        pass
    for each in (seen, heir):
        each.close()
    board.close(remove=True)


# Two real instances, and either is killed


class Instance:
    """An engine in a process of its own, told what to do over its standard input."""

    def __init__(self, role: str, name: str, *more: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.handoff.split_instance", role, name, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pushers: list[int] = json.loads(self._read())

    def ask(self, *what: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read())

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE_S) == 0
        self._close()

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_two_instances(names: tuple[str, str]) -> None:
    prefill = Instance("prefill", names[0])
    decode = Instance("decode", names[1], names[0])
    for number in range(3):
        address = decode.ask("reserve", f"r{number}", number)
        assert prefill.ask("compute and send", f"r{number}", number, address) == "DONE"
        assert decode.ask("wait and verify", f"r{number}", number) == ["DONE", ""]
    decode.end()
    prefill.end()


@pytest.mark.parametrize("when", ["before it sends", "while it sends"])
def test_the_prefill_instance_is_killed(names: tuple[str, str], when: str) -> None:
    prefill = Instance("prefill", names[0])
    decode = Instance("decode", names[1], names[0])
    pushers = [(pid, start_time(pid)) for pid in prefill.pushers]
    address = decode.ask("reserve", "r", 1)
    if when == "while it sends":
        prefill.ask("compute half and send", "r", 1, address)
    prefill.kill()
    outcome, reason = decode.ask("wait and verify", "r", 1)
    assert outcome == "FAILED" and "is gone" in reason
    assert decode.ask("free blocks when quiet") == CONFIG.device_blocks, "once no pusher can write them any more"
    wait_until("the orphaned pushers leave", lambda: not any(alive(*each) for each in pushers))
    successor = Instance("prefill again", names[0])  # the same ledger, with a new sender
    address = decode.ask("reserve", "r2", 2)
    assert successor.ask("compute and send", "r2", 2, address) == "DONE"
    assert decode.ask("wait and verify", "r2", 2) == ["DONE", ""]
    decode.end()
    successor.end()


@pytest.mark.parametrize("when", ["before it is sent to", "while it is sent to"])
def test_the_decode_instance_is_killed(names: tuple[str, str], when: str) -> None:
    prefill = Instance("prefill", names[0])
    decode = Instance("decode", names[1], names[0])
    address = decode.ask("reserve", "r", 1)
    if when == "while it is sent to":
        prefill.ask("compute half and send", "r", 1, address)
        decode.kill()
        assert prefill.ask("compute the rest") == "FAILED"
    else:
        decode.kill()
        assert prefill.ask("compute and send", "r", 1, address) == "FAILED"
    successor = Instance("decode again", names[1], names[0])  # a warm pool, new tickets
    assert prefill.ask("compute and send", "old", 3, address) == "FAILED"
    address = successor.ask("reserve", "r2", 2)
    assert prefill.ask("compute and send", "r2", 2, address) == "DONE"
    assert successor.ask("wait and verify", "r2", 2) == ["DONE", ""]
    successor.end()
    prefill.end()


def test_wrong_bytes_would_be_seen(split: Split) -> None:
    split.compute()
    split.sender.send("r", split.reserve())
    (received,) = split.settle()
    split.decode.pools[1].tensor(LAYERS - 1, "kv")[received.block_table[-1], 3] ^= 1
    with pytest.raises(WrongBytes, match=f"rank 1, layer {LAYERS - 1}"):
        split.reads.verify("r", received.block_table, seeds(), 0)
