"""A log in the formats of other tools. Words: ``docs/glossary.md``."""
