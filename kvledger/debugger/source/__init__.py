"""Where a log comes from, and how places, blocks and requests in it are named.

Rules:

* :class:`~.source.Source` is all that the rest of the debugger knows of a log: its events as they stand there
  (``entries``, ``transactions``), the state after any of them (``at``, ``before``), and both together (``replay``).
* An event that does not fit becomes a ``Contradiction`` that names it; nothing from there on has a state.
* Two kinds of sources, told apart by :func:`open_source` alone: :mod:`.file` (a recording with an index: any state at
  once) and :mod:`.ledger` (shared memory, read as an observer: checkpoints of what was asked for).

::

    open_source ─► file · ledger ─► source
    places (``step:12``, a time) · filters (which events) · hashes (which content)
    steps (event by event, command by command) · replay (against digests, and against the decisions of today)

Words: ``docs/glossary.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ipc import InvalidName, LedgerError, LedgerNotFound
from ipc.ownership import ledger_names
from kvledger.debugger.source.file import RecordedSource
from kvledger.debugger.source.ledger import LedgerSource
from kvledger.debugger.source.source import Source, SourceError

__all__ = ["open_source"]


def _ignore(done: int, total: int) -> None:
    """Nobody wants to see progress."""


def open_source(text: str, progress: Callable[[int, int], None] = _ignore) -> Source:
    """Open what the user named: the path of a ``.kvlog`` file, or the name of a ledger.

    Args:
        text: a path if there is such a file or it looks like one (a slash, or ``.kvlog`` at the end).
        progress: called with (done, total) while a recording is indexed for the first time, or a ledger replayed.

    Raises:
        SourceError: one line.
    """
    try:
        if "/" in text or text.endswith(".kvlog") or Path(text).is_file():
            return RecordedSource(text, progress)
        return LedgerSource(text, progress)
    except (InvalidName, LedgerNotFound):
        names = sorted(ledger_names())
        there = f"ledgers here: {', '.join(names)}" if names else "there is no ledger on this machine"
        raise SourceError(f"{text!r} is neither a .kvlog file nor a ledger; {there}") from None
    except LedgerError as error:
        raise SourceError(str(error)) from error
