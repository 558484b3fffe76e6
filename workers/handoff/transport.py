"""What a pusher needs of a way to another instance's device pool; every transport keeps to it."""

from __future__ import annotations

from typing import Protocol

from workers.handoff.pushes import PushStarted


class Refused(RuntimeError):
    """The other instance does not take these blocks; nothing was written since the last layer that was sent."""


class Destination(Protocol):
    """One decode instance, as a pusher sees it."""

    def send(self, push: PushStarted, layer: int) -> None:
        """Copy one layer of a push; it has arrived when this returns.

        Raises:
            Refused: the instance is gone, or has revoked the push's ticket.
        """

    def alive(self) -> bool:
        """Whether the instance still is the one that was attached."""

    def close(self) -> None:
        """Detach."""


class Transport(Protocol):
    """A way to other instances."""

    def attach(self, push: PushStarted) -> Destination:
        """Reach the instance that a push goes to.

        Raises:
            Refused: it is gone, is not the one that gave the address, or has pools of another shape.
        """
