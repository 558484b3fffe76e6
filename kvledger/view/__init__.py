"""``kvledger view``: a log as a local web page, or as one self-contained file.

Rules:

* The server listens on this machine alone, behind a secret, and can change nothing.
* The page loads nothing from anywhere else, and steps by itself: it has the events of a window, and applies them.

Words: ``docs/glossary.md``.
"""
