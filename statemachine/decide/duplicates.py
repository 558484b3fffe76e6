"""Deciding what a duplicate costs: its own blocks, and none of the run's once nobody uses those.

A request that has computed what is cached already pins the run, and keeps its own copy in its block table. Where all
who hold a run have copies of their own, the run takes one of these, and its former blocks are free: at once where
nobody had used them, else when the last one who did ends.
"""

from __future__ import annotations

from array import array

from statemachine.events import BlocksCached, CopiesReplaced, Event
from statemachine.state.duplicates import keepers, users
from statemachine.state.nodes import Node, Request, from_end
from statemachine.state.state import State


def replaced_by(state: State, request: Request, deepest: Node, cached: BlocksCached) -> list[Event]:
    """The runs that take a request's copies when it has cached them; its path goes on down to ``deepest`` then."""
    unused: list[Node] = []
    node = deepest
    while node is not request.leaf and node.parent is not None:
        if node.valid() and not (node.pins and users(state, node)):
            unused.append(node)
        node = node.parent
    if not unused:
        return []
    cut = cached.cut if cached.upper and unused[0] is deepest else 0
    return [_replaced(request, unused, cut, cached.upper)]


def replaced_after(state: State, request: Request) -> list[Event]:
    """The runs that take copies of other requests when this one, the last to use theirs, is released."""
    others = len(state.duplicating) - (request.number in state.duplicating)
    if not others:
        return []
    most = 1 + others + len(state.transfers)
    taking: dict[int, list[Node]] = {}
    node = request.leaf
    while node.parent is not None and node.pins <= most:  # pins do not become fewer on the way up
        if node.pins > 1 and node.valid() and not request.keeps(node) and users(state, node) == 1:
            heirs = keepers(state, node)
            if heirs:
                taking.setdefault(heirs[0].number, []).append(node)
        node = node.parent
    return [_replaced(state.requests[number], taking[number]) for number in sorted(taking)]


def _replaced(request: Request, runs: list[Node], cut: int = 0, upper: int = 0) -> CopiesReplaced:
    """The event for runs, the deepest first; of that only the first ``cut`` blocks, run ``upper`` then, if not 0."""
    nodes, blocks, freed = array("Q"), array("i"), array("i")
    for node in runs:
        copy = node.device
        assert copy is not None
        size = cut if cut and node is runs[0] else node.size
        freed.extend(from_end(copy.ids[:size], size))
    for node in reversed(runs):
        last = cut and node is runs[0]
        nodes.append(upper if last else node.id)
        blocks.extend(request.table[node.start : node.start + cut if last else node.end])
    return CopiesReplaced(request.number, nodes, blocks, freed)
