"""Processes that follow the log and change nothing: auditor and recorder."""
