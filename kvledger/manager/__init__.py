"""The block manager that an engine imports, by subject.

Rules:

* One thread changes the cache; a release may come from any. Questions may be asked from anywhere.
* A call becomes a command, a command one transaction: decide, make room in the log, apply, publish. What is refused
  has changed nothing; after an event that cannot be applied the manager takes no more calls.
* Deadlines and back-off live here (``ranks``, ``retention``), never in the state machine.
* Who asks again and again (``wait``) and what a fork gives up (``forks``) know callables, not the manager.

::

    manager.CacheManager        the life of a request
      └ upkeep.WholeCache       clear, pause, make room, evict, resize
          └ execution.Ledger    who may call; commands to events; folding answers in; the end
              ├ transactions    encode, reserve, apply, publish
              ├ ranks           workers, orders, answers     └ retention   auditor, snapshots
              └ lifecycle       create, or rebuild what a dead engine left

Words: ``docs/glossary.md``.
"""
