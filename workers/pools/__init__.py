"""The memory that blocks live in, per backend, and the copies between tiers.

Rules:

* :mod:`.interface` says what a backend offers; every backend keeps to it and imports it, never the factory.
* :mod:`.backends` makes and opens pools; it imports a backend when a layout names it.
* A pool carries a random id and a fingerprint of its layout. Whoever opens it compares both before a byte is copied.
* The host pool is block-first: all layers of a block side by side, so that it can be pinned, checked and handed on.
* Bytes are moved and never interpreted.

::

    backends ─► numpy · paddle · cuda_pools, cuda_copies (cuda_driver) · checksums ─► interface ─► layout
                └──────────────── memory (the shared-memory objects) ───────────────┘

Words: ``docs/glossary.md``.
"""
