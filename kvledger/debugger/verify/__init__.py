"""Whether a log is sound, where it first is not, and the smallest log that is not. Words: ``docs/glossary.md``."""
