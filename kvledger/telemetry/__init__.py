"""Metrics in Prometheus form and spans of requests: what they are called, and how they follow from the log.

Rules:

* Everything is derived from the log by a follower; the engine pays nothing, whether somebody looks or not.
* :mod:`.table` lists every metric once; collectors, exporter, dashboard and ``docs/metrics.md`` follow it.

Words: ``docs/glossary.md``.
"""

from kvledger.telemetry.derivation import Derivation
from kvledger.telemetry.table import METRICS, Kind, Metric

__all__ = ["METRICS", "Derivation", "Kind", "Metric"]
