"""``python -m examples.garbled INCIDENT FILE.kvlog``: record one of the incidents."""

import sys
from pathlib import Path

from examples.garbled import incidents, mistakes

names = [*incidents.INCIDENTS, *mistakes.MISTAKES, *mistakes.COMPUTING]
if len(sys.argv) != 3 or sys.argv[1] not in names:
    sys.exit(f"usage: python -m examples.garbled {'|'.join(names)} FILE.kvlog")
record = incidents.record if sys.argv[1] in incidents.INCIDENTS else mistakes.record
print(f"guilty event: {record(sys.argv[1], Path(sys.argv[2]))}")
