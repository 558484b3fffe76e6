"""The same traffic under other sizes and policies."""
