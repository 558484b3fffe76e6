"""FastDeploy's metric names: gauges of the pool and hit rates."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from kvledger.config import ConfigError

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


def exported_gauges() -> Gauges:
    """FastDeploy's ``main_process_metrics``, which it exports, where this process has loaded them; else ours."""
    theirs = sys.modules.get("fastdeploy.metrics.metrics")
    found: Gauges = getattr(theirs, "main_process_metrics", main_process_metrics)
    return found


class KnownGauges:
    """Those of :data:`GAUGES` that an exporter has; revisions of FastDeploy have more and fewer of them.

    Raises:
        kvledger.ConfigError: it has none.
    """

    def __init__(self, gauges: Gauges) -> None:
        found = {name: getattr(gauges, name, None) for name in GAUGES}
        self._set = {name: gauge.set for name, gauge in found.items() if gauge is not None}
        if not self._set:
            raise ConfigError(f"gauges has none of {', '.join(GAUGES)}: {gauges!r:.80}")

    def set(self, name: str, value: float) -> None:
        """Set a gauge if there is one of that name."""
        setter = self._set.get(name)
        if setter is not None:
            setter(value)


class CacheMetrics:
    """Hit counts since the last reset.

    Args:
        gauges: where the rates are set; default: :func:`exported_gauges`.
    """

    def __init__(self, gauges: KnownGauges | None = None) -> None:
        self._gauges = KnownGauges(exported_gauges()) if gauges is None else gauges
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

    def update_history_hit_metrics(self) -> None:
        """Set the rates."""
        total = max(self.total_token_num, 1)
        self.hit_req_ratio = self.hit_req_count / max(self.req_count, 1)
        self.hit_token_ratio = self.matched_token_num / total
        self.cpu_hit_token_ratio = self.total_cpu_matched_token_num / total
        self.gpu_hit_token_ratio = self.total_gpu_matched_token_num / total
        self._gauges.set("hit_req_rate", self.hit_req_ratio)
        self._gauges.set("hit_token_rate", self.hit_token_ratio)
        self._gauges.set("cpu_hit_token_rate", self.cpu_hit_token_ratio)
        self._gauges.set("gpu_hit_token_rate", self.gpu_hit_token_ratio)

    _update_history_hit_metrics = update_history_hit_metrics  # as FastDeploy's code calls it
