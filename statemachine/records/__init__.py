"""Events and states as bytes, and back: codec, upcasters, snapshots, replay.

Rules:

* What a field of an event means stands in the event table; encoding, mentions and tables follow from it.
* A state has one canonical encoding; its digest is xxh3-128 of that. Equal states have equal bytes.
* A log of an earlier table is read through upcasters, as if it had been written with today's. Old logs never change.

::

    record ─► upcast ─► codec ─► event ─► replay (apply, compare digests) ─► state ─► snapshot ─► bytes, digest

Words: ``docs/glossary.md``.
"""
