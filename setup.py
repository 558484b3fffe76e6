"""Build step of the distribution: everything else is in ``pyproject.toml``.

With ``KVLEDGER_NATIVE=1`` in the environment mypyc compiles what an engine's scheduler step runs through, as black and
mypy do with their own wheels: the state machine, the log and the manager. That needs a C compiler. Without it kvledger
is pure Python, which is what one edits, debugs, simulates and breaks on purpose; both give the same events and the same
digests.
"""

import glob
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import setup

NATIVE = {
    "statemachine": ["content"],
    "statemachine/state": ["duplicates", "groups", "nodes", "order", "ownership", "places", "state", "tree"],
    "statemachine/decide": [
        *("__init__", "cache", "capacity", "duplicates", "eviction", "followed", "hits", "ledger", "lookup", "pools"),
        *("requests", "sides", "transfers"),
    ],
    "statemachine/apply": [
        *("__init__", "blocks", "cache", "expect", "ledger", "pools", "requests", "sides", "transfers", "tree"),
    ],
    "statemachine/check": ["__init__", "incremental", "statements"],
    "statemachine/records": ["replay", "snapshot"],
    "ipc": ["reader", "record", "writer"],
    "workers/processes": ["acknowledgements"],
    "kvledger/manager": [
        "arguments",
        "blocks",
        "execution",
        "manager",
        "prompts",
        "ranks",
        "tokens",
        "transactions",
        "upkeep",
    ],
}
"""Modules that a step of a scheduler, a worker or a replay runs through, by folder. The others are tables, exceptions
(which mypyc cannot compile), made at import, or wait for something slower than Python."""

if "bdist_wheel" in sys.argv:  # setuptools would pack what an earlier build has left there, compiled or deleted since
    for left in glob.glob("build/lib*") + glob.glob("build/temp*") + glob.glob("build/bdist*"):
        shutil.rmtree(left)

README = {
    "long_description": re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]+\)", r"\1", Path("README.md").read_text()),
    "long_description_content_type": "text/markdown",
}
"""The README as an index shows it: what leads to files of the repository is text there, as those files are not."""

if os.environ.get("KVLEDGER_NATIVE") == "1":
    try:
        from mypyc.build import mypycify
    except ModuleNotFoundError as error:
        setup(setup_requires=["mypy>=1.11"])  # ends here where pip only asks what the build needs
        raise SystemExit("KVLEDGER_NATIVE=1 needs mypy: install it, or let pip isolate the build") from error
    files = [f"{package}/{name}.py" for package, names in NATIVE.items() for name in names]
    setup(ext_modules=mypycify(["--config-file", "pyproject.toml", *files]), **README)
else:
    setup(**README)
