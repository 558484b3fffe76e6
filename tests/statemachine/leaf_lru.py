"""An independent one-tier prefix cache: block by block, leaf-LRU by release order. Shares no code with kvledger."""

from __future__ import annotations

from typing import NamedTuple


class Served(NamedTuple):
    blocks: int
    hit: int
    bypassed: bool


class LeafLru:
    """Caches paths of block ids in ``capacity`` blocks."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pins: dict[int, int] = {}
        self.unused: dict[int, None] = {}
        self.evicted: list[int] = []

    def hit(self, path: list[int]) -> int:
        count = 0
        while count < len(path) and path[count] in self.pins:
            count += 1
        return count

    def fits(self, path: list[int]) -> bool:
        pinned = sum(1 for count in self.pins.values() if count)
        return pinned + sum(1 for id in path if not self.pins.get(id)) <= self.capacity

    def admit(self, path: list[int]) -> int:
        hit = self.hit(path)
        for id in path[:hit]:
            self.pins[id] += 1
            self.unused.pop(id, None)
        while len(self.pins) + len(path) - hit > self.capacity:
            victim = next(iter(self.unused))
            del self.unused[victim], self.pins[victim]
            self.evicted.append(victim)
        for id in path[hit:]:
            self.pins[id] = 1
        return hit

    def release(self, path: list[int]) -> None:
        for id in reversed(path):
            self.pins[id] -= 1
            if not self.pins[id]:
                self.unused[id] = None


def serve(
    requests: list[dict[str, object]],
    capacity: int,
    *,
    in_flight: int = 64,
    clock: bool = False,
    prefill_ms: float = 1000.0,
    token_ms: float = 30.0,
) -> tuple[list[Served], list[int]]:
    """Hits per request and the ids evicted, in order, for Mooncake requests (dictionaries as in the JSONL)."""
    cache = LeafLru(capacity)
    live: list[tuple[float, int, list[int]]] = []
    served = []
    now = 0.0

    def release_first() -> None:
        nonlocal now
        if clock:
            live.sort(key=lambda entry: entry[:2])
        finish, _, path = live.pop(0)
        now = max(now, finish)
        cache.release(path)

    for index, request in enumerate(requests):
        path = list(request["hash_ids"])  # type: ignore[call-overload]
        if clock:
            now = float(request["timestamp"])  # type: ignore[arg-type]
            for entry in sorted(live, key=lambda entry: entry[:2]):
                if entry[0] <= now:
                    live.remove(entry)
                    cache.release(entry[2])
        while len(live) >= in_flight:
            release_first()
        if len(path) > capacity:
            while live:
                release_first()
            served.append(Served(len(path), cache.hit(path), True))
            continue
        while not cache.fits(path):
            release_first()
        served.append(Served(len(path), cache.admit(path), False))
        live.append((now + prefill_ms + token_ms * float(request["output_length"]), index, path))  # type: ignore[arg-type]
    return served, cache.evicted
