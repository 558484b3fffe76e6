"""Whether a log is sound, where it first is not, and the smallest log that is not.

Rules:

* :mod:`.check` applies every event and checks the invariants after it; the event that it names is the first one,
  however it was found.
* :mod:`.bisect` looks at every event, or by halves where what is true once stays true; a predicate
  (:mod:`.predicates`) is the user's own.
* :mod:`.diff` compares two logs event by event, or two states.
* :mod:`.shrink` derives the commands of a log and leaves out what does not matter to its failure; :mod:`.pytest_file`
  writes what is left as a test. Nothing out of a log becomes code there but numbers and quoted text.

Words: ``docs/glossary.md``.
"""
