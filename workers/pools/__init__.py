"""The memory that blocks live in, per backend, and the copies between tiers."""
