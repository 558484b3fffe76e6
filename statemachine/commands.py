"""Commands: what a caller wishes. :func:`statemachine.decide.decide` turns each into events, or rejects it."""

from __future__ import annotations

from typing import NamedTuple

from statemachine.events import DigestScope, IntArray, Outcome, ReleaseReason, Tier


class Match(NamedTuple):
    """Begin a request: pin what is cached of its ``words`` (at most ``limit`` blocks) and swap in the host part."""

    request_id: str
    words: memoryview
    namespace: bytes
    limit: int
    items: bytes = b""
    """Images and sounds in the prompt, see :mod:`statemachine.items`."""


class Admit(NamedTuple):
    """Match, and allocate what is missing to ``blocks`` blocks in all, in one transaction or not at all."""

    request_id: str
    words: memoryview
    namespace: bytes
    limit: int
    blocks: int
    items: bytes = b""
    watermark: int = 0
    """So many blocks have to stay available for requests that run already; nobody runs: 0."""
    new_tokens: int = -1
    """From 0 on: in place of ``blocks``, room for so many tokens behind what matches."""
    must_fit: int = 0
    """Refuse unless a block table of so many blocks would fit, too."""
    static_tokens: int = 0
    """Room for so many tokens in each static layer group."""


class Extend(NamedTuple):
    """Match again, behind what a request has cached: use what others cached meanwhile, up to ``limit`` blocks."""

    request_id: str
    limit: int


class Allocate(NamedTuple):
    """Append ``counts[i]`` free blocks to the block table of ``request_ids[i]``, for all or for none."""

    request_ids: list[str]
    counts: list[int]


class Adopt(NamedTuple):
    """Append exactly these ``blocks`` to a block table, as an engine did whose own manager is recorded.

    They are free, or cached and used by nobody: then what is cached in them is evicted.
    """

    request_id: str
    blocks: IntArray


class Depart(NamedTuple):
    """Note that an engine that is recorded did ``what`` this ledger would not have done, for ``request_id``."""

    request_id: str
    what: str


class Cache(NamedTuple):
    """Publish the first ``blocks`` blocks of a request. ``words``: content of generated blocks; ``items`` in it."""

    request_id: str
    blocks: int
    words: bytes
    computed: int | None = None
    """Only so many of them are computed, the others are cached ahead of their step; ``None``: all are."""
    items: bytes = b""


class Distrust(NamedTuple):
    """What stands on a request's path after its first ``blocks`` blocks is bad: it and all below never match again."""

    request_id: str
    blocks: int


class Settle(NamedTuple):
    """Settle the first ``tokens[i]`` tokens of ``request_ids[i]``, which are computed: free what windows have left."""

    request_ids: list[str]
    tokens: list[int]


class Trim(NamedTuple):
    """Give back all but the first ``blocks`` blocks of a block table."""

    request_id: str
    blocks: int


class GiveBack(NamedTuple):
    """Free these private ``blocks`` of a request, wherever they stand in its block table."""

    request_id: str
    blocks: IntArray


class Reassign(NamedTuple):
    """Move private ``blocks`` to the end of ``target``'s block table."""

    request_id: str
    target: str
    blocks: IntArray


class Release(NamedTuple):
    """End a request. ``final``: nobody is expected to continue it."""

    request_id: str
    reason: ReleaseReason
    final: bool


class FinishTransfer(NamedTuple):
    """All ranks have answered (or are given up): the first ``valid`` blocks arrived everywhere."""

    transfer: int
    outcome: Outcome
    valid: int


class EndQuarantine(NamedTuple):
    """No rank can write the blocks of a timed-out transfer any more."""

    transfer: int


class Backup(NamedTuple):
    """Write-through: copy to the host what of the path that ends at run ``node`` was used often enough."""

    node: int


class MakeRoom(NamedTuple):
    """Get so many more device blocks free ahead of need, by the same choices as an allocation."""

    blocks: int


class Forget(NamedTuple):
    """Drop run ``node``, and those above it that lead nowhere else then, as far as nobody uses them."""

    node: int


class Evict(NamedTuple):
    """Drop up to ``blocks`` unused cached blocks of one tier, in eviction order."""

    tier: Tier
    blocks: int
    namespace: bytes | None = None
    """Only those of this namespace."""
    distrusted: bool = False
    """Only those that turned out bad."""


class Clear(NamedTuple):
    """Forget the prefix tree. Requires that nobody uses it, unless ``force``."""

    force: bool


class LoadWeights(NamedTuple):
    """The model has other weights from here on."""

    weights: str
    clear: bool = False
    """Forget everything cached in the same transaction: requests go on whose KV is partly of the old weights."""


class Resize(NamedTuple):
    """Give a tier another number of blocks; shrinking drops what is cached in the highest ids.

    One transaction drops about ``step`` blocks at most: the command is repeated until a ``PoolResized`` ends it.
    """

    tier: Tier
    blocks: int
    step: int = 1 << 16


class LoseTier(NamedTuple):
    """The memory of a tier is gone. ``pools``: ids of the pools from now on; empty: do without the host tier."""

    tier: Tier
    reason: str
    pools: str


class JoinWorker(NamedTuple):
    """A new incarnation of a rank's transfer worker is ready."""

    rank: int
    incarnation: int
    pid: int


class LoseWorker(NamedTuple):
    """A rank's transfer worker died or was given up."""

    rank: int
    reason: str


class StartEpoch(NamedTuple):
    """A new engine process took over after event ``last_sequence``: end what the dead one had begun."""

    epoch: int
    last_sequence: int


class TakeDigest(NamedTuple):
    """Write the digest of the counters, or of the whole state, into the log."""

    sequence: int
    scope: DigestScope


Command = (
    Match
    | Admit
    | Extend
    | Allocate
    | Adopt
    | Depart
    | Cache
    | Distrust
    | Settle
    | Trim
    | GiveBack
    | Reassign
    | Release
    | FinishTransfer
    | EndQuarantine
    | Backup
    | MakeRoom
    | Forget
    | Evict
    | Clear
    | LoadWeights
    | Resize
    | LoseTier
    | JoinWorker
    | LoseWorker
    | StartEpoch
    | TakeDigest
)
