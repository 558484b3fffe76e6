"""What tests of an engine that uses kvledger can build on, and what kvledger's own tests use.

* :mod:`.oracle`: two naive models of the cache, block by block, slow and obvious.
* :mod:`.strategies`: Hypothesis strategies for prompts and traffic (``pip install "kvledger[testing]"``).
* :mod:`.simulator`: engine, workers and followers in one process, from one seed, on weakly ordered memory.
* :mod:`.split`: likewise an instance that prefills, one that decodes, and their pushers.

Rules:

* A seed repeats a run exactly, and a failing run is made smaller.
* The project's own code runs as it is: only the modules through which it reaches the system are replaced.

Words: ``docs/glossary.md``.
"""
