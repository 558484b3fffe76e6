"""Handing a request's blocks to another instance: orders, tickets, progress, and the process that pushes.

Rules:

* A push changes no owner: the sources stay the request's, the targets are another ledger's.
* A pusher claims a ticket, looks whether it stands, and only then writes; after each layer it gives the claim up. The
  other side revokes, and then looks at the claims. Each stores before it looks, so one of them sees the other.
* Only what every rank has answered counts, and only once the engine has folded it into ``PushFinished``.

::

    sender ─► log of pushes ─► pusher ── transport ─► pool of the decode instance
                  ▲              │  ▲ progress (layers written)   ▲ tickets (its board)
                  └── answers ◄──┘  engine's rank                 receiver

:mod:`.transport` is the protocol, :mod:`.shared_memory` the one that exists. Words: ``docs/glossary.md``.
"""
