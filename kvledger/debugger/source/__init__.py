"""Where a log comes from, and how places, blocks and requests in it are named. Words: ``docs/glossary.md``."""
