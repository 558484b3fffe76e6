"""The pure core of a KV-block manager: what is known, what may happen, and what follows from it.

No I/O, no clock, no randomness, no processes, no global state. Everything that ever changes the state of a ledger is an
*event*: a fact that names its block ids, runs and requests. Three functions make the machine::

    command ──> decide(state, command) ──> events ──> apply(state, event) ──> the next state
                reads the state,           a record    validates, then changes;
                all policy is here         each        no policy is here
                                                             │
                                           check(state) ─────┘ what must hold, written without apply

**Rules.** Equal logs give equal states, byte for byte (``records.snapshot`` is the one encoding). An event that
contradicts the state is refused before it has changed anything. ``decide`` never writes: an impossible command raises
a ``CommandRejected``, and nothing has happened. An old log replays under tomorrow's policy, since what was decided
stands in it.

**What is known** (``state``). A *run* (``Node``) is a sequence of consecutive cached blocks in the prefix tree. It
may have a ``Copy`` in each ``Place``: one pool of blocks, named by tier and group of layers, with the orders in which
the copies there are evicted. A *request* pins a path of runs and has a block table; a *transfer* moves copies from
one place to another::

    namespace root ── run 1 ── run 4      request "a": leaf = run 4, block table = 12 13 | 7 | 30 31
                         └──── run 5                    (run 1, run 4, and two blocks of its own)

    run 1: Copy in DEVICE (ids 12 13, ready), Copy in HOST (ids 3 4, arriving with transfer 9)

**Two facts** keep eviction simple: a path is pinned as a whole and released deepest run first, so taking from the front
of an order is leaf-first; and presence is prefix-closed, so one comparison decides a whole run.

**The rooms, and who may import whom.** Same subjects in each verb: requests, cache, transfers, pools, ledger.

=============  =======================================================================  ============================
room           holds                                                                    imports of the others
=============  =======================================================================  ============================
``events``     the one table of events; what a field means stands in its type           nothing
``commands``   what a caller may wish                                                   events
``content``    what makes two blocks equal: prompts as words                            errors
``items``      what tells images and sounds apart: records beside the words             nothing
``fields``     what the annotations of events say; ``mentions`` follows from it         events
``state``      runs, orders, places, state; questions only                              events
``apply``      one handler per event; ``apply.tree`` has the writers                    state
``decide``     one decider per command; lookup, hits, capacity, eviction; derive back   state, records; apply: once
``check``      statements about one object; the whole and the incremental check         state, mentions
``records``    codec, snapshots, upcasters, replay                                      fields, state, apply, check
=============  =======================================================================  ============================

``decide`` plans the first transaction of an epoch on a copy of the state, and applies it there: the one exception.
These walls are contracts in ``pyproject.toml``.

A new event: its class in ``events``, its decider, its handler, its sentence in the debugger's wording, the command it
comes from in ``decide.derive``. Indexes, tables, redaction, the incremental check and the documents follow from the
types of its fields.

The number of an event is the only time; sets, hashes and floats decide nothing. Words: ``docs/glossary.md``.
"""

__all__ = [
    *("apply", "check", "commands", "content", "decide", "errors", "events", "fields", "hashing", "items", "mentions"),
    *("records", "state"),
]
