"""Live, read-only views of the ledger's state under FastDeploy's names.

The ledger keeps runs of blocks; FastDeploy knows one node per block. A view's ``node_id`` is its run's id and its place
from the run's end, which stays the same when the run is cut or absorbs what is above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

from kvledger.adapters.fastdeploy.cache_data import BlockNode, CacheStatus
from statemachine.hashing import block_hashes
from statemachine.state import tree
from statemachine.state.nodes import Node
from statemachine.state.places import Pool
from statemachine.state.state import State

_PLACE_BITS = 24
K = TypeVar("K")
V = TypeVar("V")


def node_id(run: int, from_end: int) -> int:
    """Id of a block: its run, and how many blocks of the run come after it."""
    return run << _PLACE_BITS | from_end


def run_of(id: int) -> tuple[int, int]:
    """``(run, blocks after it)`` of an id."""
    return id >> _PLACE_BITS, id & (1 << _PLACE_BITS) - 1


def status_of(run: Node) -> CacheStatus:
    """Where the blocks of a run are."""
    if run.device is not None:
        return CacheStatus.GPU if run.device.ready else CacheStatus.SWAP2GPU
    return CacheStatus.CPU if run.host is not None and run.host.ready else CacheStatus.SWAP2CPU


class NodeView(BlockNode):
    """One cached block, looked up whenever it is asked; good until it is evicted. Nothing can be assigned."""

    def __init__(self, state: State, run: Node, position: int) -> None:
        self.__dict__.update(_state=state, _run=run, position=position)

    def _where(self) -> tuple[Node, int]:
        run: Node = self.__dict__["_run"]
        position: int = self.__dict__["position"]
        while position < run.start and run.parent is not None:
            run = run.parent
        return run, position - run.start

    def __getattr__(self, name: str) -> Any:
        get = _ATTRIBUTES.get(name)
        if get is None:
            raise AttributeError(name)
        return get(self.__dict__["_state"], *self._where())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} is a view of the ledger's state: it cannot be assigned")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeView) and self._where() == other._where()

    def __hash__(self) -> int:
        return hash(self.node_id)


def _block_id(state: State, run: Node, offset: int) -> int:
    copy = run.device or run.host
    return copy.ids[offset] if copy is not None else -1


def _parent(state: State, run: Node, offset: int) -> BlockNode:
    if offset:
        return NodeView(state, run, run.start + offset - 1)
    above = run.parent
    return NodeView(state, above, above.end - 1) if above is not None and above.parent is not None else root_view(state)


def _children(state: State, run: Node, offset: int) -> dict[bytes, BlockNode]:
    if offset < run.size - 1:
        return {run.content(state.block_bytes, offset + 1): NodeView(state, run, run.start + offset + 1)}
    return {content: NodeView(state, child, child.start) for content, child in run.children.items()}


def _words(state: State, run: Node, offset: int) -> list[int]:
    return (
        memoryview(run.words)
        .cast("i")[offset * state.opened.block_size : (offset + 1) * state.opened.block_size]
        .tolist()
    )


def _hash_value(state: State, run: Node, offset: int) -> bytes:
    path = state.path(run)
    words = b"".join(node.words for node in path)[: (run.start + offset + 1) * state.block_bytes]
    return block_hashes(words, state.opened.block_size, items=tree.items_of(path))[-1]


def _requests(state: State, run: Node, offset: int) -> set[str]:
    return {request.request_id for request in state.requests.values() if run in state.path(request.leaf)}


_ATTRIBUTES: dict[str, Callable[[State, Node, int], Any]] = {
    "node_id": lambda state, run, offset: node_id(run.id, run.size - 1 - offset),
    "input_ids": _words,
    "input_hash_value": _hash_value,
    "hash_value": _hash_value,
    "depth": lambda state, run, offset: run.start + offset + 1,
    "block_id": _block_id,
    "token_num": lambda state, run, offset: state.opened.block_size,
    "last_used_time": lambda state, run, offset: None,
    "parent": _parent,
    "shared_count": lambda state, run, offset: run.pins,
    "reverved_dec_block_ids": lambda state, run, offset: [],
    "cache_status": lambda state, run, offset: status_of(run),
    "is_persistent": lambda state, run, offset: False,
    "persistent_shared_count": lambda state, run, offset: 0,
    "children": _children,
    "req_id_set": _requests,
}


def root_view(state: State) -> BlockNode:
    """The root; its children are the first blocks of the default namespace."""
    root = BlockNode(-1, [], 0, 0, -1, 0, None, None, None)
    top = state.roots.get(b"")
    if top is not None:
        root.children = {content: NodeView(state, child, child.start) for content, child in top.children.items()}
    return root


def leaf_view(state: State, leaf: Node) -> BlockNode:
    """The last block of the path that ends at ``leaf``."""
    return NodeView(state, leaf, leaf.end - 1) if leaf.parent is not None else root_view(state)


class View(Mapping[K, V]):
    """A mapping that looks everything up when it is asked."""

    def __init__(self, keys: Callable[[], Iterable[K]], get: Callable[[K], V], count: Callable[[], int]) -> None:
        self._keys, self._get, self._count = keys, get, count

    def __getitem__(self, key: K) -> V:
        return self._get(key)

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._keys()))

    def __len__(self) -> int:
        return self._count()


def node_map(state: State) -> View[int, BlockNode]:
    """All cached blocks by their ids."""

    def get(id: int) -> BlockNode:
        number, from_end = run_of(id)
        run = state.nodes[number]
        if from_end >= run.size:
            raise KeyError(id)
        return NodeView(state, run, run.end - 1 - from_end)

    def keys() -> Iterator[int]:
        for run in state.nodes.values():
            yield from (node_id(run.id, place) for place in range(run.size))

    return View(keys, get, lambda: sum(run.size for run in state.nodes.values()))


class FreeList(Sequence[int]):
    """Free blocks of a tier, the next one to be granted first."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self._pool.free[::-1][index].tolist()
        return self._pool.free[-1 - index]

    def __len__(self) -> int:
        return len(self._pool.free)

    def __contains__(self, block: object) -> bool:
        return block in self._pool.free

    def __repr__(self) -> str:
        return repr(self[:])
