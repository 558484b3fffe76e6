"""The one table of metrics: names, units, labels. ``docs/metrics.md`` is generated from it.

Names follow Prometheus: a unit at the end, ``_total`` for what only grows. Every label has a small, fixed set of
values; nothing is labelled with requests, prompts or blocks. All metrics also carry the label ``ledger``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from statemachine.events import KINDS, Direction, EvictReason, Outcome, ReleaseReason, Tier


class Kind(StrEnum):
    """What Prometheus makes of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Metric(NamedTuple):
    """One metric. ``labels`` maps a label to its values; none given: the ranks."""

    name: str
    kind: Kind
    text: str
    labels: Mapping[str, tuple[str, ...]] = {}
    buckets: tuple[float, ...] = ()
    engine: bool = False
    """Whether the collector in the engine's process has it too."""
    pushes: bool = False
    """Whether it follows from the log of pushes, and not from the ledger's own."""


def label_sets(metric: Metric, ranks: int) -> list[tuple[str, ...]]:
    """All combinations of values that the labels of a metric take in a ledger of so many ranks."""
    values = [of_label or tuple(map(str, range(ranks))) for of_label in metric.labels.values()]
    return [found for found in itertools.product(*values) if found != (value_of(Tier.HOST), SWAPPED_OUT)]


def value_of(member: Tier | Direction | Outcome | EvictReason | ReleaseReason) -> str:
    """A member of an enumeration as the value of a label."""
    return member.name.lower()


TIERS = tuple(map(value_of, Tier))
DIRECTIONS = tuple(map(value_of, Direction))
OUTCOMES = tuple(map(value_of, Outcome))
PUSH_OUTCOMES = tuple(map(value_of, (Outcome.DONE, Outcome.FAILED, Outcome.TIMED_OUT)))
SWAPPED_OUT = "swapped_out"
EVICT_REASONS = (*map(value_of, EvictReason), SWAPPED_OUT)
RELEASE_REASONS = tuple(map(value_of, ReleaseReason))
EVENTS = tuple(event.__name__ for event in KINDS.values())
OWNERS = ("free", "private", "pinned", "evictable", "cached", "in_transfer", "quarantined")

_LONG = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
_SHORT = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_TIER = {"tier": TIERS}
_DIRECTION = {"direction": DIRECTIONS}
_RANK: dict[str, tuple[str, ...]] = {"rank": ()}
_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS: tuple[Metric, ...] = (
    # What is where
    Metric(
        "kvledger_pool_capacity_blocks",
        _G,
        "Blocks of a tier's pool, staging included.",
        _TIER,
        engine=True,
    ),
    Metric(
        "kvledger_pool_blocks",
        _G,
        "Blocks by what they are used for; they add up to the capacity. Device: free, private to requests, cached and "
        "pinned, cached and evictable, held by a copy in flight or quarantined after one that timed out. Host: free, "
        "cached, in_transfer, quarantined. The engine's own collector gives only what it can read in one step: free "
        "and, for the device, evictable.",
        {**_TIER, "owner": OWNERS},
        engine=True,
    ),
    Metric("kvledger_runs", _G, "Runs (nodes) in the prefix tree.", engine=True),
    # Hits
    Metric("kvledger_requests_total", _C, "Requests matched against the cache.", engine=True),
    Metric("kvledger_queried_blocks_total", _C, "Full blocks of their prompts.", engine=True),
    Metric("kvledger_hit_blocks_total", _C, "Those that were found, by the tier they were on.", _TIER, engine=True),
    Metric("kvledger_cached_blocks_total", _C, "Blocks published in the prefix tree.", engine=True),
    Metric(
        "kvledger_duplicate_blocks_total",
        _C,
        "Blocks that were computed although a valid copy was cached meanwhile.",
        engine=True,
    ),
    Metric(
        "kvledger_reuse_gap_seconds",
        _H,
        "Per block: from the moment nobody used it any more to its next match. Blocks that are in use when they are "
        "matched are not counted.",
        buckets=_LONG,
    ),
    # Room
    Metric("kvledger_allocated_blocks_total", _C, "Blocks handed out.", engine=True),
    Metric("kvledger_refused_allocations_total", _C, "Admissions and allocations for which there was no room."),
    Metric(
        "kvledger_evicted_blocks_total",
        _C,
        "Cached copies given up, by tier and reason; swapped_out: the copy went to the host. The engine's own "
        "collector does not tell the reasons apart.",
        {**_TIER, "reason": EVICT_REASONS},
        engine=True,
    ),
    Metric(
        "kvledger_residency_seconds",
        _H,
        "Per block: how long a copy stayed on a tier, from being cached (or having arrived) there to its eviction or "
        "swap.",
        _TIER,
        _LONG,
    ),
    Metric("kvledger_cleared_caches_total", _C, "How often everything cached was made to match no more."),
    # Requests
    Metric("kvledger_live_requests", _G, "Requests that hold blocks.", engine=True),
    Metric("kvledger_waiting_requests", _G, "Requests that wait for a copy."),
    Metric(
        "kvledger_oldest_pin_seconds",
        _G,
        "Age of the oldest live request: it pins its path since then. At least this, where the exporter began later.",
    ),
    Metric("kvledger_released_requests_total", _C, "Requests that ended, by reason.", {"reason": RELEASE_REASONS}),
    # Copies
    Metric(
        "kvledger_swapped_blocks_total",
        _C,
        "Blocks whose copy was ordered, by direction.",
        _DIRECTION,
        engine=True,
    ),
    Metric(
        "kvledger_swap_bytes_total",
        _C,
        "Bytes that arrived, over all ranks. Absent for a ledger without pools.",
        _DIRECTION,
    ),
    Metric(
        "kvledger_swap_seconds",
        _H,
        "From the order of a transfer to its end in the log, for those that were done.",
        _DIRECTION,
        _SHORT,
    ),
    Metric("kvledger_transfers_total", _C, "Transfers that ended, by outcome.", {**_DIRECTION, "outcome": OUTCOMES}),
    Metric("kvledger_transfers_in_flight", _G, "Transfers that have not ended, by direction.", _DIRECTION),
    Metric("kvledger_quarantined_transfers", _G, "Timed-out transfers whose blocks some rank may still write."),
    # Workers
    Metric("kvledger_workers", _G, "Ranks whose worker has joined and is not lost."),
    Metric("kvledger_expected_workers", _G, "Ranks of the ledger."),
    Metric("kvledger_lost_workers_total", _C, "Workers that died or were given up, by rank.", _RANK),
    Metric(
        "kvledger_worker_lag_events",
        _G,
        "Events a worker has not read. One with nothing to do looks at the log a few times per second only.",
        _RANK,
    ),
    Metric("kvledger_lost_tiers_total", _C, "How often every copy on a tier was lost.", _TIER),
    # Split prefill and decode: what a prefill instance pushes. Absent for a ledger that never had a sender.
    Metric(
        "kvledger_pushes_total",
        _C,
        "Requests that were pushed to a decode instance, by outcome. As all metrics of pushes: absent before there is "
        "a sender.",
        {"outcome": PUSH_OUTCOMES},
        pushes=True,
    ),
    Metric(
        "kvledger_push_bytes_total", _C, "Bytes of the pushes that were done, over all layers and ranks.", pushes=True
    ),
    Metric(
        "kvledger_push_seconds",
        _H,
        "From the order of a push to its end, for those that were done. It includes the computation of the layers that "
        "were not written yet.",
        buckets=_SHORT,
        pushes=True,
    ),
    Metric("kvledger_pushes_in_flight", _G, "Pushes that have not ended.", pushes=True),
    Metric("kvledger_messagers", _G, "Ranks whose pusher runs; there should be one per rank.", pushes=True),
    Metric(
        "kvledger_messager_lag_records", _G, "Records of the log of pushes a pusher has not read.", _RANK, pushes=True
    ),
    # The log and who reads it
    Metric("kvledger_events_total", _C, "Events in the log, by kind.", {"event": EVENTS}),
    Metric("kvledger_epoch", _G, "Number of the engine process that writes the ledger; grows with each restart."),
    Metric("kvledger_writer_up", _G, "1 while the process that writes the ledger runs."),
    Metric("kvledger_log_bytes", _G, "Size of the log's segments in shared memory.", engine=True),
    Metric(
        "kvledger_log_limit_bytes",
        _G,
        "What the engine lets the log keep. Only in the engine's process; absent: no limit.",
        engine=True,
    ),
    Metric("kvledger_shared_memory_free_bytes", _G, "Free bytes of /dev/shm."),
    Metric("kvledger_shared_memory_size_bytes", _G, "Size of /dev/shm."),
    Metric("kvledger_exporter_lag_seconds", _G, "How far the exporter is behind the log; 0: it has read everything."),
    Metric("kvledger_exporter_sequence", _G, "The last event the exporter has read."),
    Metric("kvledger_skipped_events_total", _C, "Events that were gone before the exporter read them."),
    Metric(
        "kvledger_contradiction_event",
        _G,
        "The first event that contradicts the state before it; 0: there is none. The exporter reads no further.",
    ),
    Metric("kvledger_auditor_up", _G, "1 while the process that audits the ledger runs. Absent: it never had one."),
    Metric("kvledger_auditor_lag_events", _G, "Events that it has not audited. Absent as above."),
    Metric("kvledger_audit_broken_event", _G, "The first event that broke something, it says; 0: all is well."),
)
"""All metrics, in the order in which they are exported."""

BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}
