"""The transport to an instance on the same host: its device pool is shared memory, and is mapped and written here."""

from __future__ import annotations

from ipc import Control, LedgerError
from ipc.fence import make_fence
from ipc.signals import Signals
from statemachine.events import IntArray
from workers.handoff.pushes import PushStarted
from workers.handoff.tickets import CLAIM, Tickets
from workers.handoff.transport import Refused
from workers.pools.layout import PoolLayout
from workers.pools.numpy import NumpyPools, runs


class SharedMemory:
    """The transport between two instances on one host, with device pools in shared memory."""

    def __init__(self, rank: int, sources: NumpyPools, signals: Signals) -> None:
        self._rank = rank
        self._sources = sources
        self._signals = signals

    def attach(self, push: PushStarted) -> MappedPool:
        """See :class:`workers.handoff.transport.Transport`."""
        return MappedPool(self._rank, self._sources, self._signals, push)


class MappedPool:
    """See :class:`workers.handoff.transport.Destination`."""

    def __init__(self, rank: int, sources: NumpyPools, signals: Signals, push: PushStarted) -> None:
        self._sources = sources
        self._claims = signals.words
        self._release, self._acquire = make_fence()
        layout = sources.layout
        self._pieces = [
            [index for index, piece in enumerate(layout.pieces) if piece.layer == layer]
            for layer in range(layout.layers)
        ]
        try:
            self._control = Control.open(push.peer)
            self._tickets = Tickets(push.peer)
            theirs = PoolLayout.parse(push.layout)
            if not same_blocks(layout, theirs):
                raise Refused(f"a block of {push.peer!r} has another shape than one of this instance")
            self._pools = NumpyPools(push.peer, rank, theirs)
        except (LedgerError, ValueError) as error:
            raise Refused(f"the pool of {push.peer!r} cannot be attached: {error}") from error
        if push.pools.split(";")[rank : rank + 1] != [self._pools.id] or self._tickets.id != push.board:
            raise Refused(f"{push.peer!r} is not the instance that gave the address: its pool or its engine is new")
        self._peer = push.peer

    def send(self, push: PushStarted, layer: int) -> None:
        """See :class:`workers.handoff.transport.Destination`."""
        if not self._control.writer_alive():
            raise Refused(f"decode instance {self._peer!r} is gone")
        self._claims[CLAIM] = push.ticket
        try:
            if not self._tickets.stands(push.slot, push.ticket):  # fences between the claim and its look
                raise Refused(f"{self._peer!r} has taken the blocks back")
            for index in self._pieces[layer]:
                _copy(self._sources, self._pools, index, push.sources, push.targets)
        finally:
            self._release()
            self._acquire()
            self._claims[CLAIM] = 0

    def alive(self) -> bool:
        """See :class:`workers.handoff.transport.Destination`."""
        return self._control.writer_alive() and self._control.exists()

    def close(self) -> None:
        """See :class:`workers.handoff.transport.Destination`."""
        self._tickets.close()
        self._control.close()


def same_blocks(one: PoolLayout, other: PoolLayout) -> bool:
    """Whether blocks of two layouts have the same bytes, however many there are of them."""
    shapes = [layout._replace(device_blocks=0, host_blocks=0, backend="") for layout in (one, other)]
    return shapes[0] == shapes[1] and not one.on_gpu and not other.on_gpu


def _copy(sources: NumpyPools, targets: NumpyPools, index: int, from_blocks: IntArray, to_blocks: IntArray) -> None:
    there, here = targets.pieces[index], sources.pieces[index]
    for ids, pool in ((from_blocks, here), (to_blocks, there)):
        if min(ids) < 0 or max(ids) >= len(pool):  # a slice would copy less and say nothing
            raise Refused(f"block ids {min(ids)} to {max(ids)} in a pool of {len(pool)}")
    for source, target, size in runs(from_blocks, to_blocks):
        there[target : target + size] = here[source : source + size]
