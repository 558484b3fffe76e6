"""``check(state)``: the invariants, written independently of ``apply`` as statements about the whole state.

Each function yields one message per violation. They recompute everything from the runs, requests and transfers, so
that a mistake in ``apply`` and one in a check do not hide each other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from statemachine.events import Direction, HostPolicy, Tier
from statemachine.state.nodes import ALL, Node
from statemachine.state.ownership import owners
from statemachine.state.state import State


def check(state: State) -> list[str]:
    """All violations, each beginning with the name of its invariant; empty when the state is sound."""
    return [f"{name}: {message}" for name, invariant in INVARIANTS.items() for message in invariant(state)]


def _conservation(state: State) -> Iterator[str]:
    for tier in Tier:
        capacity = state.pool(tier).capacity
        count: Counter[int] = Counter()
        for _, ids in owners(state, tier):
            count.update(ids)
        for block in sorted(set(range(capacity)) ^ set(count)):
            yield f"{tier.name} block {block} {'is lost' if block < capacity else 'is outside the pool'}"
        for block, times in sorted(count.items()):
            if times > 1:
                names = [name for name, ids in owners(state, tier) if block in ids]
                yield f"{tier.name} block {block} has {times} owners: {', '.join(names)}"


def _pin_counts(state: State) -> Iterator[str]:
    holders: Counter[int] = Counter()
    leaves = [request.leaf for request in state.requests.values()]
    leaves += [transfer.leaf for transfer in state.transfers.values() if transfer.leaf is not None]
    for leaf in leaves:
        node: Node | None = leaf
        while node is not None:
            holders[id(node)] += 1
            node = node.parent
    for node in [*state.nodes.values(), *state.all_roots()]:
        if node.pins != holders[id(node)]:
            yield f"{node!r} is on the path of {holders[id(node)]} requests and swap-ins"


def _residency(state: State) -> Iterator[str]:
    for node in state.nodes.values():
        parent = node.parent
        if node.device is None and node.host is None:
            yield f"{node!r} has no copy"
        if parent is None or parent.parent is None:
            continue
        if node.device is not None and parent.device is None:
            yield f"{node!r} is on the device, {parent!r} above it is not"
        if node.host is not None and parent.device is None and parent.host is None:
            yield f"{node!r} is on the host, {parent!r} above it is nowhere"
        if node.device_ready and parent.device is not None and not parent.device_ready:
            yield f"{node!r} is valid on the device, {parent!r} above it is still arriving"


def _links(state: State) -> Iterator[str]:
    seen: set[int] = set()
    stack = list(state.all_roots())
    while stack:
        node = stack.pop()
        for key, child in node.children.items():
            if child.parent is not node or key != child.words[: state.block_bytes]:
                yield f"{child!r} is not linked to its parent {node!r}"
            if child.start != node.end:
                yield f"{child!r} does not begin where {node!r} ends"
            if state.nodes.get(child.id) is not child or child.id in seen:
                yield f"{child!r} is not the one run of its id"
                continue
            seen.add(child.id)
            stack.append(child)
    for id in sorted(set(state.nodes) - seen):
        yield f"{state.nodes[id]!r} cannot be reached from a root"
    for node in state.nodes.values():
        sizes = {len(node.words) // state.block_bytes, node.size}
        sizes.update(len(ids) for ids in (node.device, node.host) if ids is not None)
        if sizes != {node.size} or not node.size or len(node.words) % state.block_bytes:
            yield f"{node!r} has words and block ids of different lengths"
    for root in state.all_roots():
        if not root.children and not root.pins:
            yield f"the root of namespace {root.words!r} leads nowhere"


def _orders(state: State) -> Iterator[str]:
    device = [*state.final, *state.device_order]
    expected = {id for id, node in state.nodes.items() if node.device is not None and not node.pins}
    if len(device) != len(expected) or {node.id for node in device} != expected:
        yield f"the device orders hold {sorted(node.id for node in device)}, evictable are {sorted(expected)}"
    host = list(state.host_order)
    expected = {id for id, node in state.nodes.items() if node.host is not None and not node.pins}
    if len(host) != len(expected) or {node.id for node in host} != expected:
        yield f"the host order holds {sorted(node.id for node in host)}, evictable are {sorted(expected)}"
    for order in (device, host):
        place = {node.id: position for position, node in enumerate(order)}
        for node in order:
            above = node.parent
            while above is not None and above.parent is not None:
                if place.get(above.id, len(order)) < place[node.id]:
                    yield f"{above!r} stands before its descendant {node!r}"
                above = above.parent
    if state.evictable != sum(node.size for node in device):
        yield f"{state.evictable} blocks are counted as evictable, {sum(node.size for node in device)} are"


def _in_flight(state: State) -> Iterator[str]:
    members: Counter[int] = Counter()
    for transfer in state.transfers.values():
        if transfer.quarantined:
            continue
        position = 0
        for part in transfer.parts:
            node, stop = part.node, position + part.size
            if node is not None:
                members[node.id] += 1
                inward = transfer.direction == Direction.SWAP_IN
                if node.transfer is not transfer or node.size != part.size:
                    yield f"{node!r} does not belong to transfer {transfer.id}"
                arriving = node.device if inward else node.host
                ready = node.device_ready if inward else node.host_ready
                if not part.discard and (arriving != transfer.targets[position:stop] or ready):
                    yield f"transfer {transfer.id} does not write the arriving copy of {node!r}"
                if inward and node.host != transfer.sources[position:stop]:
                    yield f"transfer {transfer.id} does not read the host copy of {node!r}"
                if inward and not node.pins and not part.discard:
                    yield f"{node!r} is being swapped in and could be evicted"
            position = stop
        if position != len(transfer.targets) or position != len(transfer.sources):
            yield f"the parts of transfer {transfer.id} are not its blocks"
    for node in state.nodes.values():
        if (members[node.id] == 1) != (node.transfer is not None) or members[node.id] > 1:
            yield f"{node!r} is in {members[node.id]} transfers"
        arrives = (node.device is not None and not node.device_ready) or (node.host is not None and not node.host_ready)
        if arrives and node.transfer is None:
            yield f"{node!r} waits for a transfer that does not exist"
        if node.device is not None and node.host is not None and node.transfer is None:
            if state.policy != HostPolicy.WRITE_THROUGH:
                yield f"{node!r} has two copies with policy {state.policy.name}"
    resident = sum(
        node.size
        for node in state.nodes.values()
        if node.host is not None and not (node.transfer is not None and node.transfer.direction == Direction.SWAP_IN)
    )
    if resident != state.host_resident:
        yield f"{state.host_resident} blocks are counted as resident on the host, {resident} are"


def _ahead(state: State) -> Iterator[str]:
    ahead = {id for id, node in state.nodes.items() if node.ahead}
    for request in state.requests.values() if ahead else ():
        if request.computed != ALL:
            ahead -= {node.id for node in state.path(request.leaf)}
    for id in sorted(ahead):
        yield f"{state.nodes[id]!r} is not computed yet, and no live request is about to"
    for node in state.nodes.values():
        if node.ahead and not node.device_ready:
            yield f"{node!r} is about to be computed, but has no place on the device"


def _transfers_end(state: State) -> Iterator[str]:
    for transfer in state.transfers.values():
        if transfer.quarantined and (transfer.waiters or transfer.parts):
            yield f"somebody waits for transfer {transfer.id}, which is given up"
        for id in transfer.waiters:
            request = state.requests.get(id)
            if request is None or transfer.id not in request.waits:
                yield f"transfer {transfer.id} has the waiter {id}, which does not wait"
    for request in state.requests.values():
        for id in request.waits:
            transfer_or_none = state.transfers.get(id)
            if transfer_or_none is None or request.id not in transfer_or_none.waiters:
                yield f"request {request.key!r} waits for transfer {id}, which does not know"


def _block_tables(state: State) -> Iterator[str]:
    if state.keys != {request.key: id for id, request in state.requests.items()}:
        yield "the names of the requests are not those of the live ones"
    for request in state.requests.values():
        own = {position for start, stop in request.duplicates for position in range(start, stop)}
        end = request.leaf.end
        # Between its match and the order of its swap-in, the newest request has no blocks yet for the host part.
        reach = len(request.table) if request.id == state.next_request - 1 else end
        if len(request.table) < end and reach == end:
            yield f"the block table of {request.key!r} is shorter than its path"
            continue
        position = 0
        for node in state.path(request.leaf):
            for offset in range(node.size):
                block = node.device[offset] if node.device is not None else -1
                if position >= reach:
                    if block >= 0:
                        yield f"{request.key!r} has no place for block {block} of {node!r}"
                elif position not in own and request.table[position] != block:
                    yield (
                        f"position {position} of {request.key!r} is block {request.table[position]}, "
                        f"{node!r} has block {block} there"
                    )
                position += 1
        if request.matched > end or not any(
            request.matched in (node.start, node.end) for node in [request.leaf, *state.path(request.leaf)]
        ):
            yield f"{request.matched} blocks are said to have matched {request.key!r}, no run ends there"
        if any(position >= end for position in own):
            yield f"{request.key!r} has duplicates outside its path"
        for node in state.path(request.leaf):
            if (
                node.start < reach
                and not node.device_ready
                and not any(start <= node.start for start in request.waits.values())
            ):
                yield f"{request.key!r} uses {node!r}, whose copy is not valid, without waiting"


INVARIANTS: dict[str, Callable[[State], Iterator[str]]] = {
    "conservation": _conservation,
    "pin counts": _pin_counts,
    "residency": _residency,
    "links": _links,
    "orders": _orders,
    "in flight": _in_flight,
    "ahead": _ahead,
    "transfers end": _transfers_end,
    "block tables": _block_tables,
}
"""Name → function that yields what is wrong. Every one is shown to fire in the tests."""
