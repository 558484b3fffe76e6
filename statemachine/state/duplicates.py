"""Duplicates: which copies of runs are held only by requests that have computed copies of their own.

A request's block table never changes under it, so one that has computed what is cached already keeps its own copy. The
run's copy serves whoever matched it; once nobody does, the run can take the request's copy in the place of its own.
"""

from __future__ import annotations

from statemachine.state.nodes import Node, Request
from statemachine.state.state import State


def holds(leaf: Node, node: Node) -> bool:
    """Whether the path to ``leaf`` goes through ``node``."""
    while leaf.start > node.start and leaf.parent is not None:
        leaf = leaf.parent
    return leaf is node


def keepers(state: State, node: Node) -> list[Request]:
    """The requests that hold a run and have a copy of their own of it, in the order of their numbers."""
    requests = [state.duplicating[id] for id in sorted(state.duplicating)]
    return [request for request in requests if request.keeps(node) and holds(request.leaf, node)]


def users(state: State, node: Node) -> int:
    """How many requests have the blocks of a run in their tables: all that hold it, but for its :func:`keepers`."""
    swap_ins = sum(holds(each.leaf, node) for each in state.transfers.values() if each.leaf is not None)
    return node.pins - swap_ins - len(keepers(state, node))
