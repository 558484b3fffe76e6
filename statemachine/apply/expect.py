"""What an event must agree with before it may change the state."""

from __future__ import annotations

from enum import IntEnum
from typing import NoReturn, TypeVar

from statemachine.errors import InvariantViolation
from statemachine.events import Event, IntArray
from statemachine.items import BlockItems, agreement, extended
from statemachine.state.nodes import Node, Request, from_end
from statemachine.state.ownership import owner
from statemachine.state.places import Place
from statemachine.state.state import State

Member = TypeVar("Member", bound=IntEnum)


def violated(event: Event, message: str) -> NoReturn:
    """Report an event that contradicts the state."""
    raise InvariantViolation(f"{type(event).__name__}: {message}\n  event: {event!r:.500}")


def expect_blocks(state: State, event: Event, place: Place, given: IntArray, expected: IntArray, what: str) -> None:
    """Compare block ids as whole slices; only a mismatch looks for the block and its owner."""
    if given == expected:
        return
    for position, block in enumerate(given):
        if position >= len(expected) or expected[position] != block:
            violated(event, f"{place} block {block} is not {what}; it belongs to {owner(state, place, block)}")
    violated(event, f"{len(expected)} blocks are {what}, the event names {len(given)}")


def node_of(state: State, event: Event, id: int) -> Node:
    """The run of that id."""
    node = state.nodes.get(id)
    if node is None:
        violated(event, f"there is no run {id}")
    return node


def request_of(state: State, event: Event, id: int) -> Request:
    """The live request of that number."""
    request = state.requests.get(id)
    if request is None:
        violated(event, f"there is no live request {id}")
    return request


def one_of(event: Event, members: tuple[Member, ...], number: int) -> Member:
    """The member of an enumeration that has that number, of all of them in order. (Calling the enumeration: 320 ns.)"""
    if not 0 <= number < len(members):
        violated(event, f"{number} is no {type(members[0]).__name__}")
    return members[number]


def items_with(event: Event, items: BlockItems, records: bytes, block_size: int) -> BlockItems:
    """Items, and those that an event names after them, by block."""
    try:
        return extended(items, records, block_size)
    except ValueError as error:
        violated(event, str(error))


def expect_items(event: Event, run: Node, items: BlockItems, stop: int) -> None:
    """In the blocks of a run, up to position ``stop``, begin the items of the request that goes through it."""
    if agreement(run.items, items, run.start, stop) < stop:
        violated(event, f"the images and sounds of the request and of run {run.id} differ")


def expect_cut(state: State, event: Event, node: Node, cut: int, upper: int) -> None:
    """A cut lies inside its run, and its upper part gets the next id."""
    if upper and (upper != state.next_node or not 0 < cut < node.size):
        violated(event, f"run {node.id} of {node.size} blocks cannot be cut at {cut} with new id {upper}")


def expect_free(state: State, event: Event, given: IntArray) -> None:
    """The ids come from the top of the device's free list."""
    top = from_end(state.device.pool.free, len(given))
    if given != top:
        expect_blocks(state, event, state.device, given, top, "next on the free list")


def expect_granted(state: State, event: Event, given: IntArray, after: IntArray, held: IntArray) -> int:
    """The ids come from the top of the free list, then from what transfers hold. Returns how many are plainly free."""
    plain = len(given) - sum(held) if held else len(given)
    if plain < 0 or len(after) != len(held):
        violated(event, "the counts of held blocks do not fit the blocks")
    expect_free(state, event, given[:plain] if held else given)
    position = plain
    for id, count in zip(after, held, strict=True):
        transfer = state.transfers.get(id)
        if transfer is None or transfer.quarantined or not 0 < count <= len(transfer.held_sources):
            violated(event, f"transfer {id} does not hold {count} device blocks")
        expected = transfer.held_sources[len(transfer.held_sources) - count :][::-1]
        expect_blocks(state, event, state.device, given[position : position + count], expected, f"held by {id}")
        position += count
    return plain
