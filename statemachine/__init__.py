"""The pure core: which block holds which tokens, for whom, and what follows from what. No I/O, clock or randomness.

Rules:

* Events are facts: they carry what was decided, with every block id, so that an old log replays under a new policy.
* ``decide(state, command)`` reads and never writes; all policy is there. It raises a typed error or returns events.
* ``apply(state, event)`` validates first and changes afterwards; no policy is there. It is the only way to a new state.
* ``check(state)`` says what must hold, without asking ``apply``: one cannot hide the other's mistake.
* The number of an event is the only time. Sets, hashes and floats decide nothing: equal logs give equal states.

::

    command ── decide ─► events ── apply ─► state ── check ─► violations
                           │                  │
                        records: codec, upcasters, replay, digest, snapshot

A verb has a folder, a subject has a file, the same subjects in each verb. ``state`` imports none of the verbs;
``apply``, ``check`` and ``records`` never import ``decide``: who follows a log needs no policy.
The one table of events is :mod:`statemachine.events`; :mod:`.fields` and :mod:`.mentions` follow from it.
Words: ``docs/glossary.md``.
"""
