"""Collectors for ``prometheus_client``: one over a manager in the engine's process, one over an exporter's picture.

Needs the extra ``metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from kvledger.manager.manager import CacheManager
from kvledger.telemetry.derivation import Histogram, Sample
from kvledger.telemetry.table import BY_NAME, METRICS, Kind
from statemachine.events import Tier

Histograms = Mapping[tuple[str, tuple[str, ...]], Histogram]
Picture = tuple[str, list[Sample], Histograms]
"""A ledger's name, its metrics and its histograms, not to be changed any more."""


class ManagerCollector(Collector):
    """The metrics of a manager, read in the engine's own process when Prometheus asks.

    ::

        prometheus_client.REGISTRY.register(ManagerCollector(manager))

    Costs the scheduler nothing: nothing is counted for it. A scrape runs in another thread while the scheduler changes
    the state, so it reads only whole numbers and lengths, one at a time, and walks through nothing. Each number is
    exact at the moment when it is read; the numbers of one scrape may be some microseconds apart.
    """

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager

    def collect(self) -> Iterable[Family]:
        """The metrics that :data:`METRICS` marks as the engine's."""
        return families(self._manager.name, _manager_samples(self._manager), {})

    def describe(self) -> Iterable[Family]:
        """Nothing: several managers may be registered, they differ in the label ``ledger``."""
        return []


def _manager_samples(manager: CacheManager) -> Iterator[Sample]:
    stats, state = manager.stats(), manager.state
    for tier in Tier:
        label = tier.name.lower()
        pool = state.pool(tier)
        yield Sample("kvledger_pool_capacity_blocks", (label,), pool.capacity)
        yield Sample("kvledger_pool_blocks", (label, "free"), len(pool.free))
        yield Sample("kvledger_hit_blocks_total", (label,), stats[f"{label}_hit_blocks"])
        yield Sample("kvledger_evicted_blocks_total", (label,), stats[f"{label}_evicted_blocks"])
    yield Sample("kvledger_pool_blocks", ("device", "evictable"), stats["device_evictable_blocks"])
    for direction, entry in (("swap_out", "swapped_out"), ("swap_in", "swapped_in"), ("backup", "backed_up")):
        yield Sample("kvledger_swapped_blocks_total", (direction,), stats[f"{entry}_blocks"])
    for name in ("requests", "queried_blocks", "cached_blocks", "duplicate_blocks", "allocated_blocks"):
        yield Sample(f"kvledger_{name}_total", (), stats[name])
    yield Sample("kvledger_runs", (), stats["runs"])
    yield Sample("kvledger_live_requests", (), stats["live_requests"])
    yield Sample("kvledger_log_bytes", (), stats["log_bytes"])
    if stats["log_limit_bytes"]:
        yield Sample("kvledger_log_limit_bytes", (), stats["log_limit_bytes"])


class PictureCollector(Collector):
    """The metrics of the ledgers of which ``pictures`` returns one each."""

    def __init__(self, pictures: Callable[[], Iterable[Picture]]) -> None:
        self._pictures = pictures

    def collect(self) -> Iterable[Family]:
        """The metrics of the last pictures; what one metric says of several ledgers stands together."""
        found: dict[str, Family] = {}
        for picture in self._pictures():
            for family in families(*picture):
                if family.name in found:
                    found[family.name].samples += family.samples
                else:
                    found[family.name] = family
        return found.values()

    def describe(self) -> Iterable[Family]:
        """Nothing is known before the first picture."""
        return []


def families(ledger: str, samples: Iterable[Sample], histograms: Histograms) -> Iterator[Family]:
    """Samples as ``prometheus_client`` wants them, in the order of :data:`METRICS`."""
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for metric in METRICS:
        found = by_name.get(metric.name, [])
        if metric.kind == Kind.HISTOGRAM:
            if family := _histogram(metric.name, ledger, histograms):
                yield family
        elif found:
            # fewer values than labels: the engine's collector does not tell the last ones apart
            labels = ["ledger", *list(metric.labels)[: len(found[0].labels)]]
            make = CounterMetricFamily if metric.kind == Kind.COUNTER else GaugeMetricFamily
            family = make(metric.name, metric.text, labels=labels)
            for sample in found:
                family.add_metric([ledger, *sample.labels], sample.value)
            yield family


def _histogram(name: str, ledger: str, histograms: Histograms) -> Family | None:
    metric = BY_NAME[name]
    family = HistogramMetricFamily(name, metric.text, labels=["ledger", *metric.labels])
    for (of, labels), histogram in histograms.items():
        if of == name:
            total = 0
            buckets = []
            for bound, count in zip([*map(str, map(float, histogram.bounds)), "+Inf"], histogram.counts, strict=True):
                total += count
                buckets.append((bound, total))
            family.add_metric([ledger, *labels], buckets, histogram.sum)
    return family if family.samples else None
