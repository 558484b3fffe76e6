"""Two naive models of the cache: plain dictionaries and lists, block by block, slow and obvious.

:class:`OneTier` predicts every answer of a cache without host tier: hits, block tables, victims.
:class:`Memory` knows what is in each physical block, for any policy: it finds blocks that hold the wrong bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from statemachine.events import Direction, TransferStarted
from statemachine.state.state import State

Path = tuple[Any, ...]
"""Root, then the content of each block down to the one that is meant."""


class Bad(NamedTuple):
    """The content of a block that turned out bad: equal to nothing that anybody asks for."""

    number: int
    content: Any


class Live:
    """A live request of :class:`OneTier`."""

    def __init__(self, root: Any, content: list[Any]) -> None:
        self.root = root
        self.content = content
        self.cached = 0
        self.table: list[int] = []
        self.own: set[int] = set()
        """Positions before ``cached`` whose block is a private duplicate."""


class OneTier:
    """A cache without host tier. Every method is the naive form of the command of its name."""

    def __init__(self, blocks: int, uncut: Callable[[list[Any], int], int] = lambda content, blocks: blocks) -> None:
        self.uncut = uncut
        """How many of so many leading blocks of a content do not end where nothing may begin."""
        self.free = list(range(blocks - 1, -1, -1))
        self.block: dict[Path, int] = {}
        self.pins: dict[Path, int] = {}
        self.final: list[Path] = []
        self.lru: list[Path] = []
        self.live: dict[str, Live] = {}
        self.generation = 0
        self.cached_by: dict[Path, str] = {}
        """Blocks that a live request has cached itself."""
        self.replaced: dict[Path, str] = {}
        """Those of them that had been cached before: the tree took the request's block in the place of its own."""
        self.bad = 0

    def path(self, request: Live, position: int) -> Path:
        """The block at a position of a request's content."""
        return (request.root, *request.content[: position + 1])

    def hit(self, root: Any, content: list[Any], limit: int) -> int:
        """How many leading blocks are cached."""
        count = 0
        while count < min(limit, len(content)) and (root, *content[: count + 1]) in self.block:
            count += 1
        return count

    def root(self, namespace: bytes) -> Any:
        """What stands above a namespace's first blocks: it changes when the cache is cleared."""
        return namespace, self.generation

    def pin(self, path: Path) -> None:
        """One more holder."""
        self.pins[path] = self.pins.get(path, 0) + 1
        for order in (self.final, self.lru):
            if path in order:
                order.remove(path)

    def grant(self, count: int) -> tuple[list[int], list[int]]:
        """Blocks granted, and blocks evicted for them."""
        evicted = self.evict(max(count - len(self.free), 0))
        granted = [self.free.pop() for _ in range(count)]
        return granted, evicted

    def evict(self, count: int) -> list[int]:
        """Give up the first blocks of the eviction order; asserts that each is a leaf."""
        evicted = []
        for path in [*self.final, *self.lru][:count]:
            assert not any(other[: len(path)] == path and other != path for other in self.block), "not a leaf"
            evicted.append(self.block.pop(path))
            del self.pins[path]
            (self.final if path in self.final else self.lru).remove(path)
        self.free += evicted
        return evicted

    def evict_tree(self, root: Any, count: int) -> list[int]:
        """As :meth:`evict`, below one root only."""
        return self._evict_paths([path for path in [*self.final, *self.lru] if path[0] == root][:count])

    def evict_distrusted(self) -> list[int]:
        """As :meth:`evict`, all that turned out bad."""
        return self._evict_paths([path for path in [*self.final, *self.lru] if isinstance(path[-1], Bad)])

    def _evict_paths(self, paths: list[Path]) -> list[int]:
        evicted = []
        for path in paths:
            evicted.append(self.block.pop(path))
            del self.pins[path]
            (self.final if path in self.final else self.lru).remove(path)
        self.free += evicted
        return evicted

    def admit(self, key: str, namespace: bytes, content: list[Any], limit: int, blocks: int) -> Any:
        """``(hits, granted, evicted)``, or ``None`` where there is no room."""
        root = self.root(namespace)
        hits = self.uncut(content, self.hit(root, content, limit))
        request = Live(root, content)
        own = {self.path(request, i) for i in range(hits)}
        evictable = sum(path not in own for path in [*self.final, *self.lru])
        if blocks - hits > len(self.free) + evictable:
            return None
        for i in range(hits):
            self.pin(self.path(request, i))
            request.table.append(self.block[self.path(request, i)])
        request.cached = hits
        granted, evicted = self.grant(blocks - hits)
        request.table += granted
        self.live[key] = request
        return hits, granted, evicted

    def cache(self, key: str, blocks: int, generated: list[Any]) -> None:
        """Publish the first ``blocks`` blocks."""
        request = self.live[key]
        request.content = request.content + generated
        freed = []
        for i in range(request.cached, blocks):
            if i and isinstance(request.content[i - 1], Bad):
                self.bad += 1
                request.content[i] = Bad(self.bad, request.content[i])
            path = self.path(request, i)
            if path in self.block and self.used(path):
                request.own.add(i)
            elif path in self.block:
                freed.append(self.replace(path, key, i))
            else:
                self.block[path] = request.table[i]
                self.cached_by[path] = key
            self.pin(path)
        request.cached = max(request.cached, blocks)
        self.free += reversed(freed)

    def used(self, path: Path) -> bool:
        """Whether a cached block stands in the block table of a live request."""
        return any(self.block[path] in request.table for request in self.live.values())

    def replace(self, path: Path, key: str, position: int) -> int:
        """The tree takes a request's copy of a block; returns the block that it had."""
        old, self.block[path] = self.block[path], self.live[key].table[position]
        self.cached_by[path] = self.replaced[path] = key
        return old

    def distrust(self, key: str, blocks: int) -> None:
        """The content of these blocks, and of all below, is another one from here on, for whoever holds it."""
        request = self.live[key]
        if blocks >= request.cached:
            return
        top = self.path(request, blocks)
        self.bad += 1

        def renamed(path: Path) -> Path:
            if path[: len(top)] != top:
                return path
            return (*path[: blocks + 1], *(Bad(self.bad, content) for content in path[blocks + 1 :]))

        for live in self.live.values():
            path = (live.root, *live.content[: live.cached])
            live.content = [*renamed(path)[1:], *live.content[live.cached :]]
        self.block = {renamed(path): block for path, block in self.block.items()}
        self.pins = {renamed(path): pins for path, pins in self.pins.items()}
        self.cached_by = {renamed(path): other for path, other in self.cached_by.items()}
        self.replaced = {renamed(path): other for path, other in self.replaced.items()}
        self.final, self.lru = [renamed(path) for path in self.final], [renamed(path) for path in self.lru]
        self.final += [path for path in self.lru if isinstance(path[-1], Bad)]
        self.lru = [path for path in self.lru if not isinstance(path[-1], Bad)]

    def extend(self, key: str, limit: int) -> None:
        """Everything that is cached of the request's content, in the tree's blocks."""
        request = self.live[key]
        end = request.cached
        if end and isinstance(request.content[end - 1], Bad):
            return
        while end < min(limit, len(request.content)) and self.path(request, end) in self.block:
            end += 1
        end = max(self.uncut(request.content, end), request.cached)
        for i in range(request.cached, end):
            self.pin(self.path(request, i))
        own = [request.table[i] for i in range(min(end, len(request.table))) if i >= request.cached or i in request.own]
        self.free += reversed(own)
        paths = [self.block[self.path(request, i)] for i in range(end)]
        request.table = paths + request.table[end:]
        request.cached, request.own = end, set()

    def give_back(self, key: str, blocks: list[int]) -> None:
        """Private blocks from anywhere behind the cached ones become free."""
        request = self.live[key]
        tail = [block for block in request.table[request.cached :] if block not in blocks]
        request.table = request.table[: request.cached] + tail
        self.free += blocks

    def trim(self, key: str, blocks: int) -> None:
        """Give back the end of a block table."""
        table = self.live[key].table
        while len(table) > blocks:
            self.free.append(table.pop())

    def reassign(self, key: str, target: str, blocks: list[int]) -> None:
        """Move blocks to another request."""
        source = self.live[key].table
        start = self.live[key].cached
        source[start:] = [block for block in source[start:] if block not in blocks]
        self.live[target].table += blocks

    def release(self, key: str, final: bool, heirs: bool = True) -> None:
        """End a request; those that have copies of what nobody uses then are its ``heirs``."""
        request = self.live.pop(key)
        self.cached_by = {path: other for path, other in self.cached_by.items() if other != key}
        self.replaced = {path: other for path, other in self.replaced.items() if other != key}
        retired = request.root[1] < self.generation
        alone = final or retired
        below: Path | None = None
        for i in reversed(range(request.cached)):
            path = self.path(request, i)
            self.pins[path] -= 1
            children = [p for p in self.block if len(p) == len(path) + 1 and p[: len(path)] == path and p != below]
            alone = alone and not self.pins[path] and (retired or not children)
            if not self.pins[path]:
                (self.final if alone or isinstance(path[-1], Bad) else self.lru).append(path)
            below = path
        private = [block for i, block in enumerate(request.table) if i >= request.cached or i in request.own]
        self.free += reversed(private)
        for other in sorted(self.live) if heirs else ():
            self.inherit(request, other)

    def inherit(self, ended: Live, key: str) -> None:
        """What nobody uses any more that a request has copies of becomes these, the deepest first."""
        heir = self.live[key]
        for i in reversed(range(ended.cached)):
            path = self.path(ended, i)
            if i in heir.own and self.path(heir, i) == path and path in self.block and not self.used(path):
                self.free.append(self.replace(path, key, i))
                heir.own.remove(i)

    def restart(self) -> list[int]:
        """The engine died: its requests end; what only they had cached is evicted, leaves first. Returns those."""
        below = [path for path in self.block if any(path[: len(above)] == above for above in self.replaced)]
        suspects = set(self.cached_by) | set(below)
        for key in sorted(self.live):
            self.release(key, False, heirs=False)
        evicted = []
        for path in [*self.final, *self.lru]:
            below = [other for other in self.block if len(other) > len(path) and other[: len(path)] == path]
            if path in suspects and not below:
                evicted.append(self.block.pop(path))
                del self.pins[path]
                (self.final if path in self.final else self.lru).remove(path)
        self.free += evicted
        return evicted

    def clear(self) -> list[int]:
        """Forget what nobody holds; nothing matches what was there."""
        evicted = self.evict(len(self.final) + len(self.lru))
        self.generation += 1
        return evicted


class Memory:
    """What each physical block holds: the path of the tokens whose KV was written or copied there."""

    def __init__(self) -> None:
        self.device: dict[int, Path] = {}
        self.host: dict[int, Path] = {}
        self.todo: dict[int, TransferStarted] = {}

    def started(self, transfer: TransferStarted) -> None:
        """A copy is ordered."""
        self.todo[transfer.transfer] = transfer

    def copy(self, id: int) -> None:
        """The worker runs a transfer, after those that it has to wait for."""
        transfer = self.todo.pop(id)
        for other in transfer.after:
            if other in self.todo:
                self.copy(other)
        inward = transfer.direction == Direction.SWAP_IN
        source, target = (self.host, self.device) if inward else (self.device, self.host)
        for a, b in zip(transfer.sources, transfer.targets, strict=True):
            target[b] = source.get(a, ())

    def write(self, block: int, path: Path) -> None:
        """The engine computes a block."""
        self.device[block] = path

    def compute(self, state: State, key: str, root: Any, content: list[Any], blocks: int) -> None:
        """The engine runs steps: of what is cached ahead on a request's path, the first ``blocks`` blocks are written.

        To be called before a command tells that they are computed, whoever had cached them, and when.
        """
        for node in state.path(state.requests[state.numbers[key]].leaf):
            if node.uncomputed and node.device is not None:
                for position in range(node.start, min(node.end, blocks)):
                    self.write(node.device.ids[position - node.start], (root, *content[: position + 1]))

    def wrong(self, state: State, key: str, root: Any, content: list[Any]) -> str:
        """The first block of a request's cached path that holds something else; empty if all is well."""
        request = state.requests[state.numbers[key]]
        for i in range(request.leaf.end):
            want = (root, *content[: i + 1])
            if self.device.get(request.table[i]) != want:
                return f"position {i} of {key}, block {request.table[i]}: {self.device.get(request.table[i])} != {want}"
        return ""
