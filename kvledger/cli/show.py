"""``kvledger show``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from kvledger.cli.sources import At, Json, Src, in_json, place, reading
from kvledger.cli.terminal import line, output
from kvledger.cli.tiers import TierName
from kvledger.debugger import Source, SourceError
from kvledger.debugger.explain.owners import content, describe, holders, owners_of, short
from kvledger.debugger.explain.wording import DIRECTIONS, count, ids, namespace_name
from kvledger.debugger.export.plain import node_fields, request_fields, state_fields
from kvledger.debugger.source.filters import request_numbers
from kvledger.debugger.source.places import date
from kvledger.text import printable
from statemachine.events import HostPolicy, Tier
from statemachine.records.snapshot import state_digest
from statemachine.state.nodes import Node, Request
from statemachine.state.order import EvictionOrder
from statemachine.state.state import State

_ROWS = 20


def show(
    src: Src = None,
    at: At = None,
    block: Annotated[int | None, typer.Option(min=0, help="Only this block")] = None,
    tier: Annotated[TierName, typer.Option(help="Tier of --block")] = TierName.DEVICE,
    request: Annotated[str | None, typer.Option(help="Only this request: its name, or #NUMBER")] = None,
    node: Annotated[int | None, typer.Option(min=1, help="Only this run")] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="Everything, however long")] = False,
    as_json: Json = False,
) -> None:
    """Show the state after an event: pools, prefix tree, requests, transfers, eviction order."""
    with reading(src) as (source, _):
        if sum(value is not None for value in (block, request, node)) > 1:
            raise SourceError("show one of --block, --request and --node at a time")
        sequence = place(source, at)
        state = source.at(sequence)
        if block is not None:
            told = describe(state, tier.tier, block)
            owners = [short(owner) for owner in owners_of(state, tier.tier, block)]
            _print(source, told, {"block": block, "tier": tier.value, "owners": owners}, as_json)
        elif request is not None:
            number = request_numbers(source, request, sequence)[-1]
            if number not in state.requests:
                raise SourceError(f"request {request!r} is not live after event {sequence}: explain tells its life")
            live = state.requests[number]
            _print(source, list(_request(state, live)), request_fields(live), as_json)
        elif node is not None:
            if node not in state.nodes:
                raise SourceError(f"there is no run {node} after event {sequence}")
            _print(source, list(_node(state, state.nodes[node])), node_fields(state.nodes[node]), as_json)
        elif as_json:
            line(in_json(source, {"sequence": sequence, "digest": state_digest(state).hex(), **state_fields(state)}))
        else:
            moment = next(source.entries(sequence, sequence))
            line(f"after event {sequence}, {date(moment.time_ns)} UTC, step {moment.step}")
            _overview(state, None if all_rows else _ROWS)


def _print(source: Source, lines: list[str], fields: dict[str, Any], as_json: bool) -> None:
    for text in [in_json(source, fields)] if as_json else lines:
        line(text)


def _overview(state: State, rows: int | None) -> None:
    output().print(_pools(state))
    if state.requests:
        table = _table("request", "number", "blocks", "cached", "own", "waits for")
        for request in islice(state.requests.values(), rows):
            waits = ", ".join(f"transfer {id}" for id in request.waits_for)
            own = len(request.private())
            table.add_row(
                request.request_id, *map(str, (request.number, len(request.table), request.leaf.end, own)), waits
            )
        _limited(table, len(state.requests), rows)
    if state.transfers:
        table = _table("transfer", "kind", "blocks", "from → to", "waiting")
        for transfer in islice(state.transfers.values(), rows):
            kind = ("quarantined " if transfer.quarantined else "") + DIRECTIONS[transfer.direction]
            moved = f"{ids(transfer.sources)} → {ids(transfer.targets)}"
            names = ", ".join(state.requests[id].request_id for id in transfer.waiters)
            table.add_row(str(transfer.id), kind, str(len(transfer.targets)), moved, names)
        _limited(table, len(state.transfers), rows)
    left = [len(state.nodes) if rows is None else rows]
    for root in state.all_roots():
        name = namespace_name(root.words) if root.words else "prefix tree"
        if root in state.retired:
            name += ", cleared: matches nothing"
        runs = count(sum(1 for _ in _below(root)), "run")
        tree = Tree(Text.assemble((printable(name), "bold"), f": {runs}"))
        _branches(tree, root, left)
        output().print(tree)
    for title, order, tier in (
        ("evicted first from the device (final)", state.device.final, Tier.DEVICE),
        ("then least recently used on the device", state.device.lru, Tier.DEVICE),
        ("least recently used on the host", state.host.lru, Tier.HOST),
    ):
        if len(order):
            line(_order(title, order, tier, rows))


def _pools(state: State) -> Table:
    table = _table("tier", "blocks", "free", "cached", "evictable", "private", "in transfer")
    cached = {Tier.DEVICE: 0, Tier.HOST: 0}
    for node in state.nodes.values():
        cached[Tier.DEVICE] += node.size * (node.device is not None)
        cached[Tier.HOST] += node.size * (node.host is not None)
    private = {Tier.DEVICE: sum(len(request.private()) for request in state.requests.values()), Tier.HOST: 0}
    for tier in Tier:
        pool = state.pool(tier)
        moving = pool.capacity - len(pool.free) - cached[tier] - private[tier]
        numbers = (pool.capacity, len(pool.free), cached[tier], state.place(tier).evictable, private[tier], moving)
        if pool.capacity or state.policy != HostPolicy.OFF:
            table.add_row(tier.name.lower(), *(f"{number:,}" for number in numbers))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _limited(table: Table, length: int, rows: int | None) -> None:
    output().print(table)
    if rows is not None and length > rows:
        line(f"… and {length - rows:,} more (--all)")


def _below(node: Node) -> Iterator[Node]:
    stack = list(node.children.values())
    while stack:
        run = stack.pop()
        yield run
        stack.extend(run.children.values())


def _branches(tree: Tree, node: Node, left: list[int]) -> None:
    stack = [(tree, child) for child in reversed(node.children.values())]
    while stack:
        branch, run = stack.pop()
        if left[0] <= 0:
            branch.add("… (--all)")
            return
        left[0] -= 1
        below = branch.add(_run(run))
        stack += [(below, child) for child in reversed(run.children.values())]


def _run(run: Node) -> str:
    copies = []
    for tier, copy in zip(Tier, run.copies):
        if copy is not None:
            copies.append(f"{tier.name.lower()} {ids(copy.ids, 4)}" + ("" if copy.ready else " (arriving)"))
    pins = f", {count(run.pins, 'pin')}" if run.pins else ""
    ahead = ", distrusted" if run.distrusted else ", not computed yet" if run.uncomputed else ""
    return f"run {run.id}: {count(run.size, 'block')}{pins}{ahead}, {'; '.join(copies)}"


def _order(title: str, order: EvictionOrder, tier: Tier, rows: int | None) -> str:
    shown = [f"run {node.id} ({node.size})" for node in islice(order, rows)]
    more = f" … and {len(order) - rows:,} more" if rows is not None and len(order) > rows else ""
    return f"{title}: " + ", ".join(shown) + more


def _request(state: State, request: Request) -> Iterator[str]:
    yield f"request {request.request_id!r} (number {request.number}), {namespace_name(request.namespace)}"
    yield f"block table: {ids(request.table, 64) if request.table else 'empty'}"
    for node in state.path(request.leaf):
        yield f"  positions {node.start}..{node.end - 1} are cached: {_run(node)}"
    for start, stop in request.duplicate_ranges:
        yield f"  positions {start}..{stop - 1} are copies of its own of what was cached already"
    own = len(request.table) - request.leaf.end
    if own > 0:
        yield f"  positions from {request.leaf.end} on are its own: {count(own, 'block')}"
    for transfer, position in request.waits_for.items():
        yield f"  nothing from position {position} on may be used before transfer {transfer} ends"


def _node(state: State, node: Node) -> Iterator[str]:
    assert node.parent is not None
    yield _run(node)
    above = f"below run {node.parent.id}" if node.parent.id else f"at the root of {namespace_name(node.parent.words)}"
    yield f"{above}, positions {node.start}..{node.end - 1} of its path"
    if node.children:
        yield f"above runs {ids(sorted(child.id for child in node.children.values()))}"
    names = [repr(request.request_id) for request in holders(state, node)]
    yield f"held by {', '.join(names)}" if names else "held by no request"
    if state.opened.backup_after > 1 and node.host is None:
        yield f"used {count(node.hits, 'time')} of the {state.opened.backup_after} after which it is backed up"
    if node.transfer is not None:
        yield f"in transfer {node.transfer.id}"
    yield f"its last block stands for {content(state, node, node.size - 1)}"
