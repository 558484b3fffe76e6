"""``python -m examples.garbled INCIDENT FILE.kvlog``: record one of the incidents."""

import sys
from pathlib import Path

from examples.garbled.incidents import INCIDENTS, record

if len(sys.argv) != 3 or sys.argv[1] not in INCIDENTS:
    sys.exit(f"usage: python -m examples.garbled {'|'.join(INCIDENTS)} FILE.kvlog")
print(f"guilty event: {record(sys.argv[1], Path(sys.argv[2]))}")
