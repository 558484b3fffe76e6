"""Events and states as plain data, ready for JSON. Content words become lists of token ids."""

from __future__ import annotations

from array import array
from typing import Any

from kvledger.debugger.export.rows import RENAMED
from kvledger.debugger.source.source import Entry
from statemachine.events import Event, Meaning, Tier
from statemachine.fields import FIELDS
from statemachine.items import each
from statemachine.state.nodes import ALL, Node, Request, Transfer
from statemachine.state.order import EvictionOrder
from statemachine.state.state import State


def tokens(words: bytes) -> list[int]:
    """Content words as token ids; negative ones belong to a multimodal item."""
    return array("i", words).tolist()


def _plain(meaning: Meaning | None, value: bytes) -> str | list[Any]:
    if meaning == Meaning.ITEMS:
        return [[offset, length, digest.hex()] for offset, length, digest in each(value)]
    return tokens(value) if meaning == Meaning.CONTENT else value.hex()


def event_fields(event: Event) -> dict[str, Any]:
    """The fields of an event; enumerations by name."""
    fields: dict[str, Any] = {}
    value: Any
    for field, value in zip(FIELDS[type(event)], event, strict=True):
        if field.enum is not None:
            fields[field.name] = field.enum(value).name.lower()
        elif isinstance(value, array):
            fields[field.name] = value.tolist()
        elif isinstance(value, bytes):
            fields[field.name] = _plain(field.meaning, value)
        else:
            fields[field.name] = value
    return fields


def entry_fields(entry: Entry) -> dict[str, Any]:
    """An event with its place in the log. A field named as a part of the place has the name of its export column."""
    place: dict[str, Any] = {
        "sequence": entry.sequence,
        "time_ns": entry.time_ns,
        "step": entry.step,
        "kind": type(entry.event).__name__,
    }
    fields = event_fields(entry.event)
    for name in place.keys() & fields.keys():
        fields[RENAMED[place["kind"], name]] = fields.pop(name)
    return place | fields


def request_fields(request: Request) -> dict[str, Any]:
    """A live request."""
    return {
        "key": request.request_id,
        "number": request.number,
        "namespace": request.namespace.hex(),
        "block_table": request.table.tolist(),
        "cached_blocks": request.leaf.end,
        "computed_blocks": min(request.computed, len(request.table)) if request.computed != ALL else None,
        "leaf": request.leaf.id,
        "private_blocks": request.private().tolist(),
        "waits": {str(transfer): position for transfer, position in request.waits_for.items()},
    }


def node_fields(node: Node) -> dict[str, Any]:
    """A run."""
    return {
        "id": node.id,
        "parent": node.parent.id if node.parent is not None else 0,
        "start": node.start,
        "size": node.size,
        "pins": node.pins,
        "device": node.device.ids.tolist() if node.device is not None else None,
        "device_ready": node.device is not None and node.device.ready,
        "host": node.host.ids.tolist() if node.host is not None else None,
        "host_ready": node.host is not None and node.host.ready,
        "ahead": node.uncomputed,
        "distrusted": node.distrusted,
        "uses": node.hits,
        "transfer": node.transfer.id if node.transfer is not None else 0,
        "children": sorted(child.id for child in node.children.values()),
    }


def transfer_fields(transfer: Transfer) -> dict[str, Any]:
    """A transfer in flight, or quarantined."""
    return {
        "transfer": transfer.id,
        "direction": transfer.direction.name.lower(),
        "quarantined": transfer.quarantined,
        "sources": transfer.sources.tolist(),
        "targets": transfer.targets.tolist(),
        "after": transfer.waits_for.tolist(),
        "waiters": list(transfer.waiters),
    }


def state_fields(state: State) -> dict[str, Any]:
    """A whole state but the content of its blocks. Evictions take runs from the front of each order."""
    return {
        "pools": {
            tier.name.lower(): {
                "blocks": state.pool(tier).capacity,
                "free": state.pool(tier).free.tolist()[::-1],
            }
            for tier in Tier
        },
        "evictable_blocks": state.device.evictable,
        "host_resident_blocks": state.host.resident,
        "counters": state.counters.as_dict(),
        "requests": [request_fields(request) for request in state.requests.values()],
        "transfers": [transfer_fields(transfer) for transfer in state.transfers.values()],
        "runs": [node_fields(node) for node in state.nodes.values()],
        "eviction_order": {
            "final": _ids(state.device.final),
            "device": _ids(state.device.lru),
            "host": _ids(state.host.lru),
        },
        "weights": state.weights,
        "epoch": state.epoch,
        "generation": state.generation,
        "workers": {str(rank): incarnation for rank, incarnation in sorted(state.workers.items())},
    }


def _ids(order: EvictionOrder) -> list[int]:
    return [node.id for node in order]
