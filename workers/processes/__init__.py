"""How processes beside the engine are started, adopted, watched and answered.

Rules:

* A process is started by exec, with the code that runs here and nothing of the current directory.
* An incarnation has a log and signals of its own; only it writes them. What it writes can harm it alone.
* A process counts as dead when the kernel says so, never because it is silent.
* What a dead one leaves is read once more, and then removed by name.

Words: ``docs/glossary.md``.
"""
