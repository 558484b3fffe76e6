"""What happened, in words: of a block, a request, a transfer, a content.

Rules:

* An event has one line in words, the same wherever it is shown (:mod:`.wording`); an owner too (:mod:`.owners`).
* A history is told backwards (:mod:`.story`): the index says which stretches of the log mention the subject, and each
  stretch is replayed from its state, the newest first, until enough is told.
* Names that clients chose stand in quotation marks; what shows a sentence makes it printable (``kvledger.text``).

::

    explain ─► story ─► owners · wording
    leaks: what holds blocks, and why that is suspicious

Words: ``docs/glossary.md``.
"""
