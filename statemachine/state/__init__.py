"""What the state machine knows: objects, places and orders, and the questions one can ask of them.

Rules:

* A run has one copy per place, a place has one pool of blocks: what holds for one place holds for every one.
* Every block of a pool has exactly one owner: free list, copy of a run, request, or transfer (:mod:`.ownership`).
* Questions are asked here; nothing here changes more than the object it belongs to, and nothing here raises.
* Two facts make it simple. A released path joins the eviction order deepest run first, so taking from the front is
  leaf-first eviction. And presence is prefix-closed, so one comparison of a run's content decides the whole run.

::

    tree (find a path) · ownership ─► state ─► places (pool, orders) ─► order ─► nodes (run, request, transfer)
                                        └──────────────────────────────────────────► groups (what layers of a kind need)

Words: ``docs/glossary.md``.
"""
