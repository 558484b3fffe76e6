"""``kvledger run``: traffic through a real manager with real workers, every byte verified.

Rules:

* Blocks are filled with a pattern that says whose they are, and are compared before and after every use.
* With ``--crash`` and ``--chaos`` processes are killed on the way; what was served must still be right.

Words: ``docs/glossary.md``.
"""
