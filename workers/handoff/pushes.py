"""Pushes: what a prefill instance orders its pushers to send to a decode instance, in a log of its own.

The log of pushes belongs to the prefill instance's ledger (``<ledger>.pushes``) and has one writer, its engine. The
pushers follow it to know what to send, the decode instances to know what has arrived. It is no part of the ledger's
own log because nothing in it changes who owns a block: the sources stay the request's, the targets are another
ledger's.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Self

import xxhash

from ipc import Record
from statemachine.events import U8, U32, U64, Blocks, Text
from statemachine.records.codec import CodecError, codec_of

_TEXTS = ("ledger", "pools", "layout", "peer")
_NUMBERS = ("board", "slot", "ticket", "block_size", "first")
_LARGEST = 2**64 - 1


class Address(NamedTuple):
    """Where a request's blocks are to go: what a decode instance tells a prefill instance, over the engines' own wire.

    ``text`` and ``parse`` are for that wire. An address is good for one push.
    """

    ledger: str
    """Of the decode instance."""
    pools: str
    """Ids of its pools, as in :class:`statemachine.events.LedgerOpened`."""
    layout: str
    """Layout of its pools."""
    board: int
    slot: int
    ticket: int
    """See :class:`workers.handoff.tickets.Tickets`: whoever holds the ticket may write, until it is revoked."""
    peer: str
    """Ledger of the prefill instance that it is meant for."""
    block_size: int
    first: int
    """Position of the first of these blocks in the request's block table."""
    blocks: tuple[int, ...]
    """Device block ids of the decode instance, in token order."""

    def text(self) -> str:
        """Write the address as one line of JSON."""
        return json.dumps(self._asdict())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the address that :meth:`text` wrote. Raises ``ValueError``: the text comes from another process."""
        try:
            fields = json.loads(text)
            address = cls(**{**fields, "blocks": tuple(fields["blocks"])})
            whole = [*(getattr(address, name) for name in _NUMBERS), *address.blocks]
            if not all(type(number) is int and 0 <= number <= _LARGEST for number in whole):
                raise ValueError("numbers")
            if not all(type(getattr(address, name)) is str for name in _TEXTS) or not address.blocks:
                raise ValueError("texts")
            if max(address.blocks) >= 1 << 31 or len(set(address.blocks)) != len(address.blocks):
                raise ValueError("blocks")
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"not the address of a decode instance: {text!r:.200}") from error
        return address


class PushStarted(NamedTuple):
    """Every rank is to copy block ``sources[i]`` of its device pool to block ``targets[i]`` of the peer's.

    Layer ``l`` may go once the engine's rank has written ``l + 1`` layers of step ``step`` (0: all is written).
    """

    push: U64
    step: U64
    ticket: U64
    board: U64
    slot: U32
    key: Text
    peer: Text
    """Ledger of the decode instance."""
    layout: Text
    pools: Text
    sources: Blocks
    targets: Blocks


class PushFinished(NamedTuple):
    """A push is over for the prefill instance: its sources may be used otherwise. Only ``DONE`` counts as arrived."""

    push: U64
    ticket: U64
    outcome: U8
    """:class:`statemachine.events.Outcome`."""
    reason: Text


STARTED_KIND, FINISHED_KIND = 1, 2
_encode_started, _decode_started = codec_of(STARTED_KIND, PushStarted)
_encode_finished, _decode_finished = codec_of(FINISHED_KIND, PushFinished)
SCHEMA_HASH = xxhash.xxh3_64_intdigest(repr([event.__annotations__ for event in (PushStarted, PushFinished)]).encode())


def record_of(fact: PushStarted | PushFinished) -> tuple[int, int, bytes, bytes]:
    """Encode a fact as ``(kind, subject, args, payload)`` of a record."""
    return _encode_started(fact) if isinstance(fact, PushStarted) else _encode_finished(fact)


def fact_of(record: Record) -> PushStarted | PushFinished:
    """Decode a record of the log of pushes. Raises :class:`statemachine.records.codec.CodecError`."""
    decode = {STARTED_KIND: _decode_started, FINISHED_KIND: _decode_finished}.get(record.kind)
    try:
        if decode is None:
            raise ValueError(f"kind {record.kind}")
        fact: Any = decode(record.subject, record.args, record.payload)
    except ValueError as error:
        raise CodecError(f"no record of pushes: {error}") from error
    return fact  # type: ignore[no-any-return]


def log_name(ledger: str) -> str:
    """Name of the log of pushes of a prefill instance; its pushers are the workers of this log."""
    return f"{ledger}.pushes"
