"""Tiers as they are typed."""

from __future__ import annotations

from enum import StrEnum

from statemachine.events import Tier


class TierName(StrEnum):
    """A tier by name."""

    DEVICE = "device"
    HOST = "host"

    @property
    def tier(self) -> Tier:
        """The tier."""
        return Tier[self.name]
