"""``decide(state, command)``: which events a command comes to. Reads the state, never writes it; all policy is here.

The events of one command are one transaction. An impossible or invalid command raises a typed error.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from statemachine.apply.transfers import needs_cut
from statemachine.commands import (
    Admit,
    Allocate,
    Backup,
    Cache,
    Command,
    EndQuarantine,
    FinishTransfer,
    Match,
    Reassign,
    Release,
    Trim,
)
from statemachine.decide.backup import back_up
from statemachine.decide.chunks import CHUNKS, mark_computed
from statemachine.decide.eviction import Supply, device_supply
from statemachine.decide.upkeep import UPKEEP
from statemachine.errors import (
    CommandRejected,
    DuplicateRequest,
    InvalidCommand,
    OutOfBlocks,
    OutOfOrder,
    RequestNotReady,
    UnknownRequest,
    UnknownTransfer,
)
from statemachine.events import (
    DEVICE,
    DONE,
    SWAP_IN,
    AllocationRefused,
    BlocksAllocated,
    BlocksCached,
    BlocksReassigned,
    BlocksTrimmed,
    Event,
    HostPolicy,
    IntArray,
    QuarantineEnded,
    RequestMatched,
    RequestReleased,
    TransferFinished,
    TransferStarted,
)
from statemachine.state import tree
from statemachine.state.nodes import ALL, Node, Request, Transfer
from statemachine.state.ownership import transfer_blocks
from statemachine.state.state import State

_NONE: IntArray = array("Q")
_NO_COUNTS: IntArray = array("I")
_MUCH_LONGER: Final = 8
_LONG_BYTES: Final = 1 << 16
"""A run does not absorb one of more content words than that, and so many times its own blocks: copying them costs more
than another run in every path. So a turn of a long conversation is not paid with a copy of all that was said."""


def decide(state: State, command: Command) -> list[Event]:
    """The events of a command.

    Raises:
        CommandRejected: the command is impossible or invalid; the class says why, the message what to do.
    """
    return _DECIDERS[type(command)](state, command)


def peek(
    state: State, words: memoryview, namespace: bytes, limit: int, whole: tuple[tuple[int, int], ...] = ()
) -> tuple[int, int]:
    """How many leading blocks a match would find now: (with a place on the device, after those on the host)."""
    path = _find(state, words, namespace, limit, whole)
    return path.device, path.host


def request_named(state: State, key: Any) -> Request:
    """The live request of that name, a text: whatever a caller passes is looked at here."""
    try:
        id = state.keys.get(key)
    except TypeError:
        raise InvalidCommand(f"the name of a request is a text, not {type(key).__name__}") from None
    if id is None:
        raise UnknownRequest(f"no live request {key!r}: it was never admitted, or it was released")
    return state.requests[id]


def transfer_numbered(state: State, id: int) -> Transfer:
    """The transfer of that number."""
    transfer = state.transfers.get(id)
    if transfer is None:
        raise UnknownTransfer(f"no transfer {id} is in flight; it has ended, or it never began")
    return transfer


def available_blocks(state: State) -> int:
    """Device blocks that are free, or that can be evicted."""
    return len(state.device.free) + state.evictable


def can_allocate(state: State, blocks: int) -> bool:
    """Whether an allocation of so many blocks would succeed now. Nothing is evicted."""
    if blocks <= len(state.device.free) or blocks > available_blocks(state) or state.policy == HostPolicy.OFF:
        return blocks <= available_blocks(state)
    return device_supply(state, blocks) is not None  # transfers in flight may be in the way of an eviction


def victims_for(state: State, blocks: int, candidates: Sequence[str]) -> list[str]:
    """How many of the candidates, in order, have to be preempted until so many blocks can be allocated.

    Raises:
        OutOfBlocks: all of them would not be enough.
        UnknownRequest
    """
    available = available_blocks(state)
    chosen: list[str] = []
    freed = 0
    pins: Counter[int] = Counter()
    for key in dict.fromkeys(candidates):
        if blocks <= available + freed and (chosen or can_allocate(state, blocks)):
            return chosen
        request = request_named(state, key)
        chosen.append(key)
        freed += len(request.private())
        node = request.leaf
        while node.parent is not None:
            pins[node.id] += 1
            if pins[node.id] == node.pins and node.device is not None:
                freed += node.size
            node = node.parent
    if blocks > available + freed:
        raise out_of_blocks(state, AllocationRefused(0, blocks, available + freed, 0, 0, ""), blocks)
    return chosen


def out_of_blocks(
    state: State, event: AllocationRefused, blocks: int, *, fitting: int = 0, requests: int = 1, reserved: int = 0
) -> OutOfBlocks:
    """The error for a refused allocation; it carries the event that records it.

    Args:
        blocks: so many the longest block table would have had.
        fitting: so many of the ``requests``, in order, would fit.
        reserved: blocks that are available, and kept for those that run already.
    """
    in_transfer = sum(len(transfer_blocks(transfer, DEVICE)) for transfer in state.transfers.values())
    never = blocks > state.device.capacity
    return OutOfBlocks(event, in_transfer, fitting=fitting, requests=requests, reserved=reserved, never_fits=never)


def _admit(state: State, command: Admit) -> list[Event]:
    path = _path(state, command)
    cut, device, host = path.cut, path.device, path.host
    wanted = max(command.blocks - device, host)
    kept, own = _kept(path)
    reserved = command.watermark if state.requests else 0
    available = available_blocks(state) - own - reserved
    supply = None
    if wanted <= available:
        supply = device_supply(state, wanted, kept, host, state.next_node + (1 if cut else 0))
    if supply is None:
        leaf = path.leaf.id if path.leaf is not None else 0
        refused = AllocationRefused(0, wanted, max(min(available, wanted - 1), 0), leaf, path.cut, command.key)
        raise out_of_blocks(state, refused, device + wanted, reserved=reserved)
    events: list[Event] = [_matched(state, command, path), *supply.events]
    if host:
        events.append(_swapped_in(state, path, supply, events))
    count = wanted - host
    if count:
        events.append(_granted(array("Q", [state.next_request]), array("I", [count]), supply, count))
    return events


def _match(state: State, command: Match) -> list[Event]:
    path = _path(state, command)
    if not path.host:
        return [_matched(state, command, path)]
    while True:
        kept, own = _kept(path)
        host = min(path.host, available_blocks(state) - own)
        supply = None
        if host == path.host:
            supply = device_supply(state, host, kept, host, state.next_node + (1 if path.cut else 0))
        if supply is not None:
            events: list[Event] = [_matched(state, command, path), *supply.events]
            if host:
                events.append(_swapped_in(state, path, supply, events))
            return events
        # The device has no room for all of the host part now: match only what fits.
        shorter = path.device + (host if host < path.host else 0)
        path = _find(state, command.words, command.namespace, max(shorter, 0), command.whole)


def _path(state: State, command: Match | Admit) -> tree.Path:
    if not isinstance(command.key, str):
        raise InvalidCommand(f"the name of a request is a text, not {type(command.key).__name__}")
    if command.key in state.keys:
        raise DuplicateRequest(f"request {command.key!r} is live already: release it first, or choose another name")
    if command.whole:
        return _find(state, command.words, command.namespace, command.limit, command.whole)
    return tree.find(state, state.roots.get(command.namespace), command.words, command.limit)


def _find(
    state: State, words: memoryview, namespace: bytes, limit: int, whole: tuple[tuple[int, int], ...]
) -> tree.Path:
    """The path that is known, cut back to before an item in which it would end and must not."""
    root = state.roots.get(namespace)
    path = tree.find(state, root, words, limit)
    if whole:
        size = state.opened.block_size
        found = blocks = path.device + path.host
        for start, stop in sorted(whole, reverse=True):
            if start < blocks * size < stop:
                blocks = start // size
        if blocks < found:
            path = tree.find(state, root, words, blocks)
    return path


def _kept(path: tree.Path) -> tuple[dict[Node, int], int]:
    """The runs of a path with how many of their blocks it pins, and how many evictable blocks that takes away."""
    kept: dict[Node, int] = {}
    own = 0
    node = path.leaf
    count = path.cut or (node.size if node is not None else 0)
    while node is not None and node.parent is not None:
        kept[node] = count
        if not node.pins and node.device is not None:
            own += count
        node = node.parent
        count = node.size
    return kept, own


def _matched(state: State, command: Match | Admit, path: tree.Path) -> RequestMatched:
    key, words, namespace, *_ = command
    cut, device, host = path.cut, path.device, path.host
    leaf = path.leaf.id if path.leaf is not None else 0
    upper = state.next_node if cut else 0
    block_bytes = state.block_bytes
    rest = words[(device + host) * block_bytes : len(words) // block_bytes * block_bytes].tobytes()
    return RequestMatched(state.next_request, leaf, cut, upper, device, host, key, namespace, rest)


def _swapped_in(state: State, path: tree.Path, supply: Supply, events: list[Event]) -> TransferStarted:
    """The swap-in of the host part of a path."""
    nodes, counts, sources = array("Q"), array("I"), array("i")
    node = path.leaf
    assert node is not None
    count = path.cut or node.size
    id = state.next_node if path.cut else node.id
    found: list[tuple[int, IntArray]] = []
    while node is not None and node.device is None and node.parent is not None:
        assert node.host is not None
        found.append((id, node.host[:count]))
        node = node.parent
        count, id = node.size, node.id
    for id, ids in reversed(found):
        nodes.append(id)
        counts.append(len(ids))
        sources.extend(ids)
    targets, after, held = supply.take(len(sources))
    transfer = state.next_transfer + sum(type(event) is TransferStarted for event in events)
    return TransferStarted(transfer, SWAP_IN, state.next_request, 0, nodes, counts, after, held, sources, targets)


def _granted(requests: IntArray, counts: IntArray, supply: Supply, total: int) -> BlocksAllocated:
    blocks, after, held = supply.take(total)
    return BlocksAllocated(requests, counts, after, held, blocks)


def _allocate(state: State, command: Allocate) -> list[Event]:
    keys = state.keys
    try:
        requests = array("Q", [keys[key] for key in command.keys])
    except KeyError as error:
        raise UnknownRequest(f"no live request {error.args[0]!r}: nothing was allocated") from None
    total = sum(command.counts)
    if not total:
        return []
    available = available_blocks(state)
    supply = device_supply(state, total) if total <= available else None
    if supply is None:
        raise _batch_refused(state, command, requests, total, available)
    return [*supply.events, _granted(requests, array("I", command.counts), supply, total)]


def _batch_refused(state: State, command: Allocate, requests: IntArray, total: int, available: int) -> OutOfBlocks:
    """The error for an allocation that does not fit: how many requests would, and the first that does not."""
    sums = [0, *itertools.accumulate(command.counts)]
    fitting, most = 0, bisect.bisect_right(sums, available) - 1
    while fitting < most:  # fewer than are available where copies in flight are in the way
        middle = (fitting + most + 1) // 2
        if can_allocate(state, sums[middle]):
            fitting = middle
        else:
            most = middle - 1
    longest, culprit = 0, fitting
    for index, (id, count) in enumerate(zip(requests, command.counts)):
        length = len(state.requests[id].table) + count
        if length > max(longest, state.device.capacity):
            culprit = index  # one that never fits is meant, wherever it stands
        longest = max(longest, length)
    request = requests[0] if len(requests) == 1 else 0
    refused = AllocationRefused(request, total, min(available, total - 1), 0, 0, command.keys[culprit])
    return out_of_blocks(state, refused, longest, fitting=fitting, requests=len(requests))


def _cache(state: State, command: Cache) -> list[Event]:
    request = request_named(state, command.key)
    block_bytes = state.block_bytes
    start = request.leaf.end
    count = command.blocks - start
    marked: list[Event] = []
    if command.computed is not None or request.computed != ALL:
        marked = mark_computed(request, command)
    if count <= 0 and not command.words:
        return marked
    if command.blocks > len(request.table):
        raise InvalidCommand(
            f"request {command.key!r} has {len(request.table)} blocks, not {command.blocks}: allocate before caching"
        )
    content = request.words + command.words if command.words else request.words
    if len(command.words) % block_bytes or len(content) < count * block_bytes:
        raise InvalidCommand(
            f"the content of {len(content) / block_bytes:g} full blocks after the first {start} of {command.key!r} is "
            f"known, {count} are to be cached: pass the tokens that follow as generated"
        )
    if any(position < command.blocks for position in request.waits.values()):
        raise RequestNotReady(f"request {command.key!r} still waits for transfers {[*request.waits]}: poll() first")
    node, cut, known, duplicates = _follow(request.leaf, memoryview(content), count, block_bytes)
    next_node = state.next_node
    upper = next_node if cut else 0
    new = next_node + bool(cut) if known < count else 0
    own = request.table[start + duplicates : command.blocks]
    leaf = node.id if known else 0
    taken = known - duplicates
    return [*marked, BlocksCached(request.id, leaf, cut, upper, new, duplicates, taken, own, command.words)]


def _follow(node: Node, words: memoryview, count: int, block_bytes: int) -> tuple[Node, int, int, int]:
    """What is known below ``node``: (deepest run, its cut, known blocks, those valid on the device)."""
    offset = cut = 0
    duplicates = 0
    stop = count * block_bytes
    while offset < stop and not cut:
        child = node.children.get(bytes(words[offset : offset + block_bytes]))
        if child is None:
            break
        common = tree.common_blocks(child.words, words[:stop], offset, block_bytes)
        cut = common if common < child.size else 0
        offset += common * block_bytes
        if child.device_ready:
            duplicates += common
        node = child
    return node, cut, offset // block_bytes, duplicates


def _trim(state: State, command: Trim) -> list[Event]:
    request = request_named(state, command.key)
    if not request.leaf.end <= command.blocks <= len(request.table):
        raise InvalidCommand(
            f"request {command.key!r} has {len(request.table)} blocks, the first {request.leaf.end} are cached: "
            f"it cannot be trimmed to {command.blocks}"
        )
    blocks = request.table[command.blocks :][::-1]
    return [BlocksTrimmed(request.id, blocks)] if blocks else []


def _reassign(state: State, command: Reassign) -> list[Event]:
    source, target = request_named(state, command.key), request_named(state, command.target)
    if source is target:
        raise InvalidCommand("blocks cannot be reassigned to the request that has them")
    if source.waits:
        raise RequestNotReady(f"request {command.key!r} still waits for transfers {[*source.waits]}: poll() first")
    tail = source.table[source.leaf.end :]
    if command.blocks == tail[len(tail) - len(command.blocks) :]:  # the last ones, as they were allocated
        return [BlocksReassigned(source.id, target.id, command.blocks)] if command.blocks else []
    if len(set(command.blocks)) != len(command.blocks) or not set(tail).issuperset(command.blocks):
        wrong = sorted(set(command.blocks) - set(tail))
        raise InvalidCommand(f"blocks {wrong[:8]} are not request {command.key!r}'s own, or named twice")
    return [BlocksReassigned(source.id, target.id, command.blocks)] if command.blocks else []


def _release(state: State, command: Release) -> list[Event]:
    request = request_named(state, command.key)
    loose = tree.loosened(request.leaf)
    final = 0
    if command.final:
        for index, run in enumerate(loose):
            if len(run.children) > (1 if index else 0):
                break
            final += 1
    merged, absorbed = _merges(loose, final) if len(loose) > 1 else (_NONE, _NO_COUNTS)
    blocks = request.private()[::-1]
    return [RequestReleased(request.id, command.reason, final, merged, absorbed, blocks)]


def _merges(loose: list[Node], final: int) -> tuple[IntArray, IntArray]:
    """Which of these runs (deepest first) absorb how many of their ancestors; none across the border of ``final``."""
    merged, absorbed = array("Q"), array("I")
    index = 0
    while index < len(loose):
        stop = index + 1
        size = loose[index].size
        while stop < len(loose) and stop != final and tree.joinable(loose[stop - 1], loose[stop]):
            above = loose[stop]
            if above.size > _MUCH_LONGER * size and len(above.words) > _LONG_BYTES:
                break
            size += above.size
            stop += 1
        if stop - index > 1:
            merged.append(loose[index].id)
            absorbed.append(stop - index - 1)
        index = stop
    return merged, absorbed


def _finish_transfer(state: State, command: FinishTransfer) -> list[Event]:
    transfer = transfer_numbered(state, command.transfer)
    if transfer.quarantined:
        raise UnknownTransfer(f"transfer {transfer.id} has timed out already; end its quarantine instead")
    total = len(transfer.targets)
    if not 0 <= command.valid <= total or (command.outcome == DONE) != (command.valid == total):
        raise InvalidCommand(f"{command.valid} valid blocks of {total} do not go with {command.outcome.name}")
    first = transfer.parts[0].node
    if transfer.direction == SWAP_IN and command.valid and first is not None and first.parent is not None:
        if tree.arriving(first.parent) and first.parent.transfer is not None:
            raise OutOfOrder(
                f"transfer {transfer.id} continues the path of transfer {first.parent.transfer.id}: finish that first"
            )
    upper = state.next_node if needs_cut(transfer, command.valid) else 0
    return [TransferFinished(transfer.id, command.outcome, command.valid, upper)]


def _end_quarantine(state: State, command: EndQuarantine) -> list[Event]:
    transfer = transfer_numbered(state, command.transfer)
    if not transfer.quarantined:
        raise UnknownTransfer(f"transfer {transfer.id} is not quarantined: finish it instead")
    return [QuarantineEnded(transfer.id)]


_DECIDERS: dict[type[Any], Callable[[State, Any], list[Event]]] = {
    Match: _match,
    Admit: _admit,
    Allocate: _allocate,
    Cache: _cache,
    Trim: _trim,
    Reassign: _reassign,
    Release: _release,
    FinishTransfer: _finish_transfer,
    EndQuarantine: _end_quarantine,
    Backup: back_up,
    **CHUNKS,
    **UPKEEP,
}

__all__ = ["CommandRejected", "available_blocks", "can_allocate", "decide", "peek", "request_named", "victims_for"]
