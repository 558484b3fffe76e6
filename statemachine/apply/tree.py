"""Changing the prefix tree: pinning a path, giving runs their copies and taking them, cutting and joining runs.

The writers that every handler uses. Whatever gives a run a copy or takes one goes through :func:`put_copy` and
:func:`drop_copy`, so that a place's counts and orders always agree with what lives there.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from statemachine.events import SWAP_IN, IntArray
from statemachine.items import within
from statemachine.state.nodes import NO_CHILDREN, Copy, Node, Part, Transfer
from statemachine.state.places import Place
from statemachine.state.state import State
from statemachine.state.tree import content_of, items_of, root_of


def put_copy(place: Place, node: Node, ids: IntArray, ready: bool) -> None:
    """Give a run its copy in a place. A run that nobody holds goes to the back of the order there."""
    node.copies[place.number] = Copy(ids, ready)
    place.resident += node.size
    if not node.pins:
        place.lru.append(node)
        place.evictable += node.size


def drop_copy(place: Place, node: Node) -> None:
    """Take a run its copy in a place. Whose the blocks are from now on is the caller's business."""
    node.copies[place.number] = None
    place.resident -= node.size
    if not node.pins:
        place.order_of(node).remove(node)
        place.evictable -= node.size


def pin(state: State, leaf: Node) -> None:
    """Count one more holder of the path that ends at ``leaf``."""
    node = leaf
    while node.parent is not None:
        if not node.pins:
            leave_orders(state, node)
        node.pins += 1
        node = node.parent
    node.pins += 1


def pin_below(state: State, chain: Iterable[Node]) -> None:
    """Count one more holder of runs that continue a path which is pinned already."""
    for run in chain:
        if not run.pins:
            leave_orders(state, run)
        run.pins += 1


def count_use(state: State, nodes: Iterable[Node]) -> None:
    """Count one more use of runs, as far as somebody wants to know."""
    enough = state.opened.backup_after
    for node in nodes:
        if node.hits < enough:
            node.hits += 1


def leave_orders(state: State, node: Node) -> None:
    """Somebody holds ``node`` now: it cannot be evicted."""
    for place in state.places:
        if node.copies[place.number] is not None:
            orders = place.orders
            (orders[0] if node in orders[0] else orders[-1]).remove(node)
            place.evictable -= node.size


def unpin(state: State, leaf: Node, above: Node | None = None, final: int = 0) -> None:
    """Count one holder less, from ``leaf`` up to (not including) ``above``, else up to the root.

    Runs that nobody holds any more enter the eviction orders, deepest first; the first ``final`` of them, distrusted
    ones, and those of a retired tree, the one that is evicted first.
    """
    if state.retired and root_of(leaf) in state.retired:
        final = leaf.end
    node = leaf
    while node is not above and node.parent is not None:
        node.pins -= 1
        if not node.pins:
            for place in state.places:
                if node.copies[place.number] is not None:
                    place.orders[0 if final > 0 or node.distrusted else -1].append(node)
                    place.evictable += node.size
            final -= 1
        node = node.parent
    if node is not above:
        node.pins -= 1
        drop_root(state, node)


def drop_root(state: State, root: Node) -> None:
    """Drop a root that leads nowhere and that nobody holds, so that namespaces do not pile up."""
    if root.pins or root.children:
        return
    if root in state.retired:
        del state.retired[root]
    else:
        del state.roots[root.words]


def root(state: State, namespace: bytes) -> Node:
    """The root of a namespace, made when it is needed. A root's ``words`` are its namespace."""
    node = state.roots.get(namespace)
    if node is None:
        node = state.roots[namespace] = Node(0, None, 0, namespace, 0)
    return node


def attach(state: State, node: Node) -> None:
    """Hang a run under its parent."""
    parent = node.parent
    assert parent is not None
    if parent.children is NO_CHILDREN:
        parent.children = {}
    node.distrusted = parent.distrusted
    parent.children[node.key(state.block_bytes)] = node
    state.nodes[node.id] = node


def detach(state: State, node: Node) -> None:
    """Delete a run that has no copy left and no children."""
    parent = node.parent
    assert parent is not None
    del parent.children[node.key(state.block_bytes)]
    if not parent.children:
        parent.children = NO_CHILDREN
        if parent.parent is None:
            drop_root(state, parent)
    del state.nodes[node.id]


def split(state: State, node: Node, cut: int, upper_id: int) -> Node:
    """Cut a run after ``cut`` blocks; returns the new upper part. Pins, copies, orders and transfers follow."""
    length = cut * state.block_bytes
    parent = node.parent
    assert parent is not None
    upper = Node(upper_id, parent, node.start, node.words[:length], cut)
    upper.pins, upper.hits, upper.uncomputed = node.pins, node.hits, node.uncomputed
    if node.distrusted:  # its key is not its content's
        upper.distrusted = True
        del parent.children[node.key(state.block_bytes)]
    for place, copy in zip(state.places, node.copies):
        if copy is not None:
            upper.copies[place.number] = Copy(copy.ids[:cut], copy.ready)
            copy.ids = copy.ids[cut:]
            if not node.pins:
                place.order_of(node).insert_after(node, upper)
    upper.items = within(node.items, upper.start, upper.end)
    parent.children[upper.key(state.block_bytes)] = upper
    node.words = node.words[length:]
    node.items = within(node.items, upper.end, node.end)
    node.start += cut
    node.size -= cut
    node.parent = upper
    upper.children = {node.key(state.block_bytes): node}
    state.nodes[upper_id] = upper
    state.next_node = upper_id + 1
    transfer = node.transfer
    if transfer is not None:
        upper.transfer = transfer
        part = transfer.part_of(node)
        part.size = node.size
        transfer.parts.insert(transfer.parts.index(part), Part(upper, cut, part.discard))
    return upper


def absorb(state: State, node: Node, ancestors: list[Node]) -> None:
    """Let ``node`` take over its nearest ``ancestors`` (nearest first). It keeps its id and its place in the orders."""
    chain = ancestors[::-1]
    top = chain[0]
    above = top.parent
    assert above is not None
    chain.append(node)
    if top.distrusted:  # its key is not its content's
        del above.children[top.key(state.block_bytes)]
    node.words = content_of(chain)
    node.items = items_of(chain)
    for place, copy in zip(state.places, node.copies):
        if copy is not None:
            for ancestor in ancestors:
                place.order_of(ancestor).remove(ancestor)
            copy.ids = ids_of(chain, place.number)
    for ancestor in ancestors:
        del state.nodes[ancestor.id]
    node.start = top.start
    node.size = sum(run.size for run in chain)
    node.parent = above
    above.children[node.key(state.block_bytes)] = node


def distrust(state: State, top: Node) -> None:
    """Let a run and all below it never match again. What nobody holds goes first from here on."""
    block_bytes = state.block_bytes
    above = top.parent
    assert above is not None
    del above.children[top.key(block_bytes)]
    runs = [top]
    for run in runs:
        run.distrusted = True
        runs.extend(run.children.values())
    above.children[top.key(block_bytes)] = top
    for run in runs:
        if run.children:
            run.children = {child.key(block_bytes): child for child in run.children.values()}
    for place in state.places:
        if place.final is not place.lru:
            for node in [node for node in place.lru if node.distrusted]:
                place.lru.remove(node)
                place.final.append(node)


def truncate(state: State, node: Node, count: int) -> None:
    """Cut off the last ``count`` blocks of a run that has one copy only, no children, and that nobody holds."""
    node.size -= count
    node.words = node.words[: node.size * state.block_bytes]
    node.items = within(node.items, node.start, node.end)
    for place, copy in zip(state.places, node.copies):
        if copy is not None:
            copy.ids = copy.ids[: node.size]
            place.resident -= count
            place.evictable -= count


def delete(state: State, top: Node) -> None:
    """Delete a run and all below it. None of them has a copy on the device; what transfers use stays with them."""
    subtree = [top]
    for node in subtree:
        # by number: a restored state knows no order in which children appeared, and their blocks go on the free list
        subtree.extend(sorted(node.children.values(), key=lambda child: child.id))
    for node in reversed(subtree):
        transfer = node.transfer
        if transfer is not None:
            part = transfer.part_of(node)
            part.node = None
            node.transfer = None
            if transfer.direction == SWAP_IN:
                state.places[transfer.source].resident += node.size  # it was taken out when it set off
                part.discard = True
                _unhold(transfer, top)
        for place, copy in zip(state.places, node.copies):
            if copy is not None:
                if transfer is None:
                    place.pool.free.extend(copy.ids[::-1])
                drop_copy(place, node)
        detach(state, node)


def _unhold(transfer: Transfer, top: Node) -> None:
    """A swap-in below a deleted run holds only what is above it from now on."""
    node = transfer.leaf
    while node is not None and node.parent is not None:
        if node is top:
            transfer.leaf = top.parent
            return
        node = node.parent


def ids_of(chain: list[Node], place: int) -> IntArray:
    """The blocks of consecutive runs in a place where all of them have a copy."""
    ids = array("i")
    for run in chain:
        copy = run.copies[place]
        assert copy is not None
        ids.extend(copy.ids)
    return ids
