"""FastDeploy's metric names: gauges of the pool and hit rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

GAUGES = {
    "max_gpu_block_num": "Blocks of the device pool",
    "max_cpu_block_num": "Blocks of the host pool",
    "available_gpu_block_num": "Blocks of the device pool that the manager may hand out",
    "free_gpu_block_num": "Free blocks of the device pool",
    "available_gpu_resource": "Share of the device pool that is free",
    "hit_req_rate": "Share of the requests that found something cached",
    "hit_token_rate": "Share of their tokens that was cached",
    "cpu_hit_token_rate": "Share of their tokens that was cached on the host",
    "gpu_hit_token_rate": "Share of their tokens that was cached on the device",
}
"""By name: what each means. The rates count since the last reset of :class:`CacheMetrics`."""


class Gauge:
    """A number that goes up and down; the engine's exporter reads ``value``."""

    def __init__(self) -> None:
        self.value = 0.0

    def set(self, value: float) -> None:
        """Set it."""
        self.value = value

    def inc(self, amount: float = 1.0) -> None:
        """Raise it."""
        self.value += amount

    def dec(self, amount: float = 1.0) -> None:
        """Lower it."""
        self.value -= amount


class Gauges(Protocol):
    """Has the attributes of :data:`GAUGES`, each with ``set(value)``; FastDeploy's ``main_process_metrics`` does."""

    def __getattr__(self, name: str) -> Any: ...


class MainProcessMetrics:
    """The gauges that the prefix cache manager sets, by FastDeploy's names: a :class:`Gauge` for each of them."""

    def __init__(self) -> None:
        for name in GAUGES:
            setattr(self, name, Gauge())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Gauge: ...


main_process_metrics = MainProcessMetrics()


class CacheMetrics:
    """Hit counts since the last reset."""

    def __init__(self) -> None:
        self.reset_metrics()

    def reset_metrics(self) -> None:
        """Begin anew."""
        self.req_count = 0
        self.hit_req_count = 0
        self.hit_req_ratio = 0.0
        self.total_gpu_matched_token_num = 0
        self.total_cpu_matched_token_num = 0
        self.matched_token_num = 0
        self.total_token_num = 0
        self.hit_token_ratio = 0.0
        self.cpu_hit_token_ratio = 0.0
        self.gpu_hit_token_ratio = 0.0

    def calculate_hit_metrics(
        self, req_id: str, current_query_cpu_match_token_num: int, current_query_gpu_match_token_num: int, tokens: int
    ) -> None:
        """Count one request's hits; ``tokens`` is the length of its prompt."""
        self.total_cpu_matched_token_num += current_query_cpu_match_token_num
        self.total_gpu_matched_token_num += current_query_gpu_match_token_num
        self.matched_token_num = self.total_cpu_matched_token_num + self.total_gpu_matched_token_num
        self.total_token_num += tokens

    def update_history_hit_metrics(self, gauges: Gauges) -> None:
        """Set the rates."""
        total = max(self.total_token_num, 1)
        self.hit_req_ratio = self.hit_req_count / max(self.req_count, 1)
        self.hit_token_ratio = self.matched_token_num / total
        self.cpu_hit_token_ratio = self.total_cpu_matched_token_num / total
        self.gpu_hit_token_ratio = self.total_gpu_matched_token_num / total
        gauges.hit_req_rate.set(self.hit_req_ratio)
        gauges.hit_token_rate.set(self.hit_token_ratio)
        gauges.cpu_hit_token_rate.set(self.cpu_hit_token_ratio)
        gauges.gpu_hit_token_rate.set(self.gpu_hit_token_ratio)
