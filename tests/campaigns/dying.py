"""Dying in the middle of an append: at any of its stores, without a hook in the writer.

The views that a :class:`ipc.LogWriter` stores through are replaced by ones that stop at the chosen store, either with
SIGKILL or (so that one process can look at what is left) with an exception.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

from ipc import LogWriter
from ipc.record import LINE_BYTES
from ipc.segment import TAIL


class Moment(Enum):
    """Where an append ends for ever."""

    BEFORE = "nothing is written"
    IN_A_LINE = "half of a record's line is not written, with its sequence"
    IN_A_PAYLOAD = "half of a payload is not written"
    BEFORE_COMMIT = "all bodies are written, no commit word"
    COMMITTING = "all commit words but the last are written"
    BEFORE_HINT = "everything but the tail hint is written"
    AFTER = "everything is written"


class Died(BaseException):
    """Instead of SIGKILL."""


class _View:
    """A view that counts its stores, and ends at one of them; of a slice the bytes ``lost`` do not arrive then."""

    def __init__(
        self,
        view: memoryview,
        end: Callable[[], NoReturn],
        at: int = -1,
        key: int | None = None,
        lost: Callable[[int], range] = lambda _: range(0),
    ) -> None:
        self._view, self._end, self._at, self._key, self._lost = view, end, at, key, lost
        self._stores = 0

    def __getitem__(self, key: Any) -> Any:
        return self._view[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._stores == self._at or (self._key is not None and key == self._key):
            if isinstance(key, slice):
                arriving = bytearray(value)
                for byte in self._lost(len(arriving)):
                    arriving[byte] = self._view[key.start + byte]
                self._view[key] = arriving
            self._end()
        self._stores += 1
        self._view[key] = value


def arm(writer: LogWriter, moment: Moment, records: int, end: Callable[[], NoReturn]) -> Callable[[], None]:
    """Let the next transaction, of so many records, end there; returns what disarms it.

    ``BEFORE`` and ``AFTER`` are up to the caller, and ``IN_A_PAYLOAD`` needs a payload in the record's head.
    """
    views = {"_buffer": writer._buffer, "_words": writer._words, "_words32": writer._words32}
    fatal: Any = writer
    if moment is Moment.IN_A_LINE:  # it is stored together with its payload
        fatal._buffer = _View(writer._buffer, end, 0, lost=lambda _: range(LINE_BYTES // 2))
    elif moment is Moment.IN_A_PAYLOAD:
        fatal._buffer = _View(writer._buffer, end, 0, lost=lambda size: range(LINE_BYTES, (LINE_BYTES + size) // 2))
    elif moment is Moment.BEFORE_COMMIT:
        fatal._words32 = _View(writer._words32, end, 0)
    elif moment is Moment.COMMITTING:
        fatal._words32 = _View(writer._words32, end, records - 1)
    elif moment is Moment.BEFORE_HINT:
        fatal._words = _View(writer._words, end, key=TAIL)

    def disarm() -> None:
        for name, view in views.items():
            setattr(writer, name, view)

    return disarm


def die_in_append(
    writer: LogWriter, moment: Moment, append: Callable[..., None], *arguments: Any, really: bool = False
) -> None:
    """Call ``append(writer, *arguments)``, which appends one record for each argument (or one), and end it there."""

    def end() -> NoReturn:
        if really:
            os.kill(os.getpid(), signal.SIGKILL)
        raise Died

    if moment is Moment.BEFORE:
        if really:
            end()
        return
    disarm = arm(writer, moment, max(len(arguments), 1), end)
    try:
        append(writer, *arguments)
    except Died:
        pass
    else:
        assert moment is Moment.AFTER, moment
        if really:
            end()
    disarm()
