"""The block manager that an engine imports, by subject."""
