"""What an operator should hear of, as log messages: lost workers and tiers, copies that failed, a log over its limit.

Logger ``kvledger.manager.notices``, quiet unless the program configures :mod:`logging`. Each message is an event's
name and ``key=value`` pairs; the same pairs are attributes of the log record (``extra``), so that a JSON formatter has
them as fields.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvledger.text import logged
from statemachine.events import EpochStarted, Event, Outcome, Tier, TierLost, TransferFinished, WorkerJoined, WorkerLost

_log = logging.getLogger(__name__)


def log_notices(ledger: str, events: Iterable[Event]) -> None:
    """Log those of these events that an operator should hear of."""
    for event in events:
        match event:
            case WorkerLost(rank, incarnation, reason):
                log_notice(
                    logging.WARNING, "worker_lost", ledger=ledger, rank=rank, incarnation=incarnation, reason=reason
                )
            case WorkerJoined(rank, incarnation, pid):
                level = logging.WARNING if incarnation > 1 else logging.INFO
                name = "worker_replaced" if incarnation > 1 else "worker_joined"
                log_notice(level, name, ledger=ledger, rank=rank, incarnation=incarnation, pid=pid)
            case TransferFinished(transfer, outcome, valid) if outcome != Outcome.DONE:
                name = f"transfer_{Outcome(outcome).name.lower()}"
                log_notice(logging.WARNING, name, ledger=ledger, transfer=transfer, valid_blocks=valid)
            case TierLost(tier, reason):
                log_notice(logging.ERROR, "tier_lost", ledger=ledger, tier=Tier(tier).name.lower(), reason=reason)
            case EpochStarted(epoch, last_sequence):
                log_notice(logging.WARNING, "epoch_started", ledger=ledger, epoch=epoch, last_sequence=last_sequence)


def log_notice(level: int, name: str, **fields: object) -> None:
    """Log a notice with its fields."""
    if _log.isEnabledFor(level):
        texts = {key: str(value) for key, value in fields.items()}
        pairs = " ".join(f"{key}={logged(text)}" for key, text in texts.items())
        _log.log(level, "%s %s", name, pairs, extra={"notice": name, **fields})
