"""Metrics in Prometheus form: what they are called, how they follow from the log, and who exports them."""

from kvledger.metrics.derivation import Derivation
from kvledger.metrics.table import METRICS, Kind, Metric

__all__ = ["METRICS", "Derivation", "Kind", "Metric"]
