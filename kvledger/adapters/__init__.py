"""Block managers of other engines, as views of a ledger. Nobody in kvledger imports an adapter.

Words: ``docs/glossary.md``.
"""
