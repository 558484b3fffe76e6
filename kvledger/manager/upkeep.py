"""The cache as a whole: clear, pause and resume, make room, evict, resize."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import SupportsIndex

from ipc import SharedMemoryFull
from kvledger.manager.arguments import (
    expect_bool,
    expect_count,
    expect_group,
    expect_namespace,
    expect_seconds,
    tier_of,
)
from kvledger.manager.execution import Ledger
from kvledger.manager.lifecycle import Beginning
from kvledger.manager.wait import loop
from statemachine import commands
from statemachine.content import namespace_key, versioned
from statemachine.decide import available_blocks, can_allocate
from statemachine.errors import Busy, InvalidCommand
from statemachine.events import BlocksEvicted, HostPolicy, PoolResized, Tier, TransferStarted
from statemachine.state.tree import root_of


class WholeCache(Ledger):
    """What concerns all requests, or none."""

    def __init__(self, name: str, beginning: Beginning) -> None:
        super().__init__(name, beginning)
        self._paused = False

    def _until(self, call: str, done: Callable[[], bool], timeout: float) -> bool:
        """Fold until ``done()``, or so many seconds have passed. Returns whether it is done."""
        self.expect_published(call)

        def folded() -> bool:
            self.fold()
            return done()

        return loop(folded, timeout)

    def clear(self, *, namespace: bytes | None = None, force: bool = False, wait: float = 0.0) -> None:
        """Forget everything cached, or everything of one namespace: an adapter was reloaded, a tenant is gone.

        With ``force`` also while requests run: what they hold can never match again, and is freed when they release it.
        With ``wait``, first give transfers (and releases from other threads) so many seconds to end.

        Args:
            namespace: only this one, as requests name it; ``force`` is for the whole cache.

        Raises:
            Busy: requests or transfers use the cache (or that namespace), and ``force`` is not given.
            ipc.SharedMemoryFull: with ``namespace``, in the middle: what is left still matches; call it again.
        """
        expect_bool("force", force)
        expect_seconds("wait", wait)
        if namespace is not None:
            self._clear_namespace(namespace, force, wait)
            return
        if wait:
            self._until("clear(wait=...)", lambda: not (self._state.requests or self._state.transfers), wait)
        self._execute(commands.Clear(force))
        self._drop_unused()

    def _drop_unused(self, *, distrusted: bool = False) -> None:
        """Give back what was cleared, or turned out bad; what stays matches nothing, and goes when it is wanted."""
        with contextlib.suppress(SharedMemoryFull):
            for tier in (Tier.HOST, Tier.DEVICE):
                while self._execute(commands.Evict(tier, self._evict_step, distrusted=distrusted)):
                    pass

    def _clear_namespace(self, namespace: bytes, force: bool, wait: float) -> None:
        expect_namespace(namespace)
        if force:
            raise InvalidCommand("force clears the whole cache: release the requests of the namespace instead")
        self._expect_owner()
        name = versioned(self._state.weights, namespace)
        if wait:
            self._until("clear(wait=...)", lambda: not self._in_use(name), wait)
        users = self._in_use(name)
        if users:
            raise Busy(f"{users} requests and transfers use namespace {namespace!r:.80}: release and poll first")
        for tier in (Tier.HOST, Tier.DEVICE):
            while self._execute(commands.Evict(tier, self._evict_step, name)):
                pass

    def _in_use(self, namespace: bytes) -> int:
        """How many requests and transfers hold something of a namespace."""
        state = self._state
        root = state.roots.get(namespace)
        held = sum(request.namespace == namespace for request in state.requests.values())
        for transfer in state.transfers.values():
            held += any(part.node is not None and root_of(part.node) is root for part in transfer.parts)
        return held

    def pause(self, timeout: float | None = None) -> None:
        """Hand out nothing more, and wait until no copy is in flight: the device pool is the engine's alone.

        :meth:`match`, :meth:`admit`, :meth:`extend` and :meth:`allocate` raise :class:`Paused` until :meth:`resume`.

        Raises:
            TimeoutError: copies are still in flight (default: after twice the deadline of a transfer); it is paused.
        """
        expect_seconds("timeout", timeout)
        self._expect_owner()
        self.expect_published("pause()")
        self._paused = True
        limit = 2 * self.config.transfer_timeout_s if timeout is None else timeout
        if not self._until("pause()", self._at_rest, limit):
            raise TimeoutError(f"transfers {[*self._state.transfers]}, pushes or receives are still in flight")

    def resume(self, *, weights: str | None = None, force: bool = False) -> None:
        """Go on after :meth:`pause`, with a new version of the model's weights if there is one.

        Blocks of one version never match under another. What requests that still run have computed is of both: with
        ``force`` they may go on, and the whole cache is forgotten, so that nothing of theirs can ever match.

        Raises:
            Busy: requests of the old version still run, and ``force`` is not given. It stays paused.
        """
        expect_bool("force", force)
        namespace_key(weights="" if weights is None else weights)  # refuses what is no text
        self._expect_owner()
        if weights is not None and weights != self._state.weights:
            running = len(self._state.requests)
            if running and not force:
                raise Busy(f"{running} requests run with the old weights: release them, or force")
            self._execute(commands.LoadWeights(weights, clear=running > 0))
            if running:
                self._drop_unused()
        self._paused = False

    def make_room(self, blocks: SupportsIndex) -> int:
        """Get so many more device blocks free ahead of need, or as many as can be, as an allocation would.

        Returns how many. Those that are swapped out for it are free once :meth:`poll` has seen the end of the copy.
        """
        given_up = 0
        for event in self._execute(commands.MakeRoom(expect_count("blocks", blocks))):
            if isinstance(event, BlocksEvicted) and event.tier == Tier.DEVICE:
                given_up += len(event.blocks)
            elif isinstance(event, TransferStarted):
                given_up += len(event.sources)
        return given_up

    def evict(self, tier: Tier | str, blocks: SupportsIndex) -> int:
        """Drop so many unused cached blocks of one tier for good, in eviction order. Returns how many.

        Fewer only where no more can go: what is held or in flight stays, and so does what something that stays hangs
        below (blocks of the other tier, too, where nothing else is above them).
        """
        tier = tier_of(tier)
        events = self._execute(commands.Evict(tier, expect_count("blocks", blocks)))
        return sum(len(event.blocks) for event in events if isinstance(event, BlocksEvicted))

    def forget(self, node: SupportsIndex) -> bool:
        """Drop one unused run that nothing continues, and those above it that lead nowhere else then.

        ``node``: its number in the log and in :attr:`state`. Returns whether it was dropped.
        """
        return bool(self._execute(commands.Forget(expect_count("a run's number", node))))

    def resize(self, tier: Tier | str, blocks: SupportsIndex) -> None:
        """Change the number of blocks of a tier. Shrinking drops what is cached in the highest ids.

        The pools themselves are not moved: with workers a tier can only shrink below its first size and grow back.

        Raises:
            Busy: somebody uses a block that would go.
            ipc.SharedMemoryFull: in the middle of a long way down; what was dropped stays dropped: call it again.
            InvalidCommand
        """
        tier = tier_of(tier)
        wanted = expect_count("blocks", blocks)
        if tier == Tier.HOST and self._state.policy == HostPolicy.OFF:
            raise InvalidCommand("there is no host tier: give a new ledger host_blocks and a host_policy")
        if self.pools:
            most = self.config.device_blocks if tier == Tier.DEVICE else self.config.host_blocks
            if wanted > most:
                raise InvalidCommand(f"the {tier.name} pool has room for {most} blocks, not for {wanted}")
        while not isinstance(self._execute(commands.Resize(tier, wanted, self._evict_step))[-1], PoolResized):
            pass

    def available_blocks(self, group: SupportsIndex = 0) -> int:
        """Device blocks of a layer group that are free or can be evicted."""
        return available_blocks(self._state, expect_group(self._state, group) if group else 0)

    def can_allocate(self, blocks: SupportsIndex, group: SupportsIndex = 0) -> bool:
        """Whether so many blocks of a layer group can be had now; counts what can be evicted, and evicts nothing."""
        return can_allocate(
            self._state, expect_count("blocks", blocks), expect_group(self._state, group) if group else 0
        )
