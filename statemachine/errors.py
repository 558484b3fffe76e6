"""Errors of the state machine, by who is at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statemachine.events import AllocationRefused


class CommandRejected(ValueError):
    """The caller asked for something impossible; nothing changed. The message says what to do."""


class InvalidCommand(CommandRejected):
    """A value of a command has the wrong type, sign or size."""


class UnknownRequest(CommandRejected):
    """No request of that name is live: it was never matched, or it was released."""


class DuplicateRequest(CommandRejected):
    """A request of that name is live already."""


class RequestNotReady(CommandRejected):
    """The request still waits for transfers that touch the blocks in question."""


class UnknownTransfer(CommandRejected):
    """No transfer of that number is in flight."""


class OutOfOrder(CommandRejected):
    """A transfer cannot finish before the one that brings the blocks in front of it."""


class Busy(CommandRejected):
    """Requests or transfers are using what the command wants to take away."""


class OutOfBlocks(CommandRejected):
    """Not enough blocks are free or evictable.

    ``request_id`` is the request that does not fit (of several the first; empty: none is meant). ``wanted`` and
    ``available`` count device blocks of the layer ``group``; ``in_transfer`` of the missing ones will come back by
    themselves when transfers in flight have ended (poll and try again). ``reserved`` are available, too, but kept for
    requests that run already. ``never_fits``: not even an empty pool would do. ``fitting``: of several ``requests``, so
    many in order would fit. ``event`` is the record of the refusal.
    """

    def __init__(
        self,
        event: AllocationRefused,
        in_transfer: int,
        *,
        fitting: int = 0,
        requests: int = 1,
        reserved: int = 0,
        never_fits: bool = False,
    ) -> None:
        self.event = event
        self.request_id = event.key
        self.wanted = event.wanted
        self.available = event.available
        self.group = event.group
        self.in_transfer = in_transfer
        self.fitting = fitting
        self.reserved = reserved
        self.never_fits = never_fits
        what = f"blocks of layer group {event.group}" if event.group else "device blocks"
        text = f"{event.wanted} {what} wanted, {event.available} free or evictable"
        if reserved:
            text += f" beyond the {reserved} that are kept for requests that run (watermark_blocks)"
        if in_transfer:
            text += f", {in_transfer} more in transfer"
        if requests > 1:
            text += f"; {fitting} of the {requests} requests would fit, request {event.key!r:.80} does not"
        if never_fits:
            hint = f"the pool is too small for request {event.key!r:.80}: refuse the request, or make the pool larger"
            if event.group:
                hint += ", or admit it in chunks (new_tokens)"
        else:
            hint = "poll() and try again" if in_transfer else "release or preempt a request, or make the pool larger"
        super().__init__(f"{text}: {hint}")


class InvariantViolation(AssertionError):
    """An event contradicts the state: always a defect of kvledger, or a damaged log."""


class Contradiction(InvariantViolation):
    """An event of a log does not fit the state before it, or leaves a state that is not sound.

    ``sequence`` is its number.
    """

    def __init__(self, sequence: int, message: str) -> None:
        self.sequence = sequence
        super().__init__(message)


class Diverged(Contradiction):
    """The replay has another state than the engine had."""
