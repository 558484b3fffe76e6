"""What a manager answers when a request, or an engine, begins."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

from kvledger.manager.ranks import BlockTable, table_text
from statemachine import commands
from statemachine.errors import OutOfBlocks
from statemachine.events import Event

_Manager = TypeVar("_Manager")


class Admission(NamedTuple):
    """What a request got."""

    block_table: BlockTable
    device_blocks: int
    """Leading blocks that were on the device, or on their way there."""
    host_blocks: int
    """Blocks after those that are being swapped in."""
    ready: bool
    """False: nothing may be written or attended before :meth:`CacheManager.poll` reports the request."""
    cached_tokens: int
    """Leading tokens that need not be computed."""
    side_tables: tuple[BlockTable, ...] = ()
    """Block tables of the layer groups beside group 0."""
    replay_tokens: int = 0
    """So many of the cached tokens are computed once more, to fill windows: from ``cached_tokens - replay_tokens`` on.

    What is computed of them goes to the other groups; the blocks of group 0 before ``cached_tokens`` are shared, and
    have it already."""

    @property
    def block_tables(self) -> tuple[BlockTable, ...]:
        """A block table for each layer group, as in :attr:`kvledger.CacheConfig.groups`; -1: nothing is there."""
        return (self.block_table, *self.side_tables)

    @property
    def cached_blocks(self) -> int:
        """Leading blocks that need not be computed."""
        return self.device_blocks + self.host_blocks

    def __repr__(self) -> str:
        where = f"{self.device_blocks} blocks on the device, {self.host_blocks} on the host"
        end = f", {self.replay_tokens} of them replayed" if self.replay_tokens else ""
        end += "" if self.ready else ", not ready"
        return f"<admitted to {table_text(self.block_table)}: {self.cached_tokens} tokens cached ({where}){end}>"


class Prospect(NamedTuple):
    """What an admission would come to; true where it fits. Give it to :meth:`CacheManager.admit` for the tokens."""

    fits: bool
    cached_tokens: int
    """Leading tokens that would not have to be computed."""
    refusal: OutOfBlocks | None
    """Why it does not fit: whether waiting helps (``in_transfer``), or nothing ever will (``never_fits``)."""
    command: commands.Admit
    """What was asked."""
    namespace: bytes
    events: list[Event]
    """What it comes to as long as nothing else happens."""
    rest: bytes
    """Content words behind the last full block of the prompt."""
    sequence: int
    """Number of the next event when it was asked."""

    def __bool__(self) -> bool:
        return self.fits

    def __repr__(self) -> str:
        found = f"{self.cached_tokens} tokens cached"
        return f"<fits: {found}>" if self.fits else f"<does not fit: {found}; {self.refusal}>"


class Started(NamedTuple, Generic[_Manager]):
    """How an engine has started: see :meth:`CacheManager.open_or_create`."""

    manager: _Manager
    warm: bool
    """A dead engine's cache was taken over; ``False``: the ledger is new."""
    reason: str
    """Why it is new, or what did not agree; empty: everything is as it was."""
    dropped_blocks: int
    """Cached blocks that did not fit."""

    def __repr__(self) -> str:
        end = f"; {self.dropped_blocks} blocks did not fit" if self.dropped_blocks else ""
        reason = f" ({self.reason})" if self.reason else ""
        return f"<started {'warm' if self.warm else 'anew'}{reason}{end}: {self.manager!r}>"
