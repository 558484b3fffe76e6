"""The drop-in's gauges for ``prometheus_client``, under FastDeploy's names. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from kvledger.adapters.fastdeploy.metrics import GAUGES, MainProcessMetrics, main_process_metrics


class GaugesCollector(Collector):
    """``fastdeploy:free_gpu_block_num`` and the others, read when Prometheus asks.

    ::

        prometheus_client.REGISTRY.register(GaugesCollector())
    """

    def __init__(self, gauges: MainProcessMetrics = main_process_metrics) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Family]:
        """All of :data:`GAUGES`."""
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"fastdeploy:{name}", text, value=getattr(self._gauges, name).value)
