"""Applying transfers: the rules of concurrent copies.

A swap-out leaves the device when it starts and pins nothing; a swap-in pins its path like a request. What a transfer
still reads or writes when its run or request goes away belongs to the transfer until it ends.
"""

from __future__ import annotations

from array import array

from statemachine.apply.expect import expect_blocks, expect_cut, expect_granted, node_of, one_of, request_of, violated
from statemachine.apply.requests import take_granted
from statemachine.events import (
    DEVICE,
    DONE,
    EXCLUSIVE,
    HOST,
    SWAP_IN,
    SWAP_OUT,
    Direction,
    Outcome,
    QuarantineEnded,
    TransferFinished,
    TransferStarted,
)
from statemachine.state import tree
from statemachine.state.nodes import Node, Part, Request, Transfer
from statemachine.state.state import State

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
    members = set(nodes)
    if len(members) != len(nodes):
        violated(event, "a run is named twice")
    if direction == SWAP_IN:
        _swap_in(state, event, nodes)
    else:
        _copy_out(state, event, direction, nodes, members)
    state.next_transfer += 1


def _swap_in(state: State, event: TransferStarted, nodes: list[Node]) -> None:
    request = request_of(state, event, event.request)
    above = nodes[0].parent
    assert above is not None
    if request.leaf is not nodes[-1] or len(request.table) != nodes[0].start or event.upper:
        violated(event, f"these runs are not the host part of the path of {request.key!r}")
    if above.parent is not None and above.device is None:
        violated(event, f"run {above.id} above has no place on the device")
    expected = array("i")
    for node, count in zip(nodes, event.counts, strict=True):
        if node.parent is not above or count != node.size:
            violated(event, f"run {node.id} does not continue the path")
        if node.device is not None or not node.host_ready or node.transfer is not None:
            violated(event, f"run {node.id} is not at rest on the host")
        assert node.host is not None
        expected.extend(node.host)
        above = node
    expect_blocks(state, event, HOST, event.sources, expected, "the host copy of these runs")
    plain = expect_granted(state, event, event.targets, event.after, event.held)

    take_granted(state, plain, event.after, event.held)
    parts = [Part(node, node.size) for node in nodes]
    transfer = Transfer(event.transfer, SWAP_IN, parts, event.sources, event.targets, event.after)
    tree.pin(state, nodes[-1])
    position = 0
    for node in nodes:
        node.device = event.targets[position : position + node.size]
        node.device_ready = False
        node.transfer = transfer
        position += node.size
    state.host_resident -= position
    transfer.leaf = nodes[-1]
    transfer.waiters[request.id] = None
    request.waits[transfer.id] = len(request.table)
    request.table.extend(event.targets)
    state.transfers[transfer.id] = transfer
    state.counters.swapped_in_blocks += position


def _copy_out(
    state: State, event: TransferStarted, direction: Direction, nodes: list[Node], members: set[Node]
) -> None:
    leaves = direction == SWAP_OUT
    first = nodes[0]
    if event.request or event.after or event.held:
        violated(event, "a copy to the host waits for nothing")
    partial = first if leaves else nodes[-1]
    taken = event.counts[0 if leaves else -1]
    if bool(event.upper) != (taken != partial.size):
        violated(event, f"run {partial.id} has to be cut exactly if it is taken in part")
    expect_cut(state, event, partial, partial.size - taken if leaves else taken, event.upper)
    expected = array("i")
    for node, count in zip(nodes, event.counts):
        ids = node.device
        if ids is None or not node.device_ready or node.host is not None or node.transfer is not None or node.ahead:
            violated(event, f"run {node.id} is not at rest on the device alone")
        if count != node.size:
            if node is not partial:
                violated(event, f"run {node.id} is taken in part")
            ids = ids[node.size - count :] if leaves else ids[:count]
        if leaves:
            if node.pins:
                violated(event, f"run {node.id} is in use ({node.pins} pins)")
            for child in node.children.values():
                if child.device is not None and child not in members:
                    violated(event, f"run {node.id} has the child {child.id} on the device")
        expected.extend(ids)
    expect_blocks(state, event, DEVICE, event.sources, expected, "the device copy of these runs")
    free = state.host.free
    count = len(event.targets)
    expect_blocks(state, event, HOST, event.targets, free[: -count - 1 : -1], "next on the free list")

    if event.upper:
        upper = tree.split(state, partial, partial.size - taken if leaves else taken, event.upper)
        if not leaves:
            nodes[-1] = upper
    del free[len(free) - count :]
    parts = [Part(node, node.size) for node in nodes]
    transfer = Transfer(event.transfer, direction, parts, event.sources, event.targets, event.after)
    position = count
    for node in reversed(nodes):
        stop, position = position, position - node.size
        node.host = event.targets[position:stop]
        node.host_ready = False
        node.transfer = transfer
        if leaves:
            tree.leave_device(state, node)
        if not node.pins:
            state.host_order.append(node)
    if leaves:
        transfer.held.extend(event.sources[::-1])
        state.counters.swapped_out_blocks += count
        state.counters.device_evicted_blocks += count
    else:
        state.counters.backed_up_blocks += count
    state.host_resident += count
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
    boundary = _boundary(transfer, event.valid) if event.valid < total else None
    if boundary is None:
        if event.upper:
            violated(event, "nothing has to be cut")
    elif event.upper != state.next_node:
        violated(event, f"run {boundary[0].id} has to be cut at {boundary[1]} with the next new id")
    else:
        tree.split(state, *boundary, event.upper)
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
        state.requests[id].waits.pop(transfer.id, None)
    transfer.waiters = {}
    _settle(state, transfer)


def needs_cut(transfer: Transfer, valid: int) -> bool:
    """Whether a run has to be cut when exactly the first ``valid`` blocks arrived."""
    return _boundary(transfer, valid) is not None


def _boundary(transfer: Transfer, valid: int) -> tuple[Node, int] | None:
    position = 0
    for part in transfer.parts:
        if position < valid < position + part.size and part.node is not None:
            return part.node, valid - position
        position += part.size
    return None


def _finish_swap_in(state: State, transfer: Transfer, valid: int, outcome: Outcome) -> None:
    exclusive = state.policy == EXCLUSIVE
    undone: list[Node] = []
    position = 0
    for part in transfer.parts:
        targets = transfer.targets[position : position + part.size]
        sources = transfer.sources[position : position + part.size]
        good = position + part.size <= valid
        position += part.size
        node = part.node
        if node is None:
            transfer.held_host.extend(sources[::-1])
        else:
            node.transfer = None
            if part.discard or not good:
                transfer.held.extend(targets[::-1])
            if good and not part.discard:
                node.device_ready = True
            if not node.device_ready:
                if node.device is not None:
                    undone.append(node)
                state.host_resident += node.size
            elif exclusive:
                transfer.held_host.extend(sources[::-1])
                node.host = None
                node.host_ready = False
            else:
                state.host_resident += node.size
        if node is None and (part.discard or not good):
            transfer.held.extend(targets[::-1])
    if undone:
        for id in [*transfer.waiters]:
            _shorten(state, state.requests[id], undone[0])
        for node in undone:
            node.device = None
        _abandon_below(state, undone[-1])
    if transfer.leaf is not None:
        leaf = transfer.leaf
        transfer.leaf = None
        tree.unpin(state, leaf)
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
    request.words = tree.content_of(lost) + request.words
    request.table = request.table[:start] + request.table[stop:]
    for id in list(request.waits):
        other = state.transfers.get(id)
        if request.waits[id] >= stop:
            request.waits[id] -= stop - start
        elif request.waits[id] >= start:
            del request.waits[id]
            if other is not None:
                other.waiters.pop(request.id, None)
    tree.unpin(state, request.leaf, above=above)
    request.leaf = above
    request.matched = min(request.matched, start)


def _abandon_below(state: State, node: Node) -> None:
    """Swap-ins of runs below one that did not arrive go on for nothing: nobody waits for them, the host copy stays."""
    for child in node.children.values():
        if child.device is not None:
            transfer = child.transfer
            assert transfer is not None
            part = next(part for part in transfer.parts if part.node is child)
            part.discard = True
            child.device = None
            _abandon_below(state, child)


def _finish_copy_out(state: State, transfer: Transfer, valid: int) -> None:
    doomed: list[Node] = []
    position = 0
    for part in transfer.parts:
        targets = transfer.targets[position : position + part.size]
        good = position + part.size <= valid
        position += part.size
        node = part.node
        if node is None:
            transfer.held_host.extend(targets[::-1])
            continue
        node.transfer = None
        if good:
            node.host_ready = True
            continue
        transfer.held_host.extend(targets[::-1])
        state.host_resident -= node.size
        if not node.pins:
            state.host_order.remove(node)
        node.host = None
        if node.device is None:
            doomed.append(node)
    for node in doomed:
        if node.id in state.nodes:
            delete(state, node)


def delete(state: State, top: Node) -> None:
    """Delete a run and all below it. None of them has a place on the device; what copies use stays with the copies."""
    subtree = [top]
    for node in subtree:
        # by number: a restored state knows no order in which children appeared, and their blocks go on the free list
        subtree.extend(sorted(node.children.values(), key=lambda child: child.id))
    for node in reversed(subtree):
        transfer = node.transfer
        if transfer is not None:
            part = next(part for part in transfer.parts if part.node is node)
            part.node = None
            node.transfer = None
            if transfer.direction != SWAP_IN:
                state.host_resident -= node.size
            elif transfer.leaf is not None:
                part.discard = True
                _unhold(transfer, top)
        elif node.host is not None:
            state.host.free.extend(node.host[::-1])
            state.host_resident -= node.size
        if node.host is not None and node in state.host_order:
            state.host_order.remove(node)
        tree.detach(state, node)


def _unhold(transfer: Transfer, top: Node) -> None:
    """A swap-in below a deleted run holds only what is above it from now on."""
    node = transfer.leaf
    while node is not None and node.parent is not None:
        if node is top:
            transfer.leaf = top.parent
            return
        node = node.parent


def _settle(state: State, transfer: Transfer) -> None:
    """Free what belongs to an ended transfer; after a time-out only what no late copy can write any more."""
    if not transfer.quarantined:
        state.device.free.extend(transfer.held)
        state.host.free.extend(transfer.held_host)
    elif transfer.direction == SWAP_IN:
        state.host.free.extend(transfer.held_host)
        transfer.held_host = array("i")
    else:
        state.device.free.extend(transfer.held)
        transfer.held = array("i")
    if transfer.quarantined:
        transfer.parts = []


def quarantine_ended(state: State, event: QuarantineEnded) -> None:
    """The last possible writer of a timed-out transfer is known to be done."""
    transfer = state.transfers.get(event.transfer)
    if transfer is None or not transfer.quarantined:
        violated(event, f"transfer {event.transfer} is not quarantined")
    del state.transfers[transfer.id]
    state.device.free.extend(transfer.held)
    state.host.free.extend(transfer.held_host)
