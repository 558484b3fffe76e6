"""All invariants after every event, at the price of what the event touched.

:func:`statemachine.check.check` looks at the whole state; of a cache of 65,536 blocks that takes tens of milliseconds.
This class remembers what it has seen of every run, request and transfer, and after an event puts the same statements
again to those the event can have touched. What is said of the whole becomes a sum that is remembered: a run's pins are
those of its children and of whoever ends there; a descendant stands before its ancestors if it does so when it enters
an order; the free list is what was granted from its top and given back to it. Events that sweep over everything, or
fail, are followed by a full check.

What an event must not touch, it does not look at: run the full check now and then (``kvledger check`` does).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from statemachine.check import check, statements
from statemachine.check.statements import Position
from statemachine.events import (
    AllocationRefused,
    BlocksAllocated,
    BlocksDistrusted,
    BlocksReassigned,
    BlocksTrimmed,
    DigestTaken,
    EpochStarted,
    Event,
    IntArray,
    Outcome,
    SideAllocated,
    SideFreed,
    TransferFinished,
    WindowPassed,
    WorkerJoined,
    WorkerLost,
)
from statemachine.mentions import mentions
from statemachine.state.nodes import Node, Transfer
from statemachine.state.order import EvictionOrder
from statemachine.state.places import Place
from statemachine.state.state import State

_NOT_THE_CACHE = (AllocationRefused, WorkerJoined, WorkerLost, EpochStarted, DigestTaken)
"""They change nothing that an invariant speaks of."""
_OWN_BLOCKS = (BlocksAllocated, BlocksReassigned, BlocksTrimmed, SideAllocated, SideFreed, WindowPassed)
"""They leave the runs on the paths of the requests that they name as they are."""
_GAP = 1 << 64
"""Between the marks of neighbours in an order: room for every cut that can come between."""
_NO_BLOCKS: IntArray = array("i")


class _Run:
    """What was seen of a run; the lists are by place."""

    __slots__ = ("evictable", "ids", "marks", "parent", "pins", "resident", "transfer", "valid")

    def __init__(self, places: int) -> None:
        self.parent: Node | None = None
        self.pins = 0
        self.valid = False
        self.transfer: Transfer | None = None
        self.ids: list[IntArray | None] = [None] * places
        self.evictable = [0] * places
        self.resident = [0] * places
        self.marks: list[Position | None] = [None] * places


class _Below:
    """What the children of a run come to."""

    __slots__ = ("copies", "pins", "valid")

    def __init__(self, places: int) -> None:
        self.pins = self.valid = 0
        self.copies = [0] * places


class _Request:
    """What was seen of a request."""

    __slots__ = ("leaf", "private", "sides", "waits_for")

    def __init__(self, leaf: Node, private: IntArray, sides: list[IntArray], waits: tuple[int, ...]) -> None:
        self.leaf = leaf
        self.private = private
        self.sides = sides
        self.waits_for = waits


class _Transfer:
    """What was seen of a transfer; its own blocks by place."""

    __slots__ = ("blocks", "leaf", "transfer", "waiters")

    def __init__(self, transfer: Transfer, places: int) -> None:
        self.transfer = transfer
        self.leaf = transfer.leaf
        self.waiters = tuple(transfer.waiters)
        self.blocks = [transfer.own_blocks(number) for number in range(places)]


class _Owned:
    """Blocks of a place that somebody has, a copy of the free list, and what has changed hands since."""

    __slots__ = ("blocks", "capacity", "entered", "evictable", "free", "left", "resident")

    def __init__(self, place: Place) -> None:
        self.capacity = place.pool.capacity
        self.blocks: set[int] = set()
        self.free = place.pool.free[:]
        self.left: list[int] = []
        self.entered: list[int] = []
        self.evictable = self.resident = 0


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
        self._places = len(state.places)
        self._runs: dict[Node, _Run] = {}
        self._by_id: dict[int, Node] = {}
        self._below: dict[Node, _Below] = {}
        self._ends: dict[Node, int] = {}
        self._requests: dict[int, _Request] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._mark = 0
        self._shared_changed = False
        self._expected: set[Node] | None = None
        """The runs that a live request may have cached ahead, once an event has made that a question."""
        self._owned = [_Owned(place) for place in state.places]
        self._sides = [_Owned(place) for place in state.sides]
        self._update(list(state.nodes.values()), [], set(state.requests), set(state.transfers))
        for owned in (*self._owned, *self._sides):
            owned.blocks.update(owned.entered)
            owned.entered, owned.left = [], []

    def full(self) -> list[str]:
        """Check everything, and begin anew from what is there."""
        self.full_checks += 1
        broken = check(self._state)
        if not broken:
            self._begin()
        return broken

    def after(self, event: Event) -> list[str]:
        """What is broken after the event, just applied, in the words of the full check; empty if nothing is."""
        if isinstance(event, _NOT_THE_CACHE):
            return []
        if isinstance(event, BlocksDistrusted) or (
            isinstance(event, TransferFinished) and event.outcome != Outcome.DONE
        ):
            return self.full()
        try:
            told = self._look_again(event)
        except (LookupError, AssertionError, TypeError) as error:  # something is not where it was seen
            told = [f"links: {type(error).__name__} {error}"]
        if told is None:
            return self.full()
        return (self.full() or told) if told else told

    def _look_again(self, event: Event) -> list[str] | None:
        """What is broken in what the event touched; ``None``: it names nothing, so it may have touched everything."""
        state = self._state
        nodes, gone, requests, transfers = self._touched(event)
        if not (nodes or gone or requests or transfers):
            return None
        for node in gone:
            above = self._runs[node].parent
            if above is not None and above not in gone:
                nodes[above] = None
        live = [node for node in nodes if node.parent is not None]
        self._shared_changed = False
        self._update(live, gone, requests, transfers)
        if self._shared_changed:
            requests, transfers = set(self._requests), set(self._transfers)
        told = [*self._conservation(), *self._totals()]
        self._expected = None
        for node in live:
            assert node.parent is not None
            nodes[node.parent] = None
        for node in nodes:
            told += self._run(node)
        for id in requests:
            request = state.requests.get(id)
            if request is not None:
                told += statements.of_request(state, request)
                for node in state.path(request.leaf):
                    told += self._computing(node)
        for id in transfers:
            if id in state.transfers:
                told += statements.of_transfer(state, state.transfers[id])
        return told

    # What an event can have touched

    def _touched(self, event: Event) -> tuple[dict[Node, None], list[Node], set[int], set[int]]:
        """Runs that are there, runs that are gone; requests and transfers, before or now.

        All that the event mentions, and whatever shared it: the paths of requests and transfers, who waits for whom.
        """
        state, found = self._state, mentions(event)
        nodes: dict[Node, None] = {}
        gone: dict[Node, None] = {}
        requests = {id for id in found.requests if id}
        transfers = set(found.transfers)
        for id in found.nodes:
            named = state.nodes.get(id) or self._by_id.get(id)
            if named is not None:
                self._see(nodes, gone, named)
                if named.transfer is not None:
                    transfers.add(named.transfer.id)
        for id in list(transfers):
            seen = self._transfers.get(id)
            if seen is not None:
                requests.update(seen.waiters)
                self._path(nodes, gone, seen.leaf)
                for part in seen.transfer.parts:
                    if part.node is not None:
                        self._see(nodes, gone, part.node)
        for id in requests:
            before, request = self._requests.get(id), state.requests.get(id)
            if before is not None:
                transfers.update(before.waits_for)
            if request is not None:
                transfers.update(request.waits_for)
            if not isinstance(event, _OWN_BLOCKS):
                self._path(nodes, gone, before.leaf if before is not None else None)
                self._path(nodes, gone, request.leaf if request is not None else None)
        return nodes, list(gone), requests, transfers

    def _see(self, nodes: dict[Node, None], gone: dict[Node, None], node: Node) -> None:
        if node.parent is None or self._state.nodes.get(node.id) is node:
            nodes[node] = None
        elif node in self._runs:
            gone[node] = None

    def _path(self, nodes: dict[Node, None], gone: dict[Node, None], leaf: Node | None) -> None:
        """A path as it was seen, with what has come between since."""
        node = leaf
        while node is not None:
            self._see(nodes, gone, node)
            run = self._runs.get(node)
            above = run.parent if run is not None else node.parent
            between = node.parent
            while between is not None and between is not above and between not in self._runs:
                self._see(nodes, gone, between)
                between = between.parent
            node = above

    # Looking again

    def _update(self, nodes: list[Node], gone: list[Node], requests: set[int], transfers: set[int]) -> None:
        state = self._state
        for node in gone:
            run = self._runs.pop(node)
            self._by_id.pop(node.id, None)
            self._children(run, -1)
            self._below.pop(node, None)
            for owned, ids, evictable, resident in zip(self._owned, run.ids, run.evictable, run.resident):
                owned.evictable -= evictable
                owned.resident -= resident
                _swap(owned, ids, None)
        entering: dict[EvictionOrder, list[Node]] = {}
        for node in nodes:
            self._look(node, entering, transfers)
        for place in state.places:
            for number, order in enumerate(place.orders):
                if order in entering:
                    self._set_marks(place, number, order, entering[order])
        for id in requests:
            old = self._requests.pop(id, None)
            request = state.requests.get(id)
            self._end(old.leaf if old is not None else None, request.leaf if request is not None else None)
            private = request.private() if request is not None else _NO_BLOCKS
            _swap(self._owned[0], old.private if old is not None else None, private)
            sides = [side.blocks() for side in request.sides] if request is not None else []
            for number, owned in enumerate(self._sides):
                had = old.sides[number] if old is not None else None
                _swap(owned, had, sides[number] if sides else None)
            if request is not None:
                self._requests[id] = _Request(request.leaf, private, sides, tuple(request.waits_for))
        for id in transfers:
            before = self._transfers.pop(id, None)
            transfer = state.transfers.get(id)
            now = _Transfer(transfer, self._places) if transfer is not None else None
            self._end(before.leaf if before is not None else None, now.leaf if now is not None else None)
            for number, owned in enumerate(self._owned):
                had = before.blocks[number] if before is not None else None
                _swap(owned, had, now.blocks[number] if now is not None else None)
            if now is not None:
                self._transfers[id] = now

    def _look(self, node: Node, entering: dict[EvictionOrder, list[Node]], transfers: set[int]) -> None:
        state = self._state
        run = self._runs.get(node)
        if run is None:
            run = self._runs[node] = _Run(self._places)
            self._by_id[node.id] = node
        else:
            self._children(run, -1)
            seen, copy = run.ids[0], node.device
            moved = seen is not None and copy is not None and len(seen) == len(copy.ids) and seen != copy.ids
            if moved or (run.valid and not node.valid()):
                self._shared_changed = True  # whoever uses the run has to be looked at
        for transfer in (run.transfer, node.transfer):
            if run.transfer is not node.transfer and transfer is not None:
                transfers.add(transfer.id)
        run.parent, run.pins, run.valid, run.transfer = node.parent, node.pins, node.valid(), node.transfer
        for place, owned in zip(state.places, self._owned):
            number = place.number
            copy = node.copies[number]
            ids = copy.ids if copy is not None else None
            _swap(owned, run.ids[number], ids)
            evictable, resident = statements.evictable(place, node), statements.resident(place, node)
            owned.evictable += evictable - run.evictable[number]
            owned.resident += resident - run.resident[number]
            run.ids[number], run.evictable[number], run.resident[number] = ids, evictable, resident
            mark, stands = run.marks[number], [at for at, order in enumerate(place.orders) if node in order]
            if not stands:
                run.marks[number] = None
            elif mark is None or mark[0] != stands[0]:
                entering.setdefault(place.orders[stands[0]], []).append(node)
        self._children(run, 1)

    def _children(self, run: _Run, sign: int) -> None:
        """Add a run to what its parent's children come to, or take it away."""
        assert run.parent is not None
        below = self._below.get(run.parent)
        if below is None:
            below = self._below[run.parent] = _Below(self._places)
        below.pins += sign * run.pins
        below.valid += sign * run.valid
        for number, ids in enumerate(run.ids):
            below.copies[number] += sign * (ids is not None)

    def _set_marks(self, place: Place, number: int, order: EvictionOrder, nodes: list[Node]) -> None:
        """Give the runs that entered an order their marks: at the back increasing ones, a cut-off part one between."""
        entering = set(nodes)
        tail: list[Node] = []
        node, _ = order.neighbours(None)
        while node is not None and node in entering:
            tail.append(node)
            entering.discard(node)
            node, _ = order.neighbours(node)
        for node in reversed(tail):
            self._mark += _GAP
            self._runs[node].marks[place.number] = number, self._mark
        for node in sorted(entering, key=lambda node: node.id) if entering else ():
            ahead, behind = order.neighbours(node)
            low, high = self._mark_of(place, ahead), self._mark_of(place, behind)
            mark = ((low or 0) + (high if high is not None else self._mark + _GAP)) // 2
            self._runs[node].marks[place.number] = number, mark

    def _mark_of(self, place: Place, node: Node | None) -> int | None:
        run = self._runs.get(node) if node is not None else None
        mark = run.marks[place.number] if run is not None else None
        return mark[1] if mark is not None else None

    def _end(self, old: Node | None, new: Node | None) -> None:
        """A path that ended in one run ends in another."""
        if old is not None:
            self._ends[old] -= 1
            if not self._ends[old]:
                del self._ends[old]
        if new is not None:
            self._ends[new] = self._ends.get(new, 0) + 1

    # What must hold

    def _conservation(self) -> Iterator[str]:
        state = self._state
        for place, owned in zip((*state.places, *state.sides), (*self._owned, *self._sides)):
            if owned.left or owned.entered or len(owned.free) != len(place.pool.free):
                yield from _moved(place, owned)

    def _totals(self) -> Iterator[str]:
        state = self._state
        for place, owned in zip(state.places, self._owned):
            yield from statements.of_place(place, owned.evictable, owned.resident)
        if len(state.nodes) != len(self._runs):
            yield f"links: there are {len(state.nodes)} runs, {len(self._runs)} are known"
        if len(state.requests) != len(self._requests) or len(state.numbers) != len(state.requests):
            yield "block tables: the names of the requests are not those of the live ones"
        if len(state.transfers) != len(self._transfers):
            yield "transfers end: there are transfers that no event has started"

    def _run(self, node: Node) -> Iterator[str]:
        state, below = self._state, self._below.get(node)
        yield from statements.of_pins(node, self._ends.get(node, 0) + (below.pins if below is not None else 0))
        if node.parent is None:
            if any(root is node for root in state.all_roots()):
                yield from statements.of_root(node)
            return
        yield from statements.of_run(state, node)
        yield from statements.of_orders(state, node, self._position)
        yield from self._computing(node)
        if below is not None:
            for place in state.places:
                if below.copies[place.number] and not node.as_near(place.number):
                    yield f"residency: runs below {node!r} are on {place}, it is neither there nor nearer"
            if below.valid and node.arriving():
                yield f"residency: runs below {node!r} are valid on the device, it is still arriving"

    def _computing(self, node: Node) -> Iterator[str]:
        if node.uncomputed:
            if self._expected is None:
                self._expected = statements.about_to_be_computed(self._state)
            yield from statements.of_computing(node, self._expected)

    def _position(self, place: Place, node: Node) -> Position | None:
        run = self._runs.get(node)
        return run.marks[place.number] if run is not None else None


def _swap(owned: _Owned, old: IntArray | None, new: IntArray | None) -> None:
    """Somebody has other blocks than before."""
    if old is not new and old != new:
        if old:
            owned.left.extend(old)
        if new:
            owned.entered.extend(new)


def _moved(place: Place, owned: _Owned) -> Iterator[str]:
    """Blocks change hands: what is granted comes from the top of the free list, what is given back goes there."""
    free, blocks = place.pool.free, owned.blocks
    left, entered = set(owned.left), set(owned.entered)
    single = len(entered) == len(owned.entered)
    owned.left, owned.entered = [], []
    blocks.difference_update(left)
    if not single or not blocks.isdisjoint(entered):
        yield f"conservation: a {place} block has two owners"
    if entered and not 0 <= min(entered) <= max(entered) < owned.capacity:
        yield f"conservation: a {place} block is outside the pool"
    blocks.update(entered)
    granted, freed = entered - left, left - entered
    if granted:
        start = len(owned.free) - len(granted)
        if granted != set(owned.free[start:]):
            yield f"conservation: what was granted was not next on the {place} free list"
        del owned.free[start:]
    if len(free) != len(owned.free) + len(freed):
        yield f"conservation: {len(free)} {place} blocks are free, {len(owned.free) + len(freed)} should be"
    elif freed:
        back = free[len(free) - len(freed) :]
        if freed != set(back):
            yield f"conservation: what was given back is not on the {place} free list"
        owned.free.extend(back)
