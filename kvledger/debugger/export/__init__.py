"""A log in the formats of other tools."""
