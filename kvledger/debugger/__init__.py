"""The debugger: what happened in a ledger, why, and who did it. The command line is thin over it.

Rules:

* A log is a :class:`Source`, be it of a living ledger, a dead one, or a file. Reading one changes nothing in it.
* Every answer names the events that it rests on, and is the same wherever the log comes from.
* Where the log ends or is damaged, the answer says so, and what is sound before that is shown.

::

    source ─► explain (in words) · verify (is it sound, since when) · whatif (other sizes) · export (other tools)
    top: a living ledger at this moment · pushes: its log of pushes

Words: ``docs/glossary.md``.
"""

from kvledger.debugger.source import open_source
from kvledger.debugger.source.source import Entry, Source, SourceError

__all__ = ["Entry", "Source", "SourceError", "open_source"]
