"""Recordings (``.kvlog`` files): random access, index, redaction."""
