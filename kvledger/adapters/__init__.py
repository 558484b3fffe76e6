"""Block managers of other engines, as views of a ledger."""
