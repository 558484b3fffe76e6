"""What must hold of one run, one request, one transfer, one place.

Both checks ask these: the whole one (:func:`statemachine.check.check`) of all there is, the incremental one of what an
event has touched. Each message begins with the name of its invariant. Nothing here knows how ``apply`` changes a state,
so that one cannot hide the other's mistake.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from statemachine.events import SWAP_IN, WRITE_THROUGH
from statemachine.items import each
from statemachine.state.groups import Kind
from statemachine.state.nodes import ALL, Node, Request, Transfer
from statemachine.state.places import Place
from statemachine.state.state import State

INVARIANTS: dict[str, str] = {
    "conservation": "every block of a place has exactly one owner",
    "pin counts": "a run's pins are the requests and swap-ins whose path holds it",
    "residency": "above a copy there is one in the same place or in a nearer one",
    "links": "runs hang below their parents, and every run can be reached from a root",
    "items": "images and sounds begin where their content stands, the same in a request and in its path",
    "orders": "the eviction orders hold exactly what nobody uses, descendants first",
    "in flight": "what arrives has a transfer, and that moves just this",
    "distrusted": "what turned out bad cannot be found, nor can what is below it, and it goes first",
    "ahead": "what is cached before it is computed has a request that is about to compute it",
    "transfers end": "who waits and what is waited for know each other",
    "block tables": "a request's block table agrees with the runs of its path",
    "windows": "a request has of a layer group what its next token can see there, and no more",
}
"""Name → what it says. Every one is shown to fire in the tests."""

_SIGN = 0x80
"""Of the last byte of a word: it belongs to an item, not to a token."""
Position = tuple[int, int]
"""Where a run stands in its place: in which order, and where there."""


def of_run(state: State, node: Node) -> Iterator[str]:
    """What must hold of a run, its parent and its transfer."""
    parent = node.parent
    if parent is None:
        return
    yield from _linked(state, node, parent)
    if all(copy is None for copy in node.copies):
        yield f"residency: {node!r} has no copy"
    if parent.parent is not None:
        for place in state.places:
            if node.copies[place.number] is not None and not parent.as_near(place.number):
                yield f"residency: {node!r} is on {place}, {parent!r} above it is neither there nor nearer"
        if node.valid() and parent.arriving():
            yield f"residency: {node!r} is valid on the device, {parent!r} above it is still arriving"
    if parent.distrusted and not node.distrusted:
        yield f"distrusted: {node!r} is below {parent!r}, which turned out bad"
    transfer = node.transfer
    if transfer is None:
        if any(copy is not None and not copy.ready for copy in node.copies):
            yield f"in flight: {node!r} waits for a transfer that does not exist"
        if node.elsewhere(0) and node.device is not None and state.policy != WRITE_THROUGH:
            yield f"in flight: {node!r} has two copies with policy {state.policy.name}"
    elif state.transfers.get(transfer.id) is not transfer or not any(part.node is node for part in transfer.parts):
        yield f"in flight: {node!r} does not belong to transfer {transfer.id}"
    if node.uncomputed and not node.valid():
        yield f"ahead: {node!r} is about to be computed, but has no place on the device"


def _linked(state: State, node: Node, parent: Node) -> Iterator[str]:
    content = node.words[: state.block_bytes] + node.items.get(node.start, b"")
    linked = parent.children.get(content) is node
    if node.distrusted:
        if linked:
            yield f"distrusted: {node!r} can still be found below {parent!r}"
        linked = linked or parent.children.get(node.key(state.block_bytes)) is node
    if state.nodes.get(node.id) is not node or not linked:
        yield f"links: {node!r} is not linked to its parent {parent!r}"
    if node.start != parent.end or (parent.parent is not None and state.nodes.get(parent.id) is not parent):
        yield f"links: {node!r} does not begin where {parent!r} ends"
    lengths = {len(copy.ids) for copy in node.copies if copy is not None}
    if node.size < 1 or len(node.words) != node.size * state.block_bytes or lengths - {node.size}:
        yield f"links: {node!r} has words and block ids of different lengths"
    size = state.opened.block_size
    for block, records in node.items.items():
        for offset, _, _ in each(records):
            if offset // size != block or not node.start <= block < node.end:
                yield f"items: {node!r} has an item that begins at position {offset}, outside of it or of block {block}"
            elif node.words[4 * (offset - node.start * size) + 3] < _SIGN:
                yield f"items: an item begins at position {offset} of {node!r}, where a token stands"


def of_root(root: Node) -> Iterator[str]:
    """What must hold of a root that the state knows."""
    if not root.children and not root.pins:
        yield f"links: the root of namespace {root.words!r} leads nowhere"


def of_pins(node: Node, holders: int) -> Iterator[str]:
    """A run or root is pinned once by each of its holders."""
    if node.pins != holders:
        yield f"pin counts: {node!r} is on the path of {holders} requests and swap-ins"


def of_computing(node: Node, expected: set[Node]) -> Iterator[str]:
    """A run that is cached ahead is one of those that are about to be computed."""
    if node.uncomputed and node not in expected:
        yield f"ahead: {node!r} is not computed yet, and no live request is about to"


def about_to_be_computed(state: State) -> set[Node]:
    """The runs that a live request may have cached ahead."""
    requests = [request for request in state.requests.values() if request.computed != ALL]
    return {run for request in requests for run in state.path(request.leaf)}


def of_orders(state: State, node: Node, position: Callable[[Place, Node], Position | None]) -> Iterator[str]:
    """A run stands in one order of a place exactly if it has a copy there and nobody holds it; before its ancestors."""
    for place in state.places:
        count = sum(node in order for order in place.orders)
        if count != (node.copies[place.number] is not None and not node.pins):
            yield f"orders: {node!r} ({node.pins} pins) is in {count} orders of {place}"
        mine = position(place, node)
        if node.distrusted and mine is not None and mine[0]:
            yield f"distrusted: {node!r} is not among those that go first on {place}"
        above = node.parent
        while mine is not None and above is not None and above.parent is not None:
            its = position(place, above)
            if its is not None and its < mine:
                yield f"orders: {above!r} stands before its descendant {node!r} on {place}"
            above = above.parent


def evictable(place: Place, node: Node) -> int:
    """Blocks of a run that a place can give up, as far as its holders are concerned."""
    return node.size if node.copies[place.number] is not None and not node.pins else 0


def resident(place: Place, node: Node) -> int:
    """Blocks of a run that count as living in a place: not those that a swap-in is taking away."""
    if node.copies[place.number] is None:
        return 0
    transfer = node.transfer
    leaving = transfer is not None and transfer.direction == SWAP_IN and transfer.source == place.number
    return 0 if leaving else node.size


def of_place(place: Place, evictable: int, resident: int) -> Iterator[str]:
    """A place's counts are the sums over its runs."""
    if place.evictable != evictable:
        yield f"orders: {place.evictable} blocks are counted as evictable on {place}, {evictable} are"
    if place.resident != resident:
        yield f"in flight: {place.resident} blocks are counted as resident on {place}, {resident} are"


def of_transfer(state: State, transfer: Transfer) -> Iterator[str]:
    """What must hold of a transfer, the runs that it moves and the requests that wait for it."""
    id = transfer.id
    if transfer.quarantined:
        if transfer.waiters or transfer.parts:
            yield f"transfers end: somebody waits for transfer {id}, which is given up"
        return
    for waiter in transfer.waiters:
        request = state.requests.get(waiter)
        if request is None or id not in request.waits_for:
            yield f"transfers end: transfer {id} has the waiter {waiter}, which does not wait"
    inward = transfer.direction == SWAP_IN
    position = 0
    for part in transfer.parts:
        node, start = part.node, position
        position += part.size
        if node is None:
            continue
        arriving, source = node.copies[transfer.target], node.copies[transfer.source]
        if node.transfer is not transfer or node.size != part.size:
            yield f"in flight: {node!r} does not belong to transfer {id}"
        if not part.discard and (
            arriving is None or arriving.ready or arriving.ids != transfer.targets[start:position]
        ):
            yield f"in flight: transfer {id} does not write the arriving copy of {node!r}"
        if inward and (source is None or source.ids != transfer.sources[start:position]):
            yield f"in flight: transfer {id} does not read the host copy of {node!r}"
        if inward and not node.pins and not part.discard:
            yield f"in flight: {node!r} is being swapped in and could be evicted"
    if position != len(transfer.targets) or position != len(transfer.sources):
        yield f"in flight: the parts of transfer {id} are not its blocks"


def of_request(state: State, request: Request) -> Iterator[str]:
    """What must hold of a request, its name, its path and what it waits for."""
    name = request.request_id
    if state.numbers.get(name) != request.number:
        yield "block tables: the names of the requests are not those of the live ones"
    for transfer in request.waits_for:
        waited = state.transfers.get(transfer)
        if waited is None or request.number not in waited.waiters:
            yield f"transfers end: request {name!r} waits for transfer {transfer}, which does not know"
    end = request.leaf.end
    # Between its match and the order of its swap-in, the newest request has no blocks yet for the host part.
    reach = len(request.table) if request.number == state.next_request - 1 else end
    if len(request.table) < end and reach == end:
        yield f"block tables: the block table of {name!r} is shorter than its path"
        return
    path = state.path(request.leaf)
    if request.matched > end or not any(request.matched in (node.start, node.end) for node in [request.leaf, *path]):
        yield f"block tables: {request.matched} blocks are said to have matched {name!r}, no run ends there"
    if request.items or any(node.items for node in path):
        theirs = {block: records for node in path for block, records in node.items.items()}
        if theirs != {block: records for block, records in request.items.items() if block < end}:
            yield f"items: the path of {name!r} has other items than its prompt"
    if any(stop > end for _, stop in request.duplicate_ranges):
        yield f"block tables: {name!r} has duplicates outside its path"
    yield from _sides(state, request)
    for node in path:
        yield from _in_table(request, node, reach)
        if node.start < reach and not node.valid() and not any(at <= node.start for at in request.waits_for.values()):
            yield f"block tables: {name!r} uses {node!r}, whose copy is not valid, without waiting"


def _sides(state: State, request: Request) -> Iterator[str]:
    """Nothing stands where a window has passed, or was never computed; everywhere else there is a block."""
    if len(request.sides) != len(state.groups):
        yield f"windows: {request.request_id!r} knows {len(request.sides)} layer groups beside group 0, not all"
        return
    size = state.opened.block_size
    for group, side in zip(state.groups, request.sides):
        of = f"of layer group {group.name!r} in {request.request_id!r}"
        if not group.windowed:
            if side.begin or side.settled or any(block < 0 for block in side.table):
                yield f"windows: a block table {of} has holes, and the group has no window"
            if group.kind != Kind.STATIC and len(side.table) not in (0, group.size):
                yield f"windows: {len(side.table)} blocks {of}, not {group.size}"
            continue
        if len(side.table) > len(request.table) and len(side.table) > side.begin:
            yield f"windows: {len(side.table)} positions {of}, group 0 has {len(request.table)}"
        sinks, seen = -(-group.sinks // size), side.settled
        first = seen - seen % group.size if group.kind == Kind.CHUNK else seen - group.size + 1
        for position, block in enumerate(side.table):
            visible = position >= side.begin and (position < sinks or (position + 1) * size > first)
            if visible != (block >= 0):
                what = "is missing" if visible else f"is block {block}, which nobody sees"
                yield f"windows: position {position} {of} {what} ({seen} tokens are settled)"


def _in_table(request: Request, node: Node, reach: int) -> Iterator[str]:
    """A block table holds the blocks of a run of its path, up to where the table reaches, or copies of its own."""
    mine = request.table[node.start : min(node.end, reach)]
    ids = node.device.ids if node.device is not None else array("i", [-1]) * node.size
    if mine != ids[: len(mine)]:
        for position, (block, wanted) in enumerate(zip(mine, ids), node.start):
            if block != wanted and not any(start <= position < stop for start, stop in request.duplicate_ranges):
                yield (
                    f"block tables: position {position} of {request.request_id!r} is block {block}, "
                    f"{node!r} has block {wanted} there"
                )
    if node.end > reach and node.device is not None:
        yield f"block tables: {request.request_id!r} has no place for the blocks of {node!r}"
