"""Applying transfers: the rules of concurrent copies.

A swap-out leaves the device when it starts and pins nothing; a swap-in pins its path like a request. What a transfer
still reads or writes when its run or request goes away belongs to the transfer until it ends.
"""

from __future__ import annotations

from array import array

from statemachine.apply.blocks import take_granted
from statemachine.apply.expect import (
    expect_blocks,
    expect_cut,
    expect_granted,
    node_of,
    one_of,
    request_of,
    violated,
)
from statemachine.apply.tree import delete, drop_copy, pin, put_copy, split, unpin
from statemachine.events import (
    DONE,
    EXCLUSIVE,
    SWAP_IN,
    SWAP_OUT,
    Direction,
    Outcome,
    QuarantineEnded,
    TransferFinished,
    TransferStarted,
)
from statemachine.state.nodes import Node, Part, Request, Transfer
from statemachine.state.places import Place
from statemachine.state.state import State
from statemachine.state.tree import content_of

_DIRECTIONS = tuple(Direction)
_OUTCOMES = tuple(Outcome)


def transfer_started(state: State, event: TransferStarted) -> None:
    """A copy is ordered."""
    direction = one_of(event, _DIRECTIONS, event.direction)
    if event.transfer != state.next_transfer:
        violated(event, f"transfer {event.transfer} is not the next new one")
    if not event.nodes or len(event.nodes) != len(event.counts):
        violated(event, "runs and counts do not fit")
    if not sum(event.counts) == len(event.sources) == len(event.targets):
        violated(event, "counts, sources and targets do not fit")
    nodes = [node_of(state, event, id) for id in event.nodes]
    if len(set(nodes)) != len(nodes):
        violated(event, "a run is named twice")
    if direction == SWAP_IN:
        _swap_in(state, event, nodes)
    else:
        _copy_out(state, event, direction, nodes)
    state.next_transfer += 1


def _new_transfer(state: State, event: TransferStarted, direction: Direction, nodes: list[Node]) -> Transfer:
    source, target = state.route(direction)
    parts = [Part(node, node.size) for node in nodes]
    route = source.number, target.number
    return Transfer(event.transfer, direction, route, parts, event.sources, event.targets, event.after)


def _swap_in(state: State, event: TransferStarted, nodes: list[Node]) -> None:
    source, target = state.route(SWAP_IN)
    request = request_of(state, event, event.request)
    above = nodes[0].parent
    assert above is not None
    if request.leaf is not nodes[-1] or len(request.table) != nodes[0].start or event.upper:
        violated(event, f"these runs are not the host part of the path of {request.request_id!r}")
    if above.parent is not None and above.copies[target.number] is None:
        violated(event, f"run {above.id} above has no place on the device")
    expected = array("i")
    for node, count in zip(nodes, event.counts, strict=True):
        if node.parent is not above or count != node.size:
            violated(event, f"run {node.id} does not continue the path")
        copy = node.copies[source.number]
        if node.copies[target.number] is not None or copy is None or not copy.ready or node.transfer is not None:
            violated(event, f"run {node.id} is not at rest on the host")
        expected.extend(copy.ids)
        above = node
    expect_blocks(state, event, source, event.sources, expected, "the host copy of these runs")
    plain = expect_granted(state, event, event.targets, event.after, event.held)

    take_granted(state, plain, event.after, event.held)
    transfer = _new_transfer(state, event, SWAP_IN, nodes)
    pin(state, nodes[-1])
    position = 0
    for node in nodes:
        put_copy(target, node, event.targets[position : position + node.size], False)
        node.transfer = transfer
        position += node.size
    source.resident -= position
    transfer.leaf = nodes[-1]
    transfer.waiters[request.number] = None
    request.waits_for[transfer.id] = len(request.table)
    request.table.extend(event.targets)
    state.transfers[transfer.id] = transfer
    state.counters.swapped_in_blocks += position


def _copy_out(state: State, event: TransferStarted, direction: Direction, nodes: list[Node]) -> None:
    source, target = state.route(direction)
    leaves = direction == SWAP_OUT
    if event.request or event.after or event.held:
        violated(event, "a copy to the host waits for nothing")
    partial = nodes[0 if leaves else -1]
    taken = event.counts[0 if leaves else -1]
    cut = partial.size - taken if leaves else taken
    if bool(event.upper) != (taken != partial.size):
        violated(event, f"run {partial.id} has to be cut exactly if it is taken in part")
    expect_cut(state, event, partial, cut, event.upper)
    expected = array("i")
    members = set(nodes)
    for node, count in zip(nodes, event.counts):
        if count != node.size and node is not partial:
            violated(event, f"run {node.id} is taken in part")
        copy = node.copies[source.number]
        if (
            copy is None
            or not copy.ready
            or node.elsewhere(source.number)
            or node.transfer is not None
            or node.uncomputed
        ):
            violated(event, f"run {node.id} is not at rest on the device alone")
        expected.extend(copy.ids[node.size - count :] if leaves else copy.ids[:count])
        if leaves and node.pins:
            violated(event, f"run {node.id} is in use ({node.pins} pins)")
        if leaves:
            for child in node.children.values():
                if child.copies[source.number] is not None and child not in members:
                    violated(event, f"run {node.id} has the child {child.id} on the device")
    expect_blocks(state, event, source, event.sources, expected, "the device copy of these runs")
    free = target.pool.free
    count = len(event.targets)
    expect_blocks(state, event, target, event.targets, free[: -count - 1 : -1], "next on the free list")

    if event.upper:
        upper = split(state, partial, cut, event.upper)
        if not leaves:
            nodes[-1] = upper
    del free[len(free) - count :]
    transfer = _new_transfer(state, event, direction, nodes)
    position = count
    for node in reversed(nodes):
        stop, position = position, position - node.size
        if leaves:
            drop_copy(source, node)
        put_copy(target, node, event.targets[position:stop], False)
        node.transfer = transfer
    if leaves:
        transfer.held_sources.extend(event.sources[::-1])
        state.counters.swapped_out_blocks += count
        state.counters.evicted(source.number, count)
    else:
        state.counters.backed_up_blocks += count
    state.transfers[transfer.id] = transfer


def transfer_finished(state: State, event: TransferFinished) -> None:
    """A copy ended: what is valid counts from now on, the rest is undone."""
    transfer = state.transfers.get(event.transfer)
    if transfer is None or transfer.quarantined:
        violated(event, f"transfer {event.transfer} is not in flight")
    outcome = one_of(event, _OUTCOMES, event.outcome)
    total = len(transfer.targets)
    if event.valid > total or (outcome == DONE) != (event.valid == total):
        violated(event, f"{event.valid} of {total} valid blocks do not go with {outcome.name}")
    boundary = transfer.boundary(event.valid) if event.valid < total else None
    if boundary is None:
        if event.upper:
            violated(event, "nothing has to be cut")
    elif event.upper != state.next_node:
        violated(event, f"run {boundary[0].id} has to be cut at {boundary[1]} with the next new id")
    else:
        split(state, *boundary, event.upper)
    del state.transfers[transfer.id]
    if outcome == Outcome.TIMED_OUT:
        transfer.quarantined = True
        state.transfers[transfer.id] = transfer
    if outcome != DONE:
        state.counters.failed_transfers += 1
    if transfer.direction == SWAP_IN:
        _finish_swap_in(state, transfer, event.valid, outcome)
    else:
        _finish_copy_out(state, transfer, event.valid)
    for id in transfer.waiters:
        state.requests[id].waits_for.pop(transfer.id, None)
    transfer.waiters = {}
    _settle(state, transfer)


def _finish_swap_in(state: State, transfer: Transfer, valid: int, outcome: Outcome) -> None:
    source = state.places[transfer.source]
    undone: list[Node] = []
    position = 0
    for part in transfer.parts:
        targets = transfer.targets[position : position + part.size]
        sources = transfer.sources[position : position + part.size]
        good = position + part.size <= valid
        position += part.size
        node = part.node
        if part.discard or not good:
            transfer.held_targets.extend(targets[::-1])
        if node is None:
            transfer.held_sources.extend(sources[::-1])
            continue
        node.transfer = None
        source.resident += node.size
        copy = node.copies[transfer.target]
        if copy is not None and good and not part.discard:
            copy.ready = True
        if copy is None or not copy.ready:
            if copy is not None:
                undone.append(node)
        elif state.policy == EXCLUSIVE:
            transfer.held_sources.extend(sources[::-1])
            drop_copy(source, node)
    if undone:
        for id in [*transfer.waiters]:
            _shorten(state, state.requests[id], undone[0])
        target = state.places[transfer.target]
        for node in undone:
            drop_copy(target, node)
        _abandon_below(target, undone[-1])
    if transfer.leaf is not None:
        leaf = transfer.leaf
        transfer.leaf = None
        unpin(state, leaf)
    if undone and outcome == Outcome.CORRUPT:
        delete(state, undone[0])


def _shorten(state: State, request: Request, first: Node) -> None:
    """Take the run ``first`` and all below it from a request's path; its words are the request's own again."""
    lost: list[Node] = []
    node = request.leaf
    while node.parent is not None:
        lost.append(node)
        if node is first:
            break
        node = node.parent
    else:
        return
    above = first.parent
    assert above is not None
    lost.reverse()
    start, stop = first.start, request.leaf.end
    request.words = content_of(lost) + request.words
    request.table = request.table[:start] + request.table[stop:]
    for id in list(request.waits_for):
        other = state.transfers.get(id)
        if request.waits_for[id] >= stop:
            request.waits_for[id] -= stop - start
        elif request.waits_for[id] >= start:
            del request.waits_for[id]
            if other is not None:
                other.waiters.pop(request.number, None)
    unpin(state, request.leaf, above=above)
    request.leaf = above
    request.matched = min(request.matched, start)


def _abandon_below(place: Place, node: Node) -> None:
    """Swap-ins of runs below one that did not arrive go on for nothing: nobody waits for them, the host copy stays."""
    for child in node.children.values():
        if child.copies[place.number] is not None:
            assert child.transfer is not None
            child.transfer.part_of(child).discard = True
            drop_copy(place, child)
            _abandon_below(place, child)


def _finish_copy_out(state: State, transfer: Transfer, valid: int) -> None:
    target = state.places[transfer.target]
    doomed: list[Node] = []
    position = 0
    for part in transfer.parts:
        targets = transfer.targets[position : position + part.size]
        good = position + part.size <= valid
        position += part.size
        node = part.node
        if node is None:
            transfer.held_targets.extend(targets[::-1])
            continue
        node.transfer = None
        copy = node.copies[target.number]
        assert copy is not None
        if good:
            copy.ready = True
            continue
        transfer.held_targets.extend(targets[::-1])
        drop_copy(target, node)
        if not node.elsewhere(target.number):
            doomed.append(node)
    for node in doomed:
        if node.id in state.nodes:
            delete(state, node)


def _settle(state: State, transfer: Transfer) -> None:
    """Free what belongs to an ended transfer; after a time-out only what no late copy can write any more."""
    state.places[transfer.source].pool.free.extend(transfer.held_sources)
    if transfer.quarantined:
        transfer.held_sources = array("i")
        transfer.parts = []
    else:
        state.places[transfer.target].pool.free.extend(transfer.held_targets)


def quarantine_ended(state: State, event: QuarantineEnded) -> None:
    """The last possible writer of a timed-out transfer is known to be done."""
    transfer = state.transfers.get(event.transfer)
    if transfer is None or not transfer.quarantined:
        violated(event, f"transfer {event.transfer} is not quarantined")
    del state.transfers[transfer.id]
    state.places[transfer.source].pool.free.extend(transfer.held_sources)
    state.places[transfer.target].pool.free.extend(transfer.held_targets)
