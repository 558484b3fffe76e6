"""``kvledger view``: a log as a local web page, or as one self-contained file."""
