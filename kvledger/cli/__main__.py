"""``python -m kvledger.cli``."""

from kvledger.cli import main

main()
