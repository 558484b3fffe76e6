"""The pure core: events, decide, apply, check. No I/O, no clock, no randomness, no processes."""
