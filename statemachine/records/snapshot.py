"""The one canonical byte encoding of a state: its digest, and snapshots that can be restored.

Equal states have equal bytes and the other way round: everything is written in a fixed order (ids ascending, orders as
they are linked), little-endian, with lengths. A snapshot is the encoding followed by its own digest.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable

import xxhash

from statemachine.check import check
from statemachine.events import KIND_OF, Direction, HostPolicy, IntArray, LedgerOpened
from statemachine.items import all_records, by_block
from statemachine.records import codec
from statemachine.state.groups import parse
from statemachine.state.nodes import NO_CHILDREN, NO_SIDES, Copy, Node, Part, Request, Side, Transfer
from statemachine.state.order import EvictionOrder
from statemachine.state.state import COUNTERS, State, impossible

MAGIC = b"kvlstate5"
"""Names the encoding: a change of it changes every digest, and takes the next number."""
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = struct.Struct("<13Q")
_NODE = struct.Struct("<QQIIIQBBQI")
_NO_COPY, _ARRIVING, _READY, _AHEAD = 0, 1, 2, 3
_DISTRUSTED = 4
"""Added to the state of the host copy. Where nothing is distrusted the bytes are those of before that could happen."""


class SnapshotError(ValueError):
    """The bytes are not a complete snapshot of this version."""


def state_digest(state: State) -> bytes:
    """xxh3-128 of the canonical encoding, 16 bytes."""
    return xxhash.xxh3_128_digest(encode_state(state))


def counters_digest(state: State) -> bytes:
    """xxh3-128 of totals, pool levels and id counters, 16 bytes: cheap enough for the engine itself."""
    values = [
        *state.counters.as_dict().values(),
        *_scalars(state),
        *(len(place.pool.free) for place in (*state.places, *state.sides)),
    ]
    return xxhash.xxh3_128_digest(struct.pack(f"<{len(values)}Q", *values))


def snapshot(state: State) -> bytes:
    """The state as bytes that :func:`restore` turns back; they prove their own completeness."""
    data = encode_state(state)
    return data + xxhash.xxh3_128_digest(data)


def restore(data: bytes, *, expect_sound: bool = True) -> State:
    """The state of a snapshot. Without ``expect_sound`` also one that breaks invariants, for those who look into it.

    Raises:
        SnapshotError: the bytes are damaged, cut off, of another version, or not the canonical encoding of a sound
            state. A digest proves that nothing happened to the bytes, not that they were ever a state: so this also
            encodes the state again and checks its invariants (together four times as long as reading it).
    """
    body = data[:-16]
    if len(data) < 16 or xxhash.xxh3_128_digest(body) != data[-16:]:
        raise SnapshotError("the snapshot is damaged or cut off: its digest does not match")
    try:
        state = _Reader(body).state()
        if encode_state(state) != body:
            raise ValueError("the bytes are not the canonical ones of their state")
        broken = check(state) if expect_sound else []
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, OverflowError, AssertionError) as error:
        raise SnapshotError(f"not a snapshot of this version: {error}") from error
    if broken:
        raise SnapshotError(f"the snapshot is of a broken state: {'; '.join(broken[:5])}")
    return state


def _scalars(state: State) -> tuple[int, ...]:
    return (
        state.device.pool.capacity,
        state.host.pool.capacity,
        state.host.limit,
        state.device.evictable,
        state.host.resident,
        state.next_node,
        state.next_request,
        state.next_transfer,
        state.generation,
        state.epoch,
        state.policy,
        len(state.workers),
        len(state.retired),
    )


def encode_state(state: State) -> bytes:
    """The canonical bytes."""
    writer = _Writer(state)
    writer.head(state)
    writer.tree(state)
    writer.requests(state)
    writer.transfers(state)
    return b"".join(writer.out)


class _Writer:
    """Puts canonical bytes together."""

    def __init__(self, state: State) -> None:
        self.out: list[bytes] = [MAGIC]
        self._put = self.out.append
        self._roots = [*(state.roots[namespace] for namespace in sorted(state.roots)), *state.retired]
        self._root_index = {id(root): index for index, root in enumerate(self._roots)}

    def _blob(self, data: bytes) -> None:
        self._put(_U32.pack(len(data)))
        self._put(data)

    def _index(self, node: Node) -> int:
        """Which root it is; 0 for a run."""
        return 0 if node.id else self._root_index[id(node)]

    def head(self, state: State) -> None:
        """Genesis, totals and free lists."""
        blob, put = self._blob, self._put
        _, _, args, payload = codec.encode(state.opened)
        blob(args.ljust(codec.ARGS_BYTES, b"\0"))
        blob(payload)
        put(_SCALARS.pack(*_scalars(state)))
        blob(state.pools.encode())
        blob(state.weights.encode())
        for rank, incarnation in sorted(state.workers.items()):
            put(struct.pack("<II", rank, incarnation))
        totals = state.counters.as_dict()
        put(struct.pack(f"<{len(totals)}Q", *totals.values()))
        for place in (*state.places, *state.sides):
            blob(place.pool.free.tobytes())

    def tree(self, state: State) -> None:
        """Roots, runs and eviction orders."""
        blob, put = self._blob, self._put
        roots = self._roots
        put(_U32.pack(len(roots)))
        for root in roots:
            put(_U32.pack(root.pins))
            blob(root.words)
        put(_U32.pack(len(state.nodes)))
        for number in sorted(state.nodes):
            node = state.nodes[number]
            parent = node.parent
            assert parent is not None
            put(
                _NODE.pack(
                    number,
                    parent.id,
                    self._index(parent),
                    node.start,
                    node.size,
                    node.pins,
                    _AHEAD if node.uncomputed else _copy_state(node.device),
                    _copy_state(node.host) + (_DISTRUSTED if node.distrusted else 0),
                    node.transfer.id if node.transfer is not None else 0,
                    node.hits,
                )
            )
            blob(node.words)
            blob(all_records(node.items))
            for copy in node.copies:
                if copy is not None:
                    put(copy.ids.tobytes())
        for order in _orders(state):
            blob(array("Q", [node.id for node in order]).tobytes())

    def requests(self, state: State) -> None:
        """Live requests."""
        blob, put = self._blob, self._put
        put(_U32.pack(len(state.requests)))
        for number in sorted(state.requests):
            request = state.requests[number]
            leaf = request.leaf
            put(struct.pack("<QQIII", number, leaf.id, self._index(leaf), request.matched, request.computed))
            blob(request.request_id.encode())
            blob(request.namespace)
            blob(request.words)
            blob(all_records(request.items))
            blob(request.table.tobytes())
            # Where copies were replaced, the end of a range stands before its beginning: before that could happen, a
            # state had the same bytes, and digests in older logs can still be compared.
            turned = [(stop, start) for start, stop in request.replaced_ranges]
            for ranges in (request.duplicate_ranges, request.joined_ranges + turned):
                blob(array("I", [bound for pair in ranges for bound in pair]).tobytes())
            blob(array("Q", [value for pair in request.waits_for.items() for value in pair]).tobytes())
            for side in request.sides:
                put(struct.pack("<II", side.begin, side.settled))
                blob(side.table.tobytes())

    def transfers(self, state: State) -> None:
        """Transfers in flight, and quarantined ones."""
        blob, put = self._blob, self._put
        put(_U32.pack(len(state.transfers)))
        for number in sorted(state.transfers):
            transfer = state.transfers[number]
            pinned = transfer.leaf
            put(
                struct.pack(
                    "<QBBQI",
                    number,
                    transfer.direction,
                    transfer.quarantined | (2 if pinned is not None else 0),
                    pinned.id if pinned is not None else 0,
                    self._index(pinned) if pinned is not None else 0,
                )
            )
            for part in transfer.parts:
                put(struct.pack("<BQIB", 1, part.node.id if part.node is not None else 0, part.size, part.discard))
            put(b"\0")
            for ids in (transfer.sources, transfer.targets, transfer.waits_for):
                blob(ids.tobytes())
            for place in state.places:
                blob(transfer.held_in(place.number).tobytes())
            blob(array("Q", transfer.waiters).tobytes())


def _copy_state(copy: Copy | None) -> int:
    return _NO_COPY if copy is None else _READY if copy.ready else _ARRIVING


def _orders(state: State) -> list[EvictionOrder]:
    return [order for place in state.places for order in place.orders]


class _Reader:
    """Walks over canonical bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) != count:
            raise ValueError("cut off")
        self._at += count
        return data

    def _unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(4))[0])

    def _blob(self) -> bytes:
        return self._take(self._u32())

    def _array(self, code: str) -> IntArray:
        return array(code, self._blob())

    def state(self) -> State:
        """Rebuild everything."""
        if self._take(len(MAGIC)) != MAGIC:
            raise ValueError("wrong magic")
        opened = codec.decode(KIND_OF[LedgerOpened], 0, self._blob(), self._blob())
        assert isinstance(opened, LedgerOpened)
        wrong = impossible(opened)
        if wrong:
            raise ValueError(wrong)
        state = State(opened._replace(device_blocks=0, host_blocks=0, host_staging_blocks=0, groups=""))
        state.opened = opened
        blocks = sum(group.blocks for group in parse(opened.groups))
        # Every block of a pool stands somewhere in the encoding, so nobody can claim pools larger than it.
        if 4 * blocks > len(self._data):
            raise ValueError("there are fewer block ids than blocks")
        state.open_groups(opened.groups)
        device, host = state.device, state.host
        host.staging = opened.host_staging_blocks
        scalars = _SCALARS.unpack(self._take(_SCALARS.size))
        (
            device.pool.capacity,
            host.pool.capacity,
            host.limit,
            device.evictable,
            host.resident,
            state.next_node,
            state.next_request,
            state.next_transfer,
            state.generation,
            state.epoch,
            policy,
            workers,
            retired,
        ) = scalars
        device.limit = device.pool.capacity
        state.policy = HostPolicy(policy)
        state.pools = self._blob().decode()
        state.weights = self._blob().decode()
        if 4 * max(device.pool.capacity, host.pool.capacity) > len(self._data):
            raise ValueError("there are fewer block ids than blocks")
        for _ in range(workers):
            rank, incarnation = self._unpack("<II")
            state.workers[rank] = incarnation
        names = COUNTERS
        for name, value in zip(names, self._unpack(f"<{len(names)}Q"), strict=True):
            setattr(state.counters, name, value)
        for place in (*state.places, *state.sides):
            place.pool.free = self._array("i")
        roots = self._roots(state, retired)
        self._nodes(state, roots)
        for order in _orders(state):
            self._order(state, order)
        # told by what lives there; the encoding has them of the one tier where they are worth comparing
        device.resident = sum(node.size for node in state.nodes.values() if node.device is not None)
        host.evictable = sum(node.size for node in host.lru)
        self._requests(state, roots)
        self._transfers(state, roots)
        if self._at != len(self._data):
            raise ValueError("bytes left over")
        newest = max(state.nodes, default=0), max(state.requests, default=0), max(state.transfers, default=0)
        if any(used >= new for used, new in zip(newest, (state.next_node, state.next_request, state.next_transfer))):
            raise ValueError("an id is in use that is yet to be given")
        return state

    def _roots(self, state: State, retired: int) -> list[Node]:
        roots = []
        for _ in range(self._u32()):
            pins = self._u32()
            root = Node(0, None, 0, self._blob(), 0)
            root.pins = pins
            roots.append(root)
        living = len(roots) - retired
        state.roots = {root.words: root for root in roots[:living]}
        state.retired = dict.fromkeys(roots[living:])
        return roots

    def _nodes(self, state: State, roots: list[Node]) -> None:
        links: list[tuple[Node, int, int]] = []
        self._in_transfer: dict[int, list[Node]] = {}
        for _ in range(self._u32()):
            number, parent, root, start, size, pins, device, host, transfer, hits = _NODE.unpack(self._take(_NODE.size))
            node = Node(number, None, start, self._blob(), size)
            node.items = by_block(self._blob(), state.opened.block_size)
            node.pins, node.hits = pins, hits
            node.uncomputed = device == _AHEAD
            if host >= _DISTRUSTED:
                node.distrusted = True
                host -= _DISTRUSTED
            for place, copy in enumerate((device, host)):
                if copy:
                    node.copies[place] = Copy(array("i", self._take(4 * size)), copy >= _READY)
            if transfer:
                self._in_transfer.setdefault(transfer, []).append(node)
            state.nodes[number] = node
            links.append((node, parent, root))
        for node, parent, root in links:
            above = node.parent = state.nodes[parent] if parent else roots[root]
            if node.start != above.end or not node.size:  # so that no run can be its own ancestor
                raise ValueError(f"run {node.id} does not begin where its parent ends")
            if above.children is NO_CHILDREN:
                above.children = {}
            above.children[node.key(state.block_bytes)] = node

    def _order(self, state: State, order: EvictionOrder) -> None:
        for number in self._array("Q"):
            order.append(state.nodes[number])

    def _requests(self, state: State, roots: list[Node]) -> None:
        for _ in range(self._u32()):
            number, leaf, root, matched, computed = self._unpack("<QQIII")
            request_id = self._blob().decode()
            node = state.nodes[leaf] if leaf else roots[root]
            request = Request(number, request_id, self._blob(), node, self._blob())
            request.items = by_block(self._blob(), state.opened.block_size)
            request.matched = matched
            request.table = self._array("i")
            request.duplicate_ranges = list(_pairs(self._array("I")))
            for start, stop in _pairs(self._array("I")):
                if start < stop:
                    request.joined_ranges.append((start, stop))
                else:
                    request.replaced_ranges.append((stop, start))
            if any(not 0 <= start < stop <= len(request.table) for start, stop in request.duplicate_ranges):
                raise ValueError(f"request {number} has duplicates outside its block table")
            request.waits_for = dict(_pairs(self._array("Q")))
            request.computed = computed
            request.sides = [self._side() for _ in state.groups] or NO_SIDES
            state.requests[number] = request
            if request.duplicate_ranges:
                state.duplicating[number] = request
            state.numbers[request_id] = number

    def _side(self) -> Side:
        side = Side()
        side.begin, side.settled = self._unpack("<II")
        side.table = self._array("i")
        return side

    def _transfers(self, state: State, roots: list[Node]) -> None:
        for _ in range(self._u32()):
            number, direction, flags, leaf, root = self._unpack("<QBBQI")
            parts = []
            while self._take(1) == b"\1":
                node, size, discard = self._unpack("<QIB")
                parts.append(Part(state.nodes[node] if node else None, size, bool(discard)))
            sources, targets, after = self._array("i"), self._array("i"), self._array("Q")
            source, target = state.route(Direction(direction))
            route = source.number, target.number
            transfer = Transfer(number, Direction(direction), route, parts, sources, targets, after)
            for place in state.places:
                transfer.held_in(place.number).extend(self._array("i"))
            transfer.waiters = dict.fromkeys(self._array("Q"))
            transfer.quarantined = bool(flags & 1)
            if flags & 2:
                transfer.leaf = state.nodes[leaf] if leaf else roots[root]
            for member in self._in_transfer.get(number, []):
                member.transfer = transfer
            state.transfers[number] = transfer


def _pairs(values: Iterable[int]) -> Iterable[tuple[int, int]]:
    iterator = iter(values)
    return zip(iterator, iterator, strict=True)
