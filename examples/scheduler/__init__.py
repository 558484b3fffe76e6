"""Continuous batching over kvledger, in one file to copy from: :mod:`examples.scheduler.scheduler`."""
