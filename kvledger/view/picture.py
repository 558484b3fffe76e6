"""A state as a page can draw it: per block what it is and whose, per run, request and transfer one row.

A picture is painted once from a state and then follows it event by event; each step returns what changed, small enough
to send thousands of them to a browser, which plays them forwards and, by what they replace, backwards.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import xxhash

from kvledger.text import printable
from kvledger.view.changes import Changes, changes_of
from statemachine.events import Direction, Event, IntArray, LedgerOpened, Tier
from statemachine.records.replay import step
from statemachine.state.nodes import Copy, Node, Request, Transfer
from statemachine.state.state import State


class Kind(IntEnum):
    """What a block is to its owner."""

    FREE = 0
    PRIVATE = 1
    """Of a request."""
    PINNED = 2
    """Of a run that somebody holds."""
    EVICTABLE = 3
    """Of a run that nobody holds."""
    ARRIVING = 4
    """Of a run; its copy is being written."""
    HELD = 5
    """Of a transfer that still reads or writes it."""
    QUARANTINED = 6
    """Of a transfer that was given up and may still write it."""


Row = list[Any]
Paint = tuple[Tier, IntArray, Kind]
"""Blocks of one owner that look alike."""


class Picture:
    """The picture of a state, which belongs to the picture from now on and moves with it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._kinds = [np.zeros(state.pool(tier).capacity, np.uint8) for tier in Tier]
        self._owners = [np.zeros(state.pool(tier).capacity, np.uint32) for tier in Tier]
        self._rows: list[dict[int, Row]] = [{}, {}, {}]
        self._paints: list[dict[int, list[Paint]]] = [{}, {}, {}]
        for which, ids in enumerate(_everything(state)):
            for id in ids:
                row, paint = self._describe(which, id)
                assert row is not None
                self._rows[which][id] = row
                if paint:
                    self._paints[which][id] = paint
                for tier, blocks, kind in paint:
                    self._kinds[tier][blocks] = kind
                    self._owners[tier][blocks] = id

    def step(self, event: Event) -> dict[str, Any]:
        """Apply the next event.

        Returns:
            ``device`` and ``host``: changed blocks as ``[ids, kinds, owners]``; ``runs``, ``requests`` and
            ``transfers``: changed rows by id, ``None`` for what is gone; ``capacity`` of both tiers if it changed.
            What did not change is left out.

        Raises:
            InvariantViolation: the event contradicts the state; the picture is unchanged.
        """
        before = changes_of(self.state, event)
        if not isinstance(event, LedgerOpened):
            step(self.state, event)
        after = changes_of(self.state, event)
        return self._refresh(Changes(*(old | new for old, new in zip(before, after))))

    def keyframe(self) -> dict[str, Any]:
        """The whole picture: kinds as base64 of uint8, owners as base64 of little-endian uint32, rows by id."""
        pools = {
            tier.name.lower(): {"kinds": _base64(self._kinds[tier]), "owners": _base64(self._owners[tier])}
            for tier in Tier
        }
        return pools | {name: dict(rows) for name, rows in zip(Changes._fields, self._rows)}

    def _refresh(self, changes: Changes) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        state = self.state
        if any(len(self._kinds[tier]) != state.pool(tier).capacity for tier in Tier):
            delta["capacity"] = [state.pool(tier).capacity for tier in Tier]
            for tier in Tier:
                size = state.pool(tier).capacity
                for arrays in (self._kinds, self._owners):
                    old = arrays[tier][:size]
                    arrays[tier] = np.pad(old, (0, size - len(old)))
        wiped: dict[Tier, dict[int, tuple[int, int]]] = {tier: {} for tier in Tier}
        painted: list[tuple[Paint, int]] = []
        for which, (name, ids) in enumerate(zip(Changes._fields, changes)):
            rows, paints = self._rows[which], self._paints[which]
            moved = {}
            for id in sorted(ids):
                row, paint = self._describe(which, id)
                if row != rows.get(id):
                    moved[id] = row
                    if row is None:
                        del rows[id]
                    else:
                        rows[id] = row
                if paint != paints.get(id, []):
                    for tier, blocks, _ in paints.pop(id, ()):
                        self._remember(wiped[tier], tier, blocks)
                    if paint:
                        paints[id] = paint
                    painted += [(part, id) for part in paint]
            if moved:
                delta[name] = moved
        for (tier, blocks, _), _ in painted:
            self._remember(wiped[tier], tier, blocks)
        for tier in Tier:
            gone = list(wiped[tier])
            self._kinds[tier][gone] = Kind.FREE
            self._owners[tier][gone] = 0
        for (tier, blocks, kind), owner in painted:
            self._kinds[tier][blocks] = kind
            self._owners[tier][blocks] = owner
        for tier in Tier:
            if found := self._changes(tier, wiped[tier]):
                delta[tier.name.lower()] = found
        return delta

    def _remember(self, wiped: dict[int, tuple[int, int]], tier: Tier, blocks: IntArray) -> None:
        size = len(self._kinds[tier])
        inside = [block for block in blocks if block < size]
        for block, kind, owner in zip(inside, self._kinds[tier][inside].tolist(), self._owners[tier][inside].tolist()):
            wiped[block] = kind, owner

    def _changes(self, tier: Tier, wiped: dict[int, tuple[int, int]]) -> list[list[int]]:
        ids = sorted(wiped)
        kinds, owners = self._kinds[tier][ids].tolist(), self._owners[tier][ids].tolist()
        rows = [(id, kind, owner) for id, kind, owner in zip(ids, kinds, owners) if wiped[id] != (kind, owner)]
        return [list(column) for column in zip(*rows)]

    def _describe(self, which: int, id: int) -> tuple[Row | None, list[Paint]]:
        state = self.state
        if which == 0:
            node = state.nodes.get(id)
            return (None, []) if node is None else (self._run(node), list(_run_blocks(node)))
        if which == 1:
            request = state.requests.get(id)
            return (None, []) if request is None else _request(request)
        transfer = state.transfers.get(id)
        return (None, []) if transfer is None else _transfer(transfer)

    def _run(self, node: Node) -> Row:
        """Parent (id, or the name of a root), start, blocks, state of the copies, pins, transfer."""
        parent = node.parent
        assert parent is not None
        above: int | str = parent.id
        if parent.parent is None:
            above = _root_name(parent) + (" (cleared)" if parent in self.state.retired else "")
        copies = _copy(node.device) + 3 * _copy(node.host)
        transfer = node.transfer.id if node.transfer is not None else 0
        return [above, node.start, node.size, copies, node.pins, transfer, int(node in self.state.device.final)]


def _everything(state: State) -> Changes:
    return Changes(set(state.nodes), set(state.requests), set(state.transfers))


def _copy(copy: Copy | None) -> int:
    """0: no copy, 1: arriving, 2: there."""
    return 0 if copy is None else 1 + copy.ready


def _root_name(root: Node) -> str:
    """The namespace may hold a secret salt: it is shown as a hash."""
    return "namespace " + xxhash.xxh3_64_hexdigest(root.words)[:8] if root.words else "default namespace"


def _run_blocks(node: Node) -> Iterator[Paint]:
    """Arrays in the state may be changed in place later: copies."""
    at_rest = Kind.PINNED if node.pins else Kind.EVICTABLE
    for tier, copy in zip(Tier, node.copies):
        if copy is not None:
            yield tier, copy.ids[:], at_rest if copy.ready else Kind.ARRIVING


def _request(request: Request) -> tuple[Row, list[Paint]]:
    """Key, leaf (0: the root), blocks of the path, blocks of the table, own blocks, transfers it waits for."""
    private = request.private()
    name = printable(request.request_id)
    row = [name, request.leaf.id, request.leaf.end, len(request.table), len(private), list(request.waits_for)]
    return row, [(Tier.DEVICE, private, Kind.PRIVATE)] if private else []


def _transfer(transfer: Transfer) -> tuple[Row, list[Paint]]:
    """Direction, blocks, quarantined, runs, waiting requests."""
    runs = [part.node.id for part in transfer.parts if part.node is not None]
    name = Direction(transfer.direction).name.lower().replace("_", "-")
    row: Row = [name, len(transfer.targets), int(transfer.quarantined), runs, list(transfer.waiters)]
    kind = Kind.QUARANTINED if transfer.quarantined else Kind.HELD
    blocks = [(tier, transfer.own_blocks(tier), kind) for tier in Tier]
    return row, [part for part in blocks if part[1]]


def _base64(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()
