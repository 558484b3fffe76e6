"""All invariants after every event, at the price of what the event touched.

:func:`statemachine.check.check` looks at the whole state; of a cache of 65,536 blocks that takes tens of milliseconds.
This class remembers what it has seen of every run, request and transfer, and after an event looks again at those the
event can have touched. Statements about the whole become statements about neighbours: a run's pins are those of its
children and of whoever ends there; a descendant stands before its ancestors if it does so when it enters an order; the
free list is what was granted from its top and given back to it. Events that sweep over everything, or fail, are
followed by a full check.

What an event must not touch, it does not look at: run the full check now and then (``kvledger check`` does).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import assert_never

from statemachine.check import check
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksComputed,
    BlocksEvicted,
    BlocksReassigned,
    BlocksTrimmed,
    CacheCleared,
    DigestTaken,
    Direction,
    EpochStarted,
    Event,
    HostPolicy,
    IntArray,
    LedgerOpened,
    Outcome,
    PoolResized,
    QuarantineEnded,
    RequestExtended,
    RequestMatched,
    RequestReleased,
    Tier,
    TierLost,
    TransferFinished,
    TransferStarted,
    WorkerJoined,
    WorkerLost,
)
from statemachine.state.nodes import ALL, Node, Request, Transfer
from statemachine.state.order import Order
from statemachine.state.ownership import transfer_blocks
from statemachine.state.state import State

_SWEEPING = (CacheCleared, PoolResized, TierLost)
_GAP = 1 << 64
"""Between the marks of neighbours in an order: room for every cut that can come between."""


class _Run:
    """What was seen of a run."""

    __slots__ = ("device", "device_place", "evictable", "host", "host_place", "parent", "pins", "ready", "resident")

    def __init__(self) -> None:
        self.parent: Node | None = None
        self.pins = 0
        self.device: IntArray | None = None
        self.ready = False
        self.host: IntArray | None = None
        self.evictable = 0
        self.resident = 0
        self.device_place: tuple[int, int] | None = None
        """Which of the two device orders, and its mark there."""
        self.host_place: tuple[int, int] | None = None


class _Below:
    """What the children of a run come to."""

    __slots__ = ("device", "host", "pins", "ready")

    def __init__(self) -> None:
        self.pins = self.device = self.host = self.ready = 0


class _Owned:
    """Blocks of a tier that somebody has, and a copy of the free list."""

    def __init__(self, capacity: int, free: IntArray) -> None:
        self.capacity = capacity
        self.blocks: set[int] = set()
        self.free = free[:]


class IncrementalCheck:
    """Checks a state event by event.

    Args:
        state: a sound one; what is wrong in it already is found by :meth:`full` only.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.full_checks = 0
        """How often everything was checked."""
        self._begin()

    def _begin(self) -> None:
        state = self._state
        self._runs: dict[Node, _Run] = {}
        self._by_id: dict[int, Node] = {}
        self._below: dict[Node, _Below] = {}
        self._ends: dict[Node, int] = {}
        self._requests: dict[int, tuple[Node, IntArray, tuple[int, ...], str]] = {}
        self._transfers: dict[int, tuple[Node | None, tuple[IntArray, IntArray], tuple[int, ...], Transfer]] = {}
        self._evictable = self._resident = self._mark = 0
        self._shared_changed = False
        self._expecting: set[Node] | None = None
        """The runs that a live request may have cached ahead, once an event has made that a question."""
        self._owned = {tier: _Owned(state.pool(tier).capacity, state.pool(tier).free) for tier in Tier}
        self._left: dict[Tier, list[int]] = {tier: [] for tier in Tier}
        self._entered: dict[Tier, list[int]] = {tier: [] for tier in Tier}
        self._update(list(state.nodes.values()), [], set(state.requests), set(state.transfers))
        for tier in Tier:
            self._owned[tier].blocks.update(self._entered[tier])
            self._entered[tier], self._left[tier] = [], []

    def full(self) -> list[str]:
        """Check everything, and begin anew from what is there."""
        self.full_checks += 1
        broken = check(self._state)
        if not broken:
            self._begin()
        return broken

    def after(self, event: Event) -> list[str]:
        """What is broken after the event, just applied, in the words of the full check; empty if nothing is."""
        if isinstance(event, _SWEEPING) or (isinstance(event, TransferFinished) and event.outcome != Outcome.DONE):
            return self.full()
        try:
            told = self._look_again(event)
        except (LookupError, AssertionError, TypeError) as error:  # something is not where it was seen
            told = [f"links: {type(error).__name__} {error}"]
        return (self.full() or told) if told else told

    def _look_again(self, event: Event) -> list[str]:
        nodes, gone, requests, transfers = self._touched(event)
        if not (nodes or gone or requests or transfers):
            return []
        above = [self._runs[node].parent for node in gone]
        nodes += [node for node in above if node is not None and node not in nodes and node not in gone]
        live = [node for node in nodes if node.parent is not None]
        self._shared_changed = False
        self._update(live, gone, requests, transfers)
        if self._shared_changed:
            requests, transfers = set(self._requests), set(self._transfers)
        told = [*self._conservation(), *self._totals()]
        self._expecting = None
        seen = set(nodes)
        for node in live:
            assert node.parent is not None
            if node.parent not in seen:
                seen.add(node.parent)
                nodes.append(node.parent)
        for node in nodes:
            told += self._node(node)
        for id in requests:
            told += self._request(id)
        for id in transfers:
            told += self._transfer(id)
        return told

    # What an event can have touched

    def _touched(self, event: Event) -> tuple[list[Node], list[Node], set[int], set[int]]:
        state = self._state
        nodes: dict[Node, None] = {}
        gone: list[Node] = []
        requests: set[int] = set()
        transfers: set[int] = set()
        match event:
            case RequestMatched():
                requests.add(event.request)
                self._path(nodes, state.requests[event.request].leaf)
                transfers.update(state.requests[event.request].waits)
                if event.upper:
                    self._named(nodes, gone, event.leaf)
                    transfers.update(self._in_transfer(event.leaf))
            case BlocksAllocated():
                requests.update(event.requests)
                transfers.update(event.after)
            case RequestExtended():
                requests.add(event.request)
                self._path(nodes, state.requests[event.request].leaf)
                if event.upper:
                    self._named(nodes, gone, event.leaf)
                    transfers.update(self._in_transfer(event.leaf))
            case BlocksComputed():
                requests.add(event.request)
                self._path(nodes, state.requests[event.request].leaf)
            case BlocksCached():
                requests.add(event.request)
                self._path(nodes, state.requests[event.request].leaf)
                if event.upper:
                    self._named(nodes, gone, event.leaf)
                    transfers.update(self._in_transfer(event.leaf))
                if event.taken:  # rare: whoever shares the runs that were taken over
                    requests.update(state.requests)
                    transfers.update(self._transfers)
            case BlocksReassigned():
                requests.update((event.request, event.target))
            case BlocksTrimmed():
                requests.add(event.request)
                transfers.update(self._requests[event.request][2])
            case RequestReleased():
                requests.add(event.request)
                leaf, _, waits, _ = self._requests[event.request]
                self._path(nodes, leaf)
                transfers.update(waits)
                for id, absorbed in zip(event.merged, event.absorbed):
                    node = self._by_id[id]
                    for _ in range(absorbed):
                        above = self._runs[node].parent
                        assert above is not None
                        gone.append(above)
                        node = above
            case BlocksEvicted():
                for id in (*event.nodes, event.upper) if event.upper else event.nodes:
                    transfers.update(self._in_transfer(id))
                    self._named(nodes, gone, id)
            case TransferStarted():
                transfers.update((event.transfer, *event.after))
                for id in (*event.nodes, event.upper) if event.upper else event.nodes:
                    self._named(nodes, gone, id)
                if event.request:
                    requests.add(event.request)
                    self._path(nodes, state.requests[event.request].leaf)
            case TransferFinished():
                leaf_or_none, _, waiters, transfer = self._transfers[event.transfer]
                transfers.add(event.transfer)
                requests.update(waiters)
                if leaf_or_none is not None:
                    self._path(nodes, leaf_or_none)
                nodes.update(dict.fromkeys(part.node for part in transfer.parts if part.node is not None))
            case QuarantineEnded():
                transfers.add(event.transfer)
            case AllocationRefused() | WorkerJoined() | WorkerLost() | EpochStarted() | DigestTaken():
                pass
            case LedgerOpened() | CacheCleared() | PoolResized() | TierLost():
                raise LookupError(f"{type(event).__name__} touches everything")
            case _:
                assert_never(event)
        for node in gone:
            nodes.pop(node, None)
        return list(nodes), gone, requests, transfers

    @staticmethod
    def _path(nodes: dict[Node, None], leaf: Node) -> None:
        node: Node | None = leaf
        while node is not None:
            nodes[node] = None
            node = node.parent

    def _named(self, nodes: dict[Node, None], gone: list[Node], id: int) -> None:
        node = self._state.nodes.get(id)
        if node is not None:
            nodes[node] = None
        elif id in self._by_id:
            gone.append(self._by_id[id])

    def _in_transfer(self, id: int) -> Iterator[int]:
        """The transfer that a run is in."""
        node = self._state.nodes.get(id) or self._by_id.get(id)
        if node is not None and node.transfer is not None:
            yield node.transfer.id

    # Looking again

    def _update(self, nodes: list[Node], gone: list[Node], requests: set[int], transfers: set[int]) -> None:
        state = self._state
        for node in gone:
            run = self._runs.pop(node)
            self._by_id.pop(node.id, None)
            self._children(run, -1)
            self._below.pop(node, None)
            self._evictable -= run.evictable
            self._resident -= run.resident
            self._swap(Tier.DEVICE, run.device, None)
            self._swap(Tier.HOST, run.host, None)
        entering: list[list[Node]] = [[], [], []]
        for node in nodes:
            self._look(node, entering)
        for order, number in ((state.final, 0), (state.device_order, 1), (state.host_order, 2)):
            if entering[number]:
                self._place(order, number, entering[number])
        for id in requests:
            old = self._requests.pop(id, None)
            request = state.requests.get(id)
            self._end(old[0] if old is not None else None, request.leaf if request is not None else None)
            private = request.private() if request is not None else array("i")
            self._swap(Tier.DEVICE, old[1] if old is not None else None, private)
            if request is not None:
                self._requests[id] = request.leaf, private, tuple(request.waits), request.key
        for id in transfers:
            seen = self._transfers.pop(id, None)
            transfer = state.transfers.get(id)
            self._end(seen[0] if seen is not None else None, transfer.leaf if transfer is not None else None)
            blocks = array("i"), array("i")
            if transfer is not None:
                blocks = transfer_blocks(transfer, Tier.DEVICE), transfer_blocks(transfer, Tier.HOST)
            for tier in Tier:
                self._swap(tier, seen[1][tier] if seen is not None else None, blocks[tier])
            if transfer is not None:
                self._transfers[id] = transfer.leaf, blocks, tuple(transfer.waiters), transfer

    def _look(self, node: Node, entering: list[list[Node]]) -> None:
        state = self._state
        run = self._runs.get(node)
        if run is None:
            run = self._runs[node] = _Run()
            self._by_id[node.id] = node
        else:
            self._children(run, -1)
            same_size = run.device is not None and node.device is not None and len(run.device) == len(node.device)
            if (run.ready and not node.device_ready) or (same_size and run.device != node.device):
                self._shared_changed = True  # whoever uses the run has to be looked at
        self._swap(Tier.DEVICE, run.device, node.device)
        self._swap(Tier.HOST, run.host, node.host)
        run.parent, run.pins, run.ready = node.parent, node.pins, node.device_ready
        run.device, run.host = node.device, node.host
        self._children(run, 1)
        evictable = node.size if node.device is not None and not node.pins else 0
        inward = node.transfer is not None and node.transfer.direction == Direction.SWAP_IN
        resident = node.size if node.host is not None and not inward else 0
        self._evictable += evictable - run.evictable
        self._resident += resident - run.resident
        run.evictable, run.resident = evictable, resident
        place = 0 if node in state.final else 1 if node in state.device_order else None
        if place is None:
            run.device_place = None
        elif run.device_place is None or run.device_place[0] != place:
            entering[place].append(node)
        if node not in state.host_order:
            run.host_place = None
        elif run.host_place is None:
            entering[2].append(node)

    def _children(self, run: _Run, sign: int) -> None:
        """Add a run to what its parent's children come to, or take it away."""
        assert run.parent is not None
        below = self._below.get(run.parent)
        if below is None:
            below = self._below[run.parent] = _Below()
        below.pins += sign * run.pins
        below.device += sign * (run.device is not None)
        below.host += sign * (run.host is not None)
        below.ready += sign * run.ready

    def _place(self, order: Order, number: int, nodes: list[Node]) -> None:
        """Give the runs that entered an order their marks: at the back increasing ones, a cut-off part one between."""
        entering = set(nodes)
        tail: list[Node] = []
        node = order._prev[None]
        while node is not None and node in entering:
            tail.append(node)
            entering.discard(node)
            node = order._prev[node]
        for node in reversed(tail):
            self._mark += _GAP
            self._set_place(node, number, self._mark)
        for node in sorted(entering, key=lambda node: node.id) if entering else ():
            marks = []
            for neighbour in (order._prev[node], order._next[node]):
                run = self._runs.get(neighbour) if neighbour is not None else None
                place = None if run is None else run.host_place if number == 2 else run.device_place
                marks.append(None if place is None else place[1])
            before, behind = marks
            self._set_place(node, number, ((before or 0) + (behind if behind is not None else self._mark + _GAP)) // 2)

    def _set_place(self, node: Node, number: int, mark: int) -> None:
        if number == 2:
            self._runs[node].host_place = 2, mark
        else:
            self._runs[node].device_place = number, mark

    def _end(self, old: Node | None, new: Node | None) -> None:
        """A path that ended in one run ends in another."""
        if old is not None:
            self._ends[old] -= 1
            if not self._ends[old]:
                del self._ends[old]
        if new is not None:
            self._ends[new] = self._ends.get(new, 0) + 1

    def _swap(self, tier: Tier, old: IntArray | None, new: IntArray | None) -> None:
        """Somebody has other blocks than before."""
        if old is not new and old != new:
            if old:
                self._left[tier].extend(old)
            if new:
                self._entered[tier].extend(new)

    # What must hold

    def _conservation(self) -> Iterator[str]:
        for tier in Tier:
            left, entered = self._left[tier], self._entered[tier]
            if not left and not entered and len(self._owned[tier].free) == len(self._state.pool(tier).free):
                continue
            self._left[tier], self._entered[tier] = [], []
            yield from self._moved(tier, left, entered)

    def _moved(self, tier: Tier, left_list: list[int], entered_list: list[int]) -> Iterator[str]:
        seen, free = self._owned[tier], self._state.pool(tier).free
        left, entered = set(left_list), set(entered_list)
        blocks = seen.blocks
        blocks.difference_update(left)
        if len(entered) != len(entered_list) or not blocks.isdisjoint(entered):
            yield f"conservation: a {tier.name} block has two owners"
        if entered and not 0 <= min(entered) <= max(entered) < seen.capacity:
            yield f"conservation: a {tier.name} block is outside the pool"
        blocks.update(entered)
        granted, freed = entered - left, left - entered
        if granted:
            start = len(seen.free) - len(granted)
            if granted != set(seen.free[start:]):
                yield f"conservation: what was granted was not next on the {tier.name} free list"
            del seen.free[start:]
        if len(free) != len(seen.free) + len(freed):
            yield f"conservation: {len(free)} {tier.name} blocks are free, {len(seen.free) + len(freed)} should be"
        elif freed:
            back = free[len(free) - len(freed) :]
            if freed != set(back):
                yield f"conservation: what was given back is not on the {tier.name} free list"
            seen.free.extend(back)

    def _totals(self) -> Iterator[str]:
        state = self._state
        if state.evictable != self._evictable:
            yield f"orders: {state.evictable} blocks are counted as evictable, {self._evictable} are"
        if state.host_resident != self._resident:
            yield f"in flight: {state.host_resident} blocks are counted as resident on the host, {self._resident} are"
        if len(state.nodes) != len(self._runs):
            yield f"links: there are {len(state.nodes)} runs, {len(self._runs)} are known"
        if len(state.requests) != len(self._requests) or len(state.keys) != len(state.requests):
            yield "block tables: the names of the requests are not those of the live ones"
        if len(state.transfers) != len(self._transfers):
            yield "transfers end: there are transfers that no event has started"

    def _node(self, node: Node) -> Iterator[str]:
        state, below = self._state, self._below.get(node)
        pins = self._ends.get(node, 0) + (below.pins if below is not None else 0)
        if node.pins != pins:
            yield f"pin counts: {node!r} is on the path of {pins} requests and swap-ins"
        parent = node.parent
        if parent is None:
            if not node.children and not node.pins and any(root is node for root in state.all_roots()):
                yield f"links: the root of namespace {node.words!r} leads nowhere"
            return
        yield from self._links(node, parent)
        yield from self._residency(node, parent, below)
        yield from self._orders(node)
        yield from self._flight(node)
        yield from self._ahead(node)

    def _links(self, node: Node, parent: Node) -> Iterator[str]:
        state = self._state
        if state.nodes.get(node.id) is not node or parent.children.get(node.words[: state.block_bytes]) is not node:
            yield f"links: {node!r} is not linked to its parent {parent!r}"
        if node.start != parent.end or (parent.parent is not None and state.nodes.get(parent.id) is not parent):
            yield f"links: {node!r} does not begin where {parent!r} ends"
        lengths = [len(ids) for ids in (node.device, node.host) if ids is not None]
        if node.size < 1 or len(node.words) != node.size * state.block_bytes or any(n != node.size for n in lengths):
            yield f"links: {node!r} has words and block ids of different lengths"

    def _residency(self, node: Node, parent: Node, below: _Below | None) -> Iterator[str]:
        if node.device is None and node.host is None:
            yield f"residency: {node!r} has no copy"
        if parent.parent is not None:
            if node.device is not None and parent.device is None:
                yield f"residency: {node!r} is on the device, {parent!r} above it is not"
            if node.host is not None and parent.device is None and parent.host is None:
                yield f"residency: {node!r} is on the host, {parent!r} above it is nowhere"
            if node.device_ready and parent.device is not None and not parent.device_ready:
                yield f"residency: {node!r} is valid on the device, {parent!r} above it is still arriving"
        if below is not None:
            if below.device and node.device is None:
                yield f"residency: runs below {node!r} are on the device, it is not"
            if below.host and node.device is None and node.host is None:
                yield f"residency: runs below {node!r} are on the host, it is nowhere"
            if below.ready and node.device is not None and not node.device_ready:
                yield f"residency: runs below {node!r} are valid on the device, it is still arriving"

    def _orders(self, node: Node) -> Iterator[str]:
        state, run = self._state, self._runs[node]
        in_device = (node in state.final) + (node in state.device_order)
        if in_device != (node.device is not None and not node.pins):
            yield f"orders: {node!r} is in {in_device} device orders"
        if (node in state.host_order) != (node.host is not None and not node.pins):
            yield f"orders: the host order is wrong about {node!r}"
        above = node.parent
        while above is not None and above.parent is not None:
            other = self._runs.get(above)
            if other is not None:
                for mine, its in ((run.device_place, other.device_place), (run.host_place, other.host_place)):
                    if mine is not None and its is not None and its < mine:
                        yield f"orders: {above!r} stands before its descendant {node!r}"
            above = above.parent

    def _flight(self, node: Node) -> Iterator[str]:
        state, transfer = self._state, node.transfer
        if transfer is None:
            if (node.device is not None and not node.device_ready) or (node.host is not None and not node.host_ready):
                yield f"in flight: {node!r} waits for a transfer that does not exist"
            if node.device is not None and node.host is not None and state.policy != HostPolicy.WRITE_THROUGH:
                yield f"in flight: {node!r} has two copies with policy {state.policy.name}"
        elif state.transfers.get(transfer.id) is not transfer or not any(p.node is node for p in transfer.parts):
            yield f"in flight: {node!r} does not belong to transfer {transfer.id}"

    def _ahead(self, node: Node) -> Iterator[str]:
        if not node.ahead:
            return
        if self._expecting is None:
            state = self._state
            requests = [request for request in state.requests.values() if request.computed != ALL]
            self._expecting = {run for request in requests for run in state.path(request.leaf)}
        if node not in self._expecting:
            yield f"ahead: {node!r} is not computed yet, and no live request is about to"
        if not node.device_ready:
            yield f"ahead: {node!r} is about to be computed, but has no place on the device"

    def _request(self, id: int) -> Iterator[str]:
        state = self._state
        request = state.requests.get(id)
        if request is None:
            return
        if state.keys.get(request.key) != id:
            yield "block tables: the names of the requests are not those of the live ones"
        for transfer in request.waits:
            waited = state.transfers.get(transfer)
            if waited is None or id not in waited.waiters:
                yield f"transfers end: request {request.key!r} waits for transfer {transfer}, which does not know"
        yield from self._table(state, request)

    def _table(self, state: State, request: Request) -> Iterator[str]:
        end = request.leaf.end
        reach = len(request.table) if _is_newest(state, request) else end
        if len(request.table) < end and reach == end:
            yield f"block tables: the block table of {request.key!r} is shorter than its path"
            return
        path = state.path(request.leaf)
        if request.matched > end or not any(request.matched in (n.start, n.end) for n in [request.leaf, *path]):
            yield f"block tables: {request.matched} blocks are said to have matched {request.key!r}, no run ends there"
        if any(stop > end for _, stop in request.duplicates):
            yield f"block tables: {request.key!r} has duplicates outside its path"
        for node in path:
            mine = request.table[node.start : min(node.end, reach)]
            if node.device is None or mine != node.device[: len(mine)]:
                ids = node.device if node.device is not None else array("i", [-1] * node.size)
                for position, (block, wanted) in enumerate(zip(mine, ids), node.start):
                    own = any(start <= position < stop for start, stop in request.duplicates)
                    if block != wanted and not own:
                        yield f"block tables: position {position} of {request.key!r} is block {block}, not {wanted}"
            if node.end > reach and node.device is not None:
                yield f"block tables: {request.key!r} has no place for the blocks of {node!r}"
            yield from self._ahead(node)
            waits = any(start <= node.start for start in request.waits.values())
            if node.start < reach and not node.device_ready and not waits:
                yield f"block tables: {request.key!r} uses {node!r}, whose copy is not valid, without waiting"

    def _transfer(self, id: int) -> Iterator[str]:
        state = self._state
        transfer = state.transfers.get(id)
        if transfer is None:
            return
        if transfer.quarantined:
            if transfer.waiters or transfer.parts:
                yield f"transfers end: somebody waits for transfer {id}, which is given up"
            return
        for waiter in transfer.waiters:
            request = state.requests.get(waiter)
            if request is None or id not in request.waits:
                yield f"transfers end: transfer {id} has the waiter {waiter}, which does not wait"
        inward = transfer.direction == Direction.SWAP_IN
        position = 0
        for part in transfer.parts:
            node, start = part.node, position
            position += part.size
            if node is None:
                continue
            arriving, ready = (node.device, node.device_ready) if inward else (node.host, node.host_ready)
            if node.transfer is not transfer or node.size != part.size:
                yield f"in flight: {node!r} does not belong to transfer {id}"
            if not part.discard and (arriving != transfer.targets[start:position] or ready):
                yield f"in flight: transfer {id} does not write the arriving copy of {node!r}"
            if inward and node.host != transfer.sources[start:position]:
                yield f"in flight: transfer {id} does not read the host copy of {node!r}"
            if inward and not node.pins and not part.discard:
                yield f"in flight: {node!r} is being swapped in and could be evicted"
        if position != len(transfer.targets) or position != len(transfer.sources):
            yield f"in flight: the parts of transfer {id} are not its blocks"


def _is_newest(state: State, request: Request) -> bool:
    """Between its match and the order of its swap-in, the newest request has no blocks yet for the host part."""
    return request.id == state.next_request - 1
