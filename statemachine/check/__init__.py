"""``check(state)``: whether the invariants hold, looking at the whole state and at nothing else.

Every statement (:mod:`statemachine.check.statements`) is put to every run, request and transfer; what is said of the
whole is summed up anew from them.

Rules:

* Nothing of ``apply`` is imported: what must hold is said anew, from runs, requests, transfers and places.
* The incremental check puts the same statements to what an event has touched, and keeps the sums.

Words: ``docs/glossary.md``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from statemachine.check import statements
from statemachine.check.statements import INVARIANTS, Position
from statemachine.state.nodes import Node
from statemachine.state.ownership import owners
from statemachine.state.places import Place
from statemachine.state.state import State


def check(state: State) -> list[str]:
    """All violations, each beginning with the name of its invariant; empty when the state is sound."""
    broken = list(_violations(state))
    if broken:
        names = list(INVARIANTS)
        broken.sort(key=lambda message: names.index(message.partition(":")[0]))
    return broken


def _violations(state: State) -> Iterator[str]:
    positions = {place: _positions(place) for place in state.places}

    def position(place: Place, node: Node) -> Position | None:
        return positions[place].get(node)

    runs = state.nodes.values()
    holders = _holders(state)
    expected = statements.about_to_be_computed(state)
    for node in runs:
        yield from statements.of_run(state, node)
        yield from statements.of_pins(node, holders[node])
        yield from statements.of_computing(node, expected)
        yield from statements.of_orders(state, node, position)
    for root in state.all_roots():
        yield from statements.of_root(root)
        yield from statements.of_pins(root, holders[root])
    yield from _reachable(state)
    for place in state.places:
        yield from _conservation(state, place)
        evictable = sum(statements.evictable(place, node) for node in runs)
        resident = sum(statements.resident(place, node) for node in runs)
        yield from statements.of_place(place, evictable, resident)
        strangers = [node for node in positions[place] if state.nodes.get(node.id) is not node]
        if strangers:
            yield f"orders: {place} would evict {strangers}, which are not there"
    for side in state.sides:
        yield from _conservation(state, side)
    for request in state.requests.values():
        yield from statements.of_request(state, request)
    if len(state.numbers) != len(state.requests):
        yield "block tables: the names of the requests are not those of the live ones"
    for transfer in state.transfers.values():
        yield from statements.of_transfer(state, transfer)


def _conservation(state: State, place: Place) -> Iterator[str]:
    capacity = place.pool.capacity
    count: Counter[int] = Counter()
    for _, ids in owners(state, place):
        count.update(ids)
    for block in sorted(set(range(capacity)) ^ set(count)):
        yield f"conservation: {place} block {block} {'is lost' if block < capacity else 'is outside the pool'}"
    for block, times in sorted(count.items()):
        if times > 1:
            names = [name for name, ids in owners(state, place) if block in ids]
            yield f"conservation: {place} block {block} has {times} owners: {', '.join(names)}"


def _holders(state: State) -> Counter[Node]:
    """How many requests and swap-ins have a run or root on their path."""
    holders: Counter[Node] = Counter()
    leaves = [request.leaf for request in state.requests.values()]
    leaves += [transfer.leaf for transfer in state.transfers.values() if transfer.leaf is not None]
    for leaf in leaves:
        node: Node | None = leaf
        while node is not None:
            holders[node] += 1
            node = node.parent
    return holders


def _positions(place: Place) -> dict[Node, Position]:
    return {node: (number, at) for number, order in enumerate(place.orders) for at, node in enumerate(order)}


def _reachable(state: State) -> Iterator[str]:
    seen: set[int] = set()
    stack = list(state.all_roots())
    while stack:
        for child in stack.pop().children.values():
            if state.nodes.get(child.id) is not child or child.id in seen:
                yield f"links: {child!r} is not the one run of its id"
                continue
            seen.add(child.id)
            stack.append(child)
    for id in sorted(set(state.nodes) - seen):
        yield f"links: {state.nodes[id]!r} cannot be reached from a root"


__all__ = ["INVARIANTS", "check"]
