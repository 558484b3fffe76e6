"""The same traffic under other sizes and policies.

Rules:

* :mod:`.traffic` makes of a log what its users wanted (requests come, grow, publish, end) without what the cache did.
* :mod:`.whatif` lets the real state machine decide that traffic anew, one scenario beside the other, in one pass.
* :mod:`.curve` finds the hit rates of all sizes at once from how long ago each block was used (:mod:`.recency`).
* :mod:`.plot` draws either; it needs the extra ``plot``.

Words: ``docs/glossary.md``.
"""
