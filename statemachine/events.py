"""The one table of events: every fact that can change the state of a KV-block manager.

An event carries the outcome that was decided (these block ids, these runs), never the wish: applying needs no policy.
The annotation of a field says how it travels in a log record (:mod:`statemachine.records.codec`; a first field of 64
bits is the record's *subject*) and what it means. Indexes, histories, tables, redaction and documents follow from that
(:mod:`statemachine.fields`): an event is told once, here. Conventions:

* ``node`` ids name runs of the prefix tree, ``0`` means "none" or the root of a namespace.
* ``cut`` and ``upper``: a run is cut after its first ``cut`` blocks; the upper part gets the new id ``upper``, the
  lower part keeps its id. ``upper == 0`` means that nothing is cut.
* Block ids freed by an event are listed deepest block first, the order in which they are pushed on the free list.
* ``after`` and ``held``: ``held[i]`` of the block ids are still being read by the copy of transfer ``after[i]``; they
  stand at the end of the list, in that order. All the others come from the free list.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, get_args

if TYPE_CHECKING:
    IntArray = array[int]
else:  # array.array is not subscriptable at run time before Python 3.12
    IntArray = array


class Meaning(Enum):
    """What a field stands for, beyond its number or bytes."""

    DEVICE_BLOCKS = "a block id on the device"
    BLOCKS_OF_TIER = "a block id on the tier that the field `tier` names"
    SOURCES = "a block id that is read, on the tier where the `direction` begins"
    TARGETS = "a block id that is written, on the tier where the `direction` ends"
    SIDE_BLOCKS = "a block id in the device pool of the layer group that the field `group` names"
    REQUESTS = "the number of a request"
    RUNS = "the id of a run"
    TRANSFERS = "the number of a transfer"
    REQUEST_NAME = "the engine's own name of a request (private)"
    NAMESPACE = "a namespace, which may hold a salt (private)"
    CONTENT = "content words, what users wrote (private)"
    ITEMS = "which images and sounds begin where, with hashes of them (private)"


U8 = Annotated[int, "B"]
U32 = Annotated[int, "I"]
U64 = Annotated[int, "Q"]
Blocks = Annotated[IntArray, "i"]
"""Block ids, ``array('i')``; in events, one of the next four."""
DeviceBlocks = Annotated[IntArray, "i", Meaning.DEVICE_BLOCKS]
TierBlocks = Annotated[IntArray, "i", Meaning.BLOCKS_OF_TIER]
Sources = Annotated[IntArray, "i", Meaning.SOURCES]
Targets = Annotated[IntArray, "i", Meaning.TARGETS]
SideBlocks = Annotated[IntArray, "i", Meaning.SIDE_BLOCKS]
Counts = Annotated[IntArray, "I"]
RequestId = Annotated[int, "Q", Meaning.REQUESTS]
RequestIds = Annotated[IntArray, "Q", Meaning.REQUESTS]
RunId = Annotated[int, "Q", Meaning.RUNS]
RunIds = Annotated[IntArray, "Q", Meaning.RUNS]
TransferId = Annotated[int, "Q", Meaning.TRANSFERS]
TransferIds = Annotated[IntArray, "Q", Meaning.TRANSFERS]
Words = Annotated[bytes, "bytes", Meaning.CONTENT]
"""Content words: little-endian int32, ``block_size`` of them per block (:mod:`statemachine.content`)."""
Items = Annotated[bytes, "bytes", Meaning.ITEMS]
"""Images and sounds (:mod:`statemachine.items`), by position from the beginning of the prompt."""
Namespace = Annotated[bytes, "bytes", Meaning.NAMESPACE]
Digest = Annotated[bytes, "bytes"]
Text = Annotated[str, "text"]
RequestName = Annotated[str, "text", Meaning.REQUEST_NAME]


class Tier(IntEnum):
    """Where a copy of a block lives."""

    DEVICE = 0
    HOST = 1


class HostPolicy(IntEnum):
    """When a block gets a copy on the host tier."""

    OFF = 0
    """There is no host tier."""
    EXCLUSIVE = 1
    """Write-back: a block is copied out when the device evicts it, and leaves the host when it is swapped in."""
    WRITE_THROUGH = 2
    """A block is copied out once it was used often enough (by default as soon as it is cached); both copies stay."""


class ReleaseReason(IntEnum):
    """Why a request gave its blocks back."""

    FINISHED = 0
    PREEMPTED = 1
    ABORTED = 2
    FAILED = 3
    ENGINE_RESTARTED = 4


class EvictReason(IntEnum):
    """Why a cached copy was given up."""

    CAPACITY = 0
    CLEARED = 1
    RESIZED = 2
    TIER_LOST = 3
    UNTRUSTED = 4
    """Cached by a request that was still running when its engine died."""
    DISTRUSTED = 5
    """It turned out bad (:class:`BlocksDistrusted`), and nobody holds it."""


class Direction(IntEnum):
    """What a transfer does."""

    SWAP_OUT = 0
    """Device to host; the run has left the device tier."""
    SWAP_IN = 1
    """Host to device, for the requests that wait."""
    BACKUP = 2
    """Device to host; the run stays on the device (write-through)."""


class Outcome(IntEnum):
    """How a transfer ended."""

    DONE = 0
    FAILED = 1
    CORRUPT = 2
    """A checksum of the host copy failed: what is not valid is dropped with everything below it."""
    TIMED_OUT = 3
    """Some rank has not answered: the blocks it may still write stay quarantined."""


class DigestScope(IntEnum):
    """What a digest covers."""

    COUNTERS = 0
    STATE = 1


DEVICE: Final = Tier.DEVICE
HOST: Final = Tier.HOST
EXCLUSIVE: Final = HostPolicy.EXCLUSIVE
WRITE_THROUGH: Final = HostPolicy.WRITE_THROUGH
CAPACITY: Final = EvictReason.CAPACITY
SWAP_OUT: Final = Direction.SWAP_OUT
SWAP_IN: Final = Direction.SWAP_IN
BACKUP: Final = Direction.BACKUP
DONE: Final = Outcome.DONE
"""What every step asks for: before Python 3.12, looking a member up in its enumeration takes 75 ns."""
ROUTES: dict[Direction, tuple[Tier, Tier]] = {SWAP_OUT: (DEVICE, HOST), SWAP_IN: (HOST, DEVICE), BACKUP: (DEVICE, HOST)}
"""Direction → the tier that is read, the tier that is written."""


class LedgerOpened(NamedTuple):
    """Genesis: sizes, layout and policies. Always the first event of a ledger."""

    block_size: U32
    device_blocks: U32
    host_blocks: U32
    host_staging_blocks: U32
    host_policy: Annotated[int, "B", HostPolicy]
    ranks: U32
    layout: Text
    pools: Text
    backup_after: U32 = 1
    """Write-through: the so-manieth use of a block backs it up; caching it is the first."""
    chunked_multimodal: U8 = 1
    """Whether the model can begin inside a multimodal item; 0: nothing that matches ends inside one."""
    weights: Text = ""
    """Version of the model's weights at first."""
    groups: Text = ""
    """Layer groups beside group 0, a line each (:meth:`statemachine.state.groups.Group.text`)."""


class RequestMatched(NamedTuple):
    """A request begins: the path that is already cached is pinned.

    ``key`` is the engine's own name of the request; ``device_blocks`` of the path have a place on the device,
    the next ``host_blocks`` are on the host only; ``words`` are the content of the full blocks after the path, and
    ``items`` those of the whole prompt.
    """

    request: RequestId
    leaf: RunId
    cut: U32
    upper: RunId
    device_blocks: U32
    host_blocks: U32
    key: RequestName
    namespace: Namespace
    items: Items
    words: Words


class BlocksAllocated(NamedTuple):
    """Free blocks become private to requests, ``counts[i]`` of them to ``requests[i]``, in order."""

    requests: RequestIds
    counts: Counts
    after: TransferIds
    held: Counts
    blocks: DeviceBlocks


class AllocationRefused(NamedTuple):
    """There was no room. Changes nothing; operators ask why.

    ``request`` is 0 where an admission was refused, or several requests at once (``key`` is then the first that did not
    fit, before the log had this rule the first of all). An admission would have pinned the path to ``leaf`` (its first
    ``cut`` blocks, if that is not 0). ``wanted`` and ``available`` are blocks of the layer ``group``.
    """

    request: RequestId
    wanted: U32
    available: U32
    leaf: RunId
    cut: U32
    key: RequestName
    group: U32 = 0


class BlocksCached(NamedTuple):
    """Full, computed blocks of a request are published in the prefix tree.

    Follows the request's words from the end of its path: ``duplicates`` blocks have a valid device copy already (they
    are pinned, the request's own copies stay private, or the runs take them: :class:`CopiesReplaced`), ``taken`` blocks
    are known but not valid on the device (the runs take the request's blocks), and what is left becomes the new run
    ``node``. ``leaf`` is the deepest run that existed. ``words`` is the content of generated blocks, appended to what
    the request brought along; ``items`` begin in what is appended, or in the incomplete block before it.
    """

    request: RequestId
    leaf: RunId
    cut: U32
    upper: RunId
    node: RunId
    duplicates: U32
    taken: U32
    blocks: DeviceBlocks
    items: Items
    words: Words


class RequestExtended(NamedTuple):
    """Between two chunks: a request's path goes on along what others have cached meanwhile, down to run ``leaf``.

    Its block table uses the blocks of these runs from here on, ``device_blocks`` more than before; its own copies of
    the path are given back (``blocks``). ``leaf == 0``: nothing more was cached, only copies are given back.
    """

    request: RequestId
    leaf: RunId
    cut: U32
    upper: RunId
    device_blocks: U32
    blocks: DeviceBlocks


class CopiesReplaced(NamedTuple):
    """Runs of a request's path take the request's own copies (``blocks``), which it has computed once more.

    Nobody else used the blocks that these runs had before (``freed``). Ends the transaction in which that came about.
    """

    request: RequestId
    nodes: RunIds
    blocks: DeviceBlocks
    freed: DeviceBlocks


class BlocksChosen(NamedTuple):
    """These free blocks are granted next, the first one first: an engine whose own manager is recorded chose them."""

    blocks: DeviceBlocks


class EngineDeparted(NamedTuple):
    """An engine that is recorded did ``what`` this ledger would not have done, for ``key``. Changes nothing."""

    request: RequestId
    key: RequestName
    what: Text


class BlocksComputed(NamedTuple):
    """The first ``blocks`` blocks of a request are computed; what it caches beyond, it caches ahead of its step."""

    request: RequestId
    blocks: U32


class BlocksDistrusted(NamedTuple):
    """What is cached from a run on a request's path on turned out bad: with all below it never matches again.

    Who holds some of it goes on reading it, and what they cache below never matches either. ``cut``: the first so many
    blocks of the run are good, and become run ``upper``.
    """

    request: RequestId
    node: RunId
    cut: U32
    upper: RunId


class BlocksReassigned(NamedTuple):
    """Private blocks move from one request to the end of another's block table."""

    request: RequestId
    target: RequestId
    blocks: DeviceBlocks


class BlocksTrimmed(NamedTuple):
    """Private blocks are given back: the end of a block table (a rejected speculation, an undone chunk), or others."""

    request: RequestId
    blocks: DeviceBlocks


class RequestReleased(NamedTuple):
    """A request ends: its path is unpinned and its private blocks are freed.

    Of the runs that nobody holds any more the deepest ``final`` go to the list that is evicted first. Then each run
    ``merged[i]`` absorbs its ``absorbed[i]`` nearest ancestors.
    """

    request: RequestId
    reason: Annotated[int, "B", ReleaseReason]
    final: U32
    merged: RunIds
    absorbed: Counts
    blocks: DeviceBlocks


class BlocksEvicted(NamedTuple):
    """Cached copies on one tier are given up: the last ``counts[i]`` blocks of run ``nodes[i]``, in eviction order.

    Only the last run may be given up in part; where it keeps a copy on the other tier, it is cut (``upper``).
    """

    tier: Annotated[int, "B", Tier]
    reason: Annotated[int, "B", EvictReason]
    upper: RunId
    nodes: RunIds
    counts: Counts
    blocks: TierBlocks


class TransferStarted(NamedTuple):
    """Copies are ordered: block ``sources[i]`` to block ``targets[i]``, run after run, ancestors first.

    ``counts[i]`` blocks belong to ``nodes[i]``. A swap-out may take only the end of its first run (``upper`` is then
    the part that stays), a back-up only the beginning of its last run (``upper`` is then that part). A swap-in pins its
    path and appends its targets to the block table of ``request``, which waits for it (0 for the other directions).
    Each rank starts only after its own part of the ``after`` transfers.
    """

    transfer: TransferId
    direction: Annotated[int, "B", Direction]
    request: RequestId
    upper: RunId
    nodes: RunIds
    counts: Counts
    after: TransferIds
    held: Counts
    sources: Sources
    targets: Targets


class TransferFinished(NamedTuple):
    """A transfer ended: its first ``valid`` blocks arrived on every rank, nothing after them counts."""

    transfer: TransferId
    outcome: Annotated[int, "B", Outcome]
    valid: U32
    upper: RunId


class QuarantineEnded(NamedTuple):
    """Every rank of a timed-out transfer has answered or is proven dead: its blocks are free."""

    transfer: TransferId


class CacheCleared(NamedTuple):
    """Nothing cached before can match again. What nobody holds was evicted; the rest goes when it is released."""

    generation: U64


class WeightsLoaded(NamedTuple):
    """The model has other weights from here on; what requests match from now on was computed with these."""

    weights: Text


class PoolResized(NamedTuple):
    """A tier has a new number of blocks; the highest ids come or go."""

    tier: Annotated[int, "B", Tier]
    blocks: U32


class TierLost(NamedTuple):
    """Every copy on a tier is gone (its memory died or is not the same any more).

    ``pools`` are the ids of the pools from now on, as in :class:`LedgerOpened`; empty: the host tier is not used again.
    """

    tier: Annotated[int, "B", Tier]
    reason: Text
    pools: Text


class WorkerJoined(NamedTuple):
    """A transfer worker runs the transfers started or re-issued from here on."""

    rank: U32
    incarnation: U32
    pid: U32


class WorkerLost(NamedTuple):
    """A transfer worker died or was given up."""

    rank: U32
    incarnation: U32
    reason: Text


class EpochStarted(NamedTuple):
    """A new engine process took over; everything up to ``last_sequence`` counts."""

    epoch: U64
    last_sequence: U64


class DigestTaken(NamedTuple):
    """The state had this digest after event ``sequence``; any replay can prove that it agrees."""

    sequence: U64
    scope: Annotated[int, "B", DigestScope]
    digest: Digest


class SideAllocated(NamedTuple):
    """Free blocks of a layer group become private to requests, ``counts[i]`` of them to ``requests[i]``, in order."""

    group: U32
    requests: RequestIds
    counts: Counts
    blocks: SideBlocks


class WindowPassed(NamedTuple):
    """The first ``settled[i]`` tokens of ``requests[i]`` are settled: what its window in a group has left is free.

    Its block table in that group has nothing there from now on. ``blocks`` are freed, request after request.
    """

    group: U32
    requests: RequestIds
    settled: Counts
    blocks: SideBlocks


class SideFreed(NamedTuple):
    """A request's block table in a layer group ends after its first ``length`` entries: what was behind them is free.

    ``length`` is 0 where the request ends.
    """

    request: RequestId
    group: U32
    length: U32
    blocks: SideBlocks


# fmt: off
Event = (
    LedgerOpened | RequestMatched | BlocksAllocated | AllocationRefused | BlocksCached | BlocksReassigned
    | BlocksTrimmed | RequestReleased | BlocksEvicted | TransferStarted | TransferFinished | QuarantineEnded
    | CacheCleared | PoolResized | TierLost | WorkerJoined | WorkerLost | EpochStarted | DigestTaken
    | RequestExtended | BlocksComputed | WeightsLoaded | CopiesReplaced | BlocksDistrusted | SideAllocated
    | WindowPassed | SideFreed | BlocksChosen | EngineDeparted
)
# fmt: on

KINDS: dict[int, type[Event]] = dict(enumerate(get_args(Event), 1))
"""Kind number on the log → event: what is new comes last above, and nothing goes. Numbers are never used twice."""

KIND_OF: dict[type[Event], int] = {event: kind for kind, event in KINDS.items()}


def blocks(ids: Iterable[int] = ()) -> IntArray:
    """Block ids as the array that events carry."""
    return array("i", ids)
