"""Recordings (``.kvlog`` files): random access, index, redaction.

Rules:

* A recording is read as a log is; any state of it is near, through an index beside it that can be made again.
* An index is believed only if it says of which bytes it is; a damaged one is made anew.
* What may be handed on was rewritten event by event: every structure stays, no user's content does.

Words: ``docs/glossary.md``.
"""
