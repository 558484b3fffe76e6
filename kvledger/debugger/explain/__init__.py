"""What happened, in words: of a block, a request, a transfer, a content. Words: ``docs/glossary.md``."""
