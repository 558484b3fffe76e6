"""The run-compressed prefix tree: finding a path, pinning it, cutting and joining runs.

Two facts make eviction simple. The whole path from the root is pinned, and on release it is appended to the eviction
order deepest run first: so every descendant stands before its ancestors, and taking from the front *is* leaf-first
eviction. And presence is prefix-closed, so one comparison of a run's content decides the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable

from statemachine.events import IntArray
from statemachine.state.nodes import NO_CHILDREN, Node, Part
from statemachine.state.state import State


class Path:
    """What a walk along a prompt's words found."""

    __slots__ = ("blocked", "cut", "device", "host", "leaf")

    def __init__(self, leaf: Node | None, cut: int, device: int, host: int, blocked: bool) -> None:
        self.leaf = leaf
        """Deepest run reached; ``None`` when the namespace has no tree yet."""
        self.cut = cut
        """Blocks of ``leaf`` that belong to the path, when not all of them do; else 0."""
        self.device = device
        """Blocks with a place on the device, counted from the root."""
        self.host = host
        """Blocks after those that are on the host only."""
        self.blocked = blocked
        """The walk ended before a block whose only copy cannot be read yet (:meth:`Node.matchable`)."""


def common_blocks(run: bytes, words: memoryview, offset: int, block_bytes: int) -> int:
    """How many leading blocks of ``run`` equal ``words`` from ``offset``, at least one: a binary search.

    No step compares again what is known to be equal.
    """
    low, high = 1, min(len(run), len(words) - offset) // block_bytes
    step = high - low
    while low < high:
        start, stop = low * block_bytes, (low + step) * block_bytes
        if run.startswith(words[offset + start : offset + stop], start):
            low += step
        else:
            high = low + step - 1
        step = (high - low + 1) // 2
    return low


def find(state: State, start: Node | None, words: memoryview, limit: int) -> Path:
    """Follow ``words`` from ``start`` for at most ``limit`` blocks.

    One dictionary lookup and one comparison per run; the tree holds content, so there is nothing to collide.
    """
    block_bytes = state.block_bytes
    stop = min(limit * block_bytes, len(words) // block_bytes * block_bytes)
    words = words[:stop]
    node = start
    offset = device = cut = 0
    on_device = True
    blocked = False
    while node is not None and offset < stop and not cut:
        child = node.children.get(words[offset : offset + block_bytes].tobytes())
        if child is None:
            break
        if child.device is None:
            if not child.matchable():
                blocked = True
                break
            if on_device:
                device = offset // block_bytes
                on_device = False
        node = child
        common = common_blocks(child.words, words, offset, block_bytes)
        cut = common if common < child.size else 0
        offset += common * block_bytes
    found = offset // block_bytes
    if on_device:
        return Path(node, cut, found, 0, blocked)
    return Path(node, cut, device, found - device, blocked)


def content_of(nodes: list[Node]) -> bytes:
    """The words of consecutive runs."""
    return nodes[0].words if len(nodes) == 1 else b"".join([node.words for node in nodes])


def part(words: bytes, start: int, stop: int) -> bytes:
    """A slice of content words. Compiled code (mypyc) would copy even all of them; Python does not."""
    return words if not start and stop == len(words) else words[start:stop]


def pin(state: State, leaf: Node) -> None:
    """Count one more holder of the path that ends at ``leaf``."""
    node = leaf
    while node.parent is not None:
        if not node.pins:
            leave_orders(state, node)
        node.pins += 1
        node = node.parent
    node.pins += 1


def count_use(state: State, nodes: Iterable[Node]) -> None:
    """Count one more use of runs, as far as somebody wants to know."""
    enough = state.opened.backup_after
    for node in nodes:
        if node.hits < enough:
            node.hits += 1


def leave_orders(state: State, node: Node) -> None:
    """Somebody holds ``node`` now: it cannot be evicted."""
    if node.device is not None:
        (state.final if node in state.final else state.device_order).remove(node)
        state.evictable -= node.size
    if node.host is not None:
        state.host_order.remove(node)


def leave_device(state: State, node: Node) -> None:
    """An unpinned run loses its device copy."""
    (state.final if node in state.final else state.device_order).remove(node)
    state.evictable -= node.size
    node.device = None
    node.device_ready = False


def unpin(state: State, leaf: Node, above: Node | None = None, final: int = 0) -> None:
    """Count one holder less, from ``leaf`` up to (not including) ``above``, else up to the root.

    Runs that nobody holds any more enter the eviction orders, deepest first; the first ``final`` of them, and those of
    a retired tree, the one that is evicted first.
    """
    if state.retired and root_of(leaf) in state.retired:
        final = leaf.end
    node = leaf
    while node is not above and node.parent is not None:
        node.pins -= 1
        if not node.pins:
            if node.device is not None:
                (state.final if final > 0 else state.device_order).append(node)
                state.evictable += node.size
            if node.host is not None:
                state.host_order.append(node)
            final -= 1
        node = node.parent
    if node is not above:
        node.pins -= 1
        forget_root(state, node)


def loosened(leaf: Node) -> list[Node]:
    """The runs that nobody holds any more once the only holder of ``leaf`` lets go, deepest first."""
    loose = []
    node = leaf
    while node.pins == 1 and node.parent is not None:
        loose.append(node)
        node = node.parent
    return loose


def root_of(node: Node) -> Node:
    """The root above ``node``."""
    while node.parent is not None:
        node = node.parent
    return node


def forget_root(state: State, root: Node) -> None:
    """Drop a root that leads nowhere and that nobody holds, so that namespaces do not pile up."""
    if root.pins or root.children:
        return
    if root in state.retired:
        state.retired.remove(root)
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
    parent.children[node.words[: state.block_bytes]] = node
    state.nodes[node.id] = node


def detach(state: State, node: Node) -> None:
    """Delete a run that has no copy left and no children."""
    parent = node.parent
    assert parent is not None
    del parent.children[node.words[: state.block_bytes]]
    if not parent.children:
        parent.children = NO_CHILDREN
        if parent.parent is None:
            forget_root(state, parent)
    del state.nodes[node.id]


def split(state: State, node: Node, cut: int, upper_id: int) -> Node:
    """Cut a run after ``cut`` blocks; returns the new upper part. Pins, copies, orders and transfers follow."""
    length = cut * state.block_bytes
    parent = node.parent
    assert parent is not None
    upper = Node(upper_id, parent, node.start, node.words[:length], cut)
    upper.pins, upper.hits, upper.ahead = node.pins, node.hits, node.ahead
    if node.device is not None:
        upper.device, node.device = node.device[:cut], node.device[cut:]
        upper.device_ready = node.device_ready
    if node.host is not None:
        upper.host, node.host = node.host[:cut], node.host[cut:]
        upper.host_ready = node.host_ready
    parent.children[upper.words[: state.block_bytes]] = upper
    node.words = node.words[length:]
    node.start += cut
    node.size -= cut
    node.parent = upper
    upper.children = {node.words[: state.block_bytes]: node}
    state.nodes[upper_id] = upper
    state.next_node = upper_id + 1
    if not node.pins:
        if node.device is not None:
            (state.final if node in state.final else state.device_order).insert_after(node, upper)
        if node.host is not None:
            state.host_order.insert_after(node, upper)
    if node.transfer is not None:
        upper.transfer = node.transfer
        parts = node.transfer.parts
        index = next(i for i, part in enumerate(parts) if part.node is node)
        parts[index].size = node.size
        parts.insert(index, Part(upper, cut, parts[index].discard))
    return upper


def joinable(node: Node, parent: Node) -> bool:
    """Whether a run may absorb its parent: only child, same tiers and uses, nothing in flight."""
    return (
        parent.parent is not None
        and len(parent.children) == 1
        and node.transfer is None
        and parent.transfer is None
        and (node.device is None) == (parent.device is None)
        and (node.host is None) == (parent.host is None)
        and node.hits == parent.hits
    )


def absorb(state: State, node: Node, ancestors: list[Node]) -> None:
    """Let ``node`` take over its nearest ``ancestors`` (nearest first). It keeps its id and its place in the orders."""
    chain = ancestors[::-1]
    top = chain[0]
    above = top.parent
    assert above is not None
    chain.append(node)
    node.words = content_of(chain)
    for ancestor in ancestors:
        if ancestor.device is not None:
            (state.final if ancestor in state.final else state.device_order).remove(ancestor)
        if ancestor.host is not None:
            state.host_order.remove(ancestor)
        del state.nodes[ancestor.id]
    if node.device is not None:
        node.device = joined([run.device for run in chain])
    if node.host is not None:
        node.host = joined([run.host for run in chain])
    node.start = top.start
    node.size = sum(run.size for run in chain)
    node.parent = above
    above.children[node.words[: state.block_bytes]] = node


def joined(arrays: list[IntArray | None]) -> IntArray:
    """One array from several."""
    first, *rest = arrays
    assert first is not None
    result = first[:]
    for ids in rest:
        assert ids is not None
        result.extend(ids)
    return result


def arriving(node: Node) -> bool:
    """Whether the device copy of a run is still being swapped in."""
    return node.device is not None and not node.device_ready
