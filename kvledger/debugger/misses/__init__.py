"""Why blocks miss: each block that was asked for, and what had become of its content by then.

Rules:

* :mod:`.memory` remembers what the log says of each content: who asked for it, who published it, how it was lost.
* :mod:`.misses` asks it for the cause of each miss, and counts; every block that was asked for is counted once.

Words: ``docs/glossary.md``.
"""
