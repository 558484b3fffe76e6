"""Examples: programs that use kvledger."""
