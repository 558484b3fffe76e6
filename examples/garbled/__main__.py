"""``python -m examples.garbled INCIDENT FILE.kvlog``: record one of the incidents."""

import sys
from pathlib import Path

from examples.garbled import incidents, mistakes

if len(sys.argv) != 3 or sys.argv[1] not in {**incidents.INCIDENTS, **mistakes.MISTAKES}:
    sys.exit(f"usage: python -m examples.garbled {'|'.join([*incidents.INCIDENTS, *mistakes.MISTAKES])} FILE.kvlog")
record = incidents.record if sys.argv[1] in incidents.INCIDENTS else mistakes.record
print(f"guilty event: {record(sys.argv[1], Path(sys.argv[2]))}")
