"""Making a failing log small: the fewest and shortest commands that still fail, as a test to keep.

The commands behind the log are decided anew by the code at hand. So a failure can be shrunk where the code that made
it runs; a log that was written by other code and is impossible today cannot fail again, and that is said.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvledger.debugger.source.replay import next_resize
from kvledger.debugger.source.source import Entry, Source, SourceError
from kvledger.debugger.verify.predicates import Predicate
from statemachine.apply import apply, genesis
from statemachine.check import check
from statemachine.commands import Admit, Cache, Command, EndQuarantine, FinishTransfer, Match, TakeDigest
from statemachine.decide import decide
from statemachine.decide.derive import NoCommand, commands_of, is_step_of_resize
from statemachine.errors import CommandRejected, OutOfBlocks
from statemachine.events import LedgerOpened, Outcome, TransferStarted
from statemachine.items import NO_ITEMS, BlockItems, by_block
from statemachine.records.replay import MISFITS, misfit_text

Progress = Callable[[int, int], None]


class Step(NamedTuple):
    """A command, and which transfers it started in the log: their numbers change when commands before it go."""

    command: Command
    started: tuple[int, ...] = ()


class Failure(NamedTuple):
    """How a sequence of commands fails."""

    commands: list[Command]
    """Those that were not rejected, up to the one that fails."""
    message: str


class Shrunk(NamedTuple):
    """A minimal failing sequence."""

    opened: LedgerOpened
    commands: list[Command]
    message: str
    before: int
    """How many commands the log had up to the failure."""


def commands_in(source: Source, stop: int) -> tuple[LedgerOpened, list[Step]]:
    """The commands behind a log, up to event ``stop`` or the first that contradicts its state, which is the last one.

    Raises:
        SourceError: the log does not begin with the first event of its ledger.
    """
    if source.first != 1:
        raise SourceError(f"{source.name} begins with event {source.first}: only a log from event 1 on can be shrunk")
    transactions = source.transactions(1, stop)
    opened = next(transactions)[0].event
    assert isinstance(opened, LedgerOpened)
    state = genesis(opened)
    steps: list[Step] = []
    for entries in transactions:
        events = [entry.event for entry in entries]
        try:
            resized = next_resize(source, entries[-1].sequence) if is_step_of_resize(events) else None
            command = commands_of(events, state, resized)
        except NoCommand:
            break  # the events contradict today's rules: nothing can be derived beyond
        if not isinstance(command, TakeDigest):
            steps.append(Step(command, tuple(e.transfer for e in events if isinstance(e, TransferStarted))))
        try:
            for event in events:
                apply(state, event)
        except MISFITS:
            break
    return opened, steps


def run(opened: LedgerOpened, steps: Sequence[Step], holds: Predicate | None) -> Failure | None:
    """Decide and apply; ``None``: nothing fails. What is rejected is passed over.

    Without a predicate it fails where an event cannot be applied or an invariant does not hold.
    """
    state = genesis(opened)
    numbers: dict[int, int] = {}
    """Transfers of the log → transfers here."""
    done: list[Command] = []
    sequence = 1
    for step in steps:
        command = _renumbered(step.command, numbers)
        if command is None:
            continue
        if isinstance(command, FinishTransfer):
            flying = state.transfers.get(command.transfer)
            if flying is None:
                continue
            total = len(flying.targets)
            valid = total if command.outcome == Outcome.DONE else min(command.valid, total - 1)
            command = command._replace(valid=valid)
        try:
            events = decide(state, command)
        except OutOfBlocks as error:
            events = [error.event]
        except CommandRejected:
            continue
        except Exception as error:
            return Failure([*done, command], f"decide fails: {type(error).__name__}: {error}")
        if not events:
            continue
        done.append(command)
        started = [event.transfer for event in events if isinstance(event, TransferStarted)]
        numbers.update(zip(step.started, started))
        for event in events:
            sequence += 1
            message = _failing(state, Entry(sequence, 0, 0, event), holds)
            if message:
                return Failure(done, message)
    return None


def _failing(state: Any, entry: Entry, holds: Predicate | None) -> str:
    try:
        apply(state, entry.event)
    except MISFITS as error:
        return misfit_text(error)
    if holds is not None:
        return "the predicate holds" if holds(state, entry) else ""
    return "; ".join(check(state))


def _renumbered(command: Command, numbers: dict[int, int]) -> Command | None:
    if isinstance(command, FinishTransfer | EndQuarantine):
        number = numbers.get(command.transfer)
        return None if number is None else command._replace(transfer=number)
    return command


def shrink(source: Source, holds: Predicate | None, stop: int, progress: Progress = lambda done, total: None) -> Shrunk:
    """The smallest failing sequence that can be found by leaving out commands, blocks of prompts, and tokens of blocks.

    Raises:
        SourceError: the commands of the log do not fail when they are decided by the code at hand.
    """
    opened, steps = commands_in(source, stop)
    failure = run(opened, steps, holds)
    if failure is None:
        raise SourceError(
            f"the {len(steps)} commands of {source.name} do not fail when this version of kvledger decides them: "
            "nothing to shrink here; bisect and explain read the log as it was written"
        )
    before = len(failure.commands)
    opened, steps = _smallest_blocks(opened, steps, holds)

    def fails(some: list[Step]) -> bool:
        return run(opened, some, holds) is not None

    steps = _fewest(_shortest(_fewest(steps, fails, progress), fails), fails, progress)
    opened = _smallest_pools(opened, lambda smaller: run(smaller, steps, holds) is not None)
    failure = run(opened, steps, holds)
    assert failure is not None
    return Shrunk(opened, failure.commands, failure.message, before)


def _smallest_blocks(
    opened: LedgerOpened, steps: list[Step], holds: Predicate | None
) -> tuple[LedgerOpened, list[Step]]:
    """Blocks of one token each, if that fails as well: only which blocks are equal matters to the tree."""
    size = 4 * opened.block_size
    tokens: dict[bytes, int] = {}

    def plain(words: bytes, items: BlockItems = NO_ITEMS) -> bytes:
        starts = range(0, len(words) - size + 1, size)
        blocks = [words[start : start + size] + items.get(start // size, b"") for start in starts]
        return array("i", [tokens.setdefault(block, len(tokens) + 1) for block in blocks]).tobytes()

    smaller = []
    for step in steps:
        command = step.command
        if isinstance(command, Match | Admit):
            content = plain(bytes(command.words), by_block(command.items, opened.block_size))
            command = command._replace(words=memoryview(content), items=b"")
        elif isinstance(command, Cache):
            if command.items:  # where they stand, only the state says
                return opened, steps
            command = command._replace(words=plain(command.words))
        smaller.append(step._replace(command=command))
    plain_ledger = opened._replace(block_size=1, layout="", pools="")
    return (plain_ledger, smaller) if run(plain_ledger, smaller, holds) is not None else (opened, steps)


def _fewest(steps: list[Step], fails: Callable[[list[Step]], bool], progress: Progress) -> list[Step]:
    """Delta debugging: leave out ever smaller pieces as long as it still fails."""
    pieces = 2
    whole = len(steps)
    while len(steps) > 1:
        size = -(-len(steps) // pieces)
        for start in range(0, len(steps), size):
            rest = steps[:start] + steps[start + size :]
            if fails(rest):
                steps = rest
                pieces = max(pieces - 1, 2)
                progress(whole - len(steps), whole)
                break
        else:
            if size == 1:
                break
            pieces = min(2 * pieces, len(steps))
    return steps


def _shortest(steps: list[Step], fails: Callable[[list[Step]], bool]) -> list[Step]:
    """Cut prompts and numbers of blocks."""
    for index in range(len(steps)):
        for field in ("blocks", "limit", "watermark", "words"):
            value = getattr(steps[index].command, field, None)
            if isinstance(value, int | memoryview | bytes):
                shorten = partial(_with_length, steps, index, field, value)
                length = value if isinstance(value, int) else len(value) // 4
                steps = shorten(_least(length, lambda length, shorten=shorten: fails(shorten(length))))  # type: ignore[misc]
    return steps


def _with_length(steps: list[Step], index: int, field: str, value: Any, length: int) -> list[Step]:
    step = steps[index]
    change: dict[str, Any] = {field: length if isinstance(value, int) else value[: 4 * length]}
    return [*steps[:index], step._replace(command=step.command._replace(**change)), *steps[index + 1 :]]


def _smallest_pools(opened: LedgerOpened, fails: Callable[[LedgerOpened], bool]) -> LedgerOpened:
    size = _least(opened.device_blocks, lambda size: fails(opened._replace(device_blocks=size)))
    opened = opened._replace(device_blocks=size)
    size = _least(opened.host_blocks, lambda size: fails(opened._replace(host_blocks=size)))
    return opened._replace(host_blocks=size)


def _least(length: int, fails: Callable[[int], bool]) -> int:
    """How far a number can go down in halving steps as long as it fails."""
    cut = length
    while cut:
        if fails(length - cut):
            length -= cut
            cut = min(cut, length)
        else:
            cut //= 2
    return length
