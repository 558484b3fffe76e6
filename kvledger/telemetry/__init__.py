"""Metrics in Prometheus form: what they are called, how they follow from the log, and who exports them."""

from kvledger.telemetry.derivation import Derivation
from kvledger.telemetry.table import METRICS, Kind, Metric

__all__ = ["METRICS", "Derivation", "Kind", "Metric"]
