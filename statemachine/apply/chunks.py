"""Applying what happens between the chunks of a prefill: a path that goes on, and what is computed by now."""

from __future__ import annotations

from array import array

from statemachine.apply.expect import expect_blocks, expect_cut, node_of, request_of, violated
from statemachine.events import DEVICE, BlocksComputed, IntArray, RequestExtended
from statemachine.state import tree
from statemachine.state.nodes import Node, Request
from statemachine.state.state import State


def own_copies(request: Request, end: int) -> IntArray:
    """The request's own blocks among the first ``end`` positions of its block table, in token order."""
    own = array("i")
    for start, stop in request.duplicates:
        own.extend(request.table[start:stop])
    own.extend(request.table[request.leaf.end : end])
    return own


def request_extended(state: State, event: RequestExtended) -> None:
    """A request uses what others have cached behind its path; its own copies are free."""
    request = request_of(state, event, event.request)
    path = request.leaf
    leaf = node_of(state, event, event.leaf) if event.leaf else path
    expect_cut(state, event, leaf, event.cut, event.upper)
    if request.waits:
        violated(event, f"request {request.key!r} still waits for {[*request.waits]}")
    chain: list[Node] = []
    node = leaf
    while node is not path:
        chain.append(node)
        if not node.device_ready or node.parent is None:
            violated(event, f"run {node.id} is not valid on the device below the path of request {request.key!r}")
        node = node.parent
    chain.reverse()
    end = leaf.start + event.cut if event.upper else leaf.end
    length = (end - path.end) * state.block_bytes
    if event.device_blocks != end - path.end:
        violated(event, f"run {leaf.id} is {end - path.end} blocks below the path, not {event.device_blocks}")
    if chain and not request.words.startswith(tree.part(tree.content_of(chain), 0, length)):
        violated(event, "the words of the request and of the runs differ")
    expected = own_copies(request, end)[::-1]
    expect_blocks(state, event, DEVICE, event.blocks, expected, f"a copy of request {request.key!r}")

    if event.upper:
        leaf = chain[-1] = tree.split(state, leaf, event.cut, event.upper)
    for run in chain:
        if not run.pins:
            tree.leave_orders(state, run)
        run.pins += 1
    if state.opened.backup_after > 1:
        tree.count_use(state, chain)
    table = tree.joined([array("i"), *[run.device for run in state.path(leaf)]])
    table.extend(request.table[end:])
    request.table = table
    request.joined += request.duplicates
    if chain:
        request.joined.append((path.end, end))
    request.duplicates = []
    request.leaf = leaf
    request.words = request.words[length:]
    state.device.free.extend(event.blocks)
    state.counters.device_hit_blocks += event.device_blocks


def blocks_computed(state: State, event: BlocksComputed) -> None:
    """What is covered now may be copied out."""
    request = request_of(state, event, event.request)
    request.computed = event.blocks
    for node in state.path(request.leaf):
        if node.end <= event.blocks:
            node.ahead = False
