"""The debugger: what happened in a ledger, why, and who did it. The command line is thin over it."""

from kvledger.debugger.source.source import Entry, Source, SourceError, open_source

__all__ = ["Entry", "Source", "SourceError", "open_source"]
