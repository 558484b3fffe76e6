"""Both ends of a hand-over between a prefill and a decode instance.

Rules:

* Each ledger has one decision maker. A prefill instance never changes a decode instance's state: it copies bytes into
  blocks that the other has reserved, and says when they are there.
* Sender and receiver attach to a manager, which folds them in and closes them; they do not know each other.
* Blocks that somebody may still write stay quarantined until nobody claims their ticket.

What both have in common is in :mod:`.peer`; the processes and the protocol are in :mod:`workers.handoff`.
Words: ``docs/glossary.md``.
"""
