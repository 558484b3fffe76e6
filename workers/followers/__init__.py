"""Processes that follow the log and change nothing: auditor, recorder, publisher.

Rules:

* A follower keeps a state of its own, from the newest snapshot or the first event; it never asks the engine.
* One that reads too late is overrun: it says so, and goes on from a snapshot when it was told to.
* What it finds broken it names by the first event after which it is.

Words: ``docs/glossary.md``.
"""
