"""Processes beside the engine: how they are started, adopted, watched and answered."""
