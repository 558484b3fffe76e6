"""``kvledger run``: traffic through a real manager with real workers, every byte verified."""
