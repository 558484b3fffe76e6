"""The same traffic under other sizes and policies. Words: ``docs/glossary.md``."""
