"""A log in the formats of other tools.

Rules:

* :mod:`.rows` has one row per event, its columns made from the event table; :mod:`.export` writes them as Parquet, CSV
  or JSON lines, with bounded memory. :mod:`.plain` has events and states as plain data for ``--json``.
* :mod:`.perfetto` draws a timeline: requests, transfers and evictions over time, pools as counters.
* A file appears when it is complete and is its owner's alone (:mod:`.output`). Texts in what a terminal may show are
  printable; prompts are in it only where they were asked for.

Words: ``docs/glossary.md``.
"""
