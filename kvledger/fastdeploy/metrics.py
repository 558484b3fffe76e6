"""FastDeploy's metric names: gauges of the pool and hit rates."""

from __future__ import annotations


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


class MainProcessMetrics:
    """The gauges that the prefix cache manager sets, by FastDeploy's names."""

    def __init__(self) -> None:
        self.max_gpu_block_num = Gauge()
        self.max_cpu_block_num = Gauge()
        self.available_gpu_block_num = Gauge()
        self.free_gpu_block_num = Gauge()
        self.available_gpu_resource = Gauge()
        self.hit_req_rate = Gauge()
        self.hit_token_rate = Gauge()
        self.cpu_hit_token_rate = Gauge()
        self.gpu_hit_token_rate = Gauge()


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

    def update_history_hit_metrics(self, gauges: MainProcessMetrics) -> None:
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
