"""Making room: which cached runs go, and where to.

Policy lives here. Victims come from the front of the eviction orders; what is worth it moves to the host tier, and the
host tier in turn gives up what was there longest.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping

from statemachine.events import (
    CAPACITY,
    EXCLUSIVE,
    SWAP_OUT,
    WRITE_THROUGH,
    BlocksEvicted,
    Event,
    EvictReason,
    IntArray,
    TransferStarted,
)
from statemachine.state.nodes import Node, from_end
from statemachine.state.places import Place
from statemachine.state.state import State
from statemachine.state.tree import root_of

_NONE: IntArray = array("Q")
_NO_COUNTS: IntArray = array("I")
_NOTHING_KEPT: Mapping[Node, int] = {}
_NOTHING_HELD: list[tuple[int, IntArray]] = []


class Victim:
    """The last ``take`` blocks of a run; ``emptied`` if nothing of it is left then."""

    __slots__ = ("emptied", "final", "node", "take")

    def __init__(self, node: Node, take: int, emptied: bool, final: bool = False) -> None:
        self.node = node
        self.take = take
        self.emptied = emptied
        self.final = final


class Supply:
    """Device blocks that can be granted once ``events`` are applied: free ones, then ones a copy still reads."""

    def __init__(self, events: list[Event], plain: IntArray, held: list[tuple[int, IntArray]], next_node: int) -> None:
        self.events = events
        self.next_node = next_node
        self._plain = plain
        self._held = held
        self._position = 0

    def take(self, count: int) -> tuple[IntArray, IntArray, IntArray]:
        """The next ``count`` block ids, and the transfers (with their numbers of blocks) that still read some."""
        start = self._position
        self._position = stop = start + count
        blocks = self._plain[start:stop]
        if not self._held or len(blocks) == count:
            return blocks, _NONE, _NO_COUNTS
        after, counts = array("Q"), array("I")
        first = len(self._plain)
        for transfer, ids in self._held:
            part = ids[max(start - first, 0) : max(stop - first, 0)]
            if part:
                after.append(transfer)
                counts.append(len(part))
                blocks.extend(part)
            first += len(ids)
        return blocks, after, counts


def device_supply(
    state: State,
    wanted: int,
    kept: Mapping[Node, int] = _NOTHING_KEPT,
    leaving: int = 0,
    next_node: int = 0,
) -> Supply | None:
    """Plan how ``wanted`` device blocks become available; ``None`` when they cannot at this moment.

    Args:
        kept: runs that the same transaction pins, with how many of their first blocks.
        leaving: host blocks that the same transaction swaps in.
        next_node: the next unused run id at that point of the transaction (default: the state's).
    """
    free = state.device.pool.free
    next_node = next_node or state.next_node
    need = wanted - len(free)
    if need <= 0:
        return Supply([], from_end(free, wanted), _NOTHING_HELD, next_node)
    victims = _victims(state, need, kept)
    if not victims:
        return None
    if state.policy == EXCLUSIVE:
        plan = _swap_out(state, victims, kept, leaving, next_node)
    else:
        plan = _drop(state, victims, next_node)
    if plan is None:
        return None
    events, freed, held, next_node = plan
    return Supply(events, from_end(free + freed, len(free) + len(freed)), held, next_node)


_Plan = tuple[list[Event], IntArray, list[tuple[int, IntArray]], int]


def _victims(state: State, need: int, kept: Mapping[Node, int]) -> list[Victim]:
    """Runs to give up for ``need`` blocks: ``final`` ones first, then least recently released. None: not enough."""
    victims: list[Victim] = []
    skipped: set[Node] = set()
    through = state.policy == WRITE_THROUGH
    final = state.device.final
    for order in state.device.orders:
        for node in order:
            have = node.size
            if node in kept:
                have -= kept[node]
                if have <= 0:
                    continue
            if through and node.children and _stuck(node, skipped):
                skipped.add(node)
                continue
            if have >= need:
                victims.append(Victim(node, need, need == have, order is final))
                return victims
            victims.append(Victim(node, have, True, order is final))
            need -= have
    return []


def _stuck(node: Node, skipped: set[Node]) -> bool:
    """Write-through only: dropping the run would strand a copy on the host, or a run that could not be dropped."""
    stays = node.elsewhere(0)
    for child in node.children.values():
        if child in skipped or not (stays or (child.copies[0] is not None and not child.elsewhere(0))):
            return True
    return False


def droppable(place: Place, limit: int, root: Node | None = None, *, distrusted: bool = False) -> list[Victim]:
    """Runs that nobody uses, in eviction order, until ``limit`` blocks are found (the last one in part).

    Runs in flight, and runs below which something would be stranded, are passed over; with ``root``, those of other
    trees, too, and with ``distrusted`` all the others.
    """
    gone: set[Node] = set()
    emptied: set[Node] = set()  # also those that stay where their other copy is
    victims: list[Victim] = []
    for order in place.orders:
        for node in order:
            if limit <= 0:
                return victims
            other = node.elsewhere(place.number)
            if node.transfer is not None or node.strands(place.number, emptied if other else gone):
                continue
            if root is not None and root_of(node) is not root:
                continue
            if distrusted and not node.distrusted:
                continue
            take = min(node.size, limit)
            victims.append(Victim(node, take, take == node.size))
            emptied.add(node)
            if not other:
                gone.add(node)
            limit -= take
    return victims


def evicted(place: Place, victims: Iterable[Victim], reason: EvictReason, upper: int = 0) -> BlocksEvicted:
    """The event that gives up these victims in a place."""
    nodes, counts, blocks = array("Q"), array("I"), array("i")
    for victim in victims:
        node, take = victim.node, victim.take
        copy = node.copies[place.number]
        assert copy is not None
        nodes.append(node.id)
        counts.append(take)
        blocks.extend(from_end(copy.ids, take))
    return BlocksEvicted(place.tier, reason, upper, nodes, counts, blocks)


def evicted_everywhere(state: State, doomed: set[Node], reason: EvictReason, nearest: int = 0) -> list[Event]:
    """The events that give up whole runs, from the farthest place to the ``nearest`` one; nobody uses the runs."""
    events: list[Event] = []
    for place in reversed(state.places[nearest:]):
        victims = [Victim(node, node.size, True) for order in place.orders for node in order if node in doomed]
        if victims:
            events.append(evicted(place, victims, reason))
    return events


def _drop(state: State, victims: list[Victim], next_node: int) -> _Plan:
    """Without a host tier blocks are dropped; with write-through the host has a copy already."""
    last = victims[-1]
    upper = 0
    if not last.emptied and last.node.elsewhere(0):
        upper = next_node
        next_node += 1
    event = evicted(state.device, victims, CAPACITY, upper)
    if not state.transfers:
        return [event], event.blocks, _NOTHING_HELD, next_node
    freed = array("i")
    held: dict[int, IntArray] = {}
    for victim in victims:
        node, take = victim.node, victim.take
        copy = node.copies[0]
        assert copy is not None
        ids = from_end(copy.ids, take)
        if node.transfer is None:
            freed.extend(ids)
        else:
            held.setdefault(node.transfer.id, array("i")).extend(ids)
    for ids in held.values():
        ids.reverse()
    return [event], freed, list(held.items()), next_node


def _swap_out(
    state: State, victims: list[Victim], kept: Mapping[Node, int], leaving: int, next_node: int
) -> _Plan | None:
    """Move victims to the host as far as there is room; the oldest of them give way first."""
    events: list[Event] = []
    dropped: list[Victim] = []
    out: list[Victim] = []
    lost: set[Node] = set()
    for victim in victims:
        node = victim.node
        if victim.final and (not node.children or (node.distrusted and lost.issuperset(node.children.values()))):
            dropped.append(victim)
            lost.add(node)
        else:
            out.append(victim)
    excess = sum(victim.take for victim in out)
    room, evictions = host_room(state, excess, kept, leaving)
    gone = {victim.node for victim in evictions if victim.emptied} | lost
    excess -= room
    moved: list[Victim] = []
    for victim in out:
        node, take, emptied = victim.node, victim.take, victim.emptied
        if excess and not moved and all(child in gone for child in node.children.values()):
            drop = min(excess, take)
            excess -= drop
            dropped.append(Victim(node, drop, emptied and drop == take))
            gone.add(node)
            if drop < take:
                moved.append(Victim(node, take - drop, emptied))
        else:
            moved.append(victim)
    if excess:
        return None
    if evictions:
        events.append(evicted(state.host, evictions, CAPACITY))
    freed = array("i")
    if dropped:
        event = evicted(state.device, dropped, CAPACITY)
        freed = event.blocks
        events.append(event)
    if not moved:
        return events, freed, [], next_node
    moved.reverse()
    upper = 0
    if not moved[0].emptied:
        upper = next_node
        next_node += 1
    cut_off = dropped[-1] if dropped and dropped[-1].node is moved[-1].node else None
    sources = array("i")
    for victim in moved:
        copy = victim.node.copies[0]
        assert copy is not None
        ids = copy.ids
        stop = len(ids) - (cut_off.take if cut_off is not None and victim is moved[-1] else 0)
        sources.extend(ids[stop - victim.take : stop])
    host_free = state.host.pool.free
    available = host_free + events[0].blocks if evictions and isinstance(events[0], BlocksEvicted) else host_free
    targets = available[len(available) - len(sources) :][::-1]
    nodes = array("Q", [victim.node.id for victim in moved])
    counts = array("I", [victim.take for victim in moved])
    transfer = state.next_transfer
    events.append(TransferStarted(transfer, SWAP_OUT, 0, upper, nodes, counts, _NONE, _NO_COUNTS, sources, targets))
    return events, freed, [(transfer, sources)], next_node


def host_room(
    state: State, wanted: int, kept: Mapping[Node, int] = _NOTHING_KEPT, leaving: int = 0
) -> tuple[int, list[Victim]]:
    """How many of ``wanted`` host blocks can be had, and what has to be evicted for them.

    Copies in flight, runs that the same transaction pins and runs with a child that stays are passed over.
    """
    host = state.host
    room = min(host.limit - host.resident + leaving, len(host.pool.free))
    victims: list[Victim] = []
    if room >= wanted:
        return wanted, victims
    room = min(room, wanted)
    gone: set[Node] = set()
    for node in host.lru:
        if node.transfer is not None:
            continue
        have = node.size - kept.get(node, 0)
        if have <= 0 or any(child not in gone for child in node.children.values()):
            continue
        # A run with a device copy as well would have to be cut: it goes as a whole.
        take = have if node.elsewhere(host.number) else min(have, wanted - room)
        victims.append(Victim(node, take, take == have))
        gone.add(node)
        room += take
        if room >= wanted:
            break
    return max(min(room, wanted), 0), victims
